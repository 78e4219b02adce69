"""Publishing what an optimization found: a version in the registry, linked to its MLflow run and its examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.optimize.mlflow_messages import TAG
from dspy_prod.privacy.outward import outward
from dspy_prod.registry.errors import RegistryError
from dspy_prod.tracking.setup import place

if TYPE_CHECKING:
    import dspy

    from dspy_prod.optimize.mlflow_runs import InMlflow
    from dspy_prod.optimize.report import OptimizationReport
    from dspy_prod.registry.published.manifest import ProgramVersion
    from dspy_prod.registry.server import Server

_log = logging.getLogger("dspy_prod")

_LINK_PATIENCE: Final = 30.0
"""Seconds for which publishing waits for the run that the version is linked to."""


def publish_found(report: OptimizationReport, program: dspy.Module, name: str, **more: Any) -> ProgramVersion | None:
    """As `publish_best`, at the end of a compile: what was found is not lost because it could not be published.

    Returns:
        The version; None when it could not be published, which the log tells.
    """
    try:
        return publish_best(report, program, name, **more)
    except Exception as error:  # whatever it is: the program is there, and was paid for
        _log.warning("%r was not published: %s. Publish it when that is mended: registry.publish(best, %r)", name,
                     outward(str(error)), name)  # fmt: skip
        return None


def publish_best(
    report: OptimizationReport,
    program: dspy.Module,
    name: str,
    *,
    dataset: str | Sequence[Any] | None = None,
    tracking_uri: str | None = None,
    watching: InMlflow | None = None,
) -> ProgramVersion:
    """Publish the program that an optimization found, linked to its MLflow run and the examples that it was chosen by.

    Args:
        report: of the run. program: the best one.
        name: what it is published as. dataset: the selection set, or its name.
        tracking_uri: the MLflow store; default: where tracking writes, else MLflow's current one.
        watching: who keeps the run, where the report came too early to know its id.

    Raises:
        ConfigError: the name or the program cannot be published.
        RegistryUnavailableError: MLflow did not answer.

    Example:
        ```python
        publish_best(best.optimization, best, "triage", dataset=val)
        ```
    """
    from dspy_prod import registry
    from dspy_prod.registry.server import server_at

    where = place(tracking_uri)
    uri = tracking_uri if where is None else where.uri
    measured = {
        "score": report.best_score,
        "expected_score": report.expected_score,
        "optimization_usd": report.spent_usd,
    }
    if report.test is not None:
        measured["test_score"] = report.test.best
    server = server_at(uri)  # imports MLflow, as the process does that is waited for next
    run = report.experiment_run or (None if watching is None else watching.wait_for_id(_LINK_PATIENCE))
    version = registry.publish(
        program,
        name,
        metrics={key: value for key, value in measured.items() if value is not None and isfinite(value)},
        dataset=dataset,
        message=f"{report.optimizer}, run {report.run}: {report.stopped_by}",
        run_id=run,
        tracking_uri=uri,
    )
    try:
        _named_after(server, version, report.run, run)
    except RegistryError as error:
        _log.warning("%s/%s is published, but says nothing of run %r: %s", name, version.version, outward(report.run),
                     outward(str(error)))  # fmt: skip
    if run is None and watching is not None:
        _log.warning("%s/%s is published, but linked to no MLflow run: there was none yet after %.0f s", name,
                     version.version, _LINK_PATIENCE)  # fmt: skip
    return version


def _named_after(server: Server, version: ProgramVersion, optimization: str, run: str | None) -> None:
    """Have the version name the optimization, and the optimization's run the version."""
    name, number = version.name, version.version
    told = outward(optimization)
    server.write(lambda client: client.set_prompt_version_tag(name, number, "dspy_prod_optimization", told))
    if run is not None:
        server.write(lambda client: client.set_tag(run, TAG + "published", f"{name}/{number}"))
