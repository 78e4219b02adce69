"""`deploy`: a candidate goes through its gate, and from alias to alias up to `production`.

Every move is a compare-and-set on what the alias had when the deployment began. How far it is stands in the journal
(`state`), so a deployment that was killed continues wherever it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import dspy
from tqdm.auto import tqdm

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.aliases.gates import Gate, Threshold
from dspy_prod.registry.aliases.projection import PRODUCTION
from dspy_prod.registry.aliases.promotion import check_alias
from dspy_prod.registry.deployment.candidates import Given, resolve
from dspy_prod.registry.deployment.report import DIRECTORY, Deployment
from dspy_prod.registry.deployment.run import Order, Run, Steps
from dspy_prod.registry.errors import RegistryError
from dspy_prod.registry.published import provenance
from dspy_prod.registry.server import server_at

STAGES: Final = ("staging", "canary", PRODUCTION)


def deploy(
    name: str,
    candidate: Given,
    *,
    evaluate: Callable[[Any], Any],
    program: dspy.Module | Callable[[], dspy.Module] | None = None,
    thresholds: Mapping[str, Threshold] | None = None,
    baseline: Mapping[str, float] | str | None = None,
    margin: float = 0.0,
    min_examples: int | None = None,
    stages: Sequence[str] = STAGES,
    until: str | None = None,
    recheck: bool = False,
    force: bool = False,
    reason: str | None = None,
    by: str | None = None,
    report_dir: str | Path | None = DIRECTORY,
    display_progress: bool = False,
    tracking_uri: str | None = None,
) -> Deployment:
    """Let a candidate pass its gate, publish it unless it is published, and move the stages' aliases to it in order.

    Every alias is moved only from what it had when the deployment began. A deployment that broke off, at whatever
    moment, is continued by the same call, on any machine: what was moved stays moved, and a gate that passed is not
    evaluated again. When every alias has been moved, the same call does nothing. Of two deployments at once, one wins.

    Args:
        name: the program.
        candidate: a version number, an alias or reference, a `ProgramVersion`; or what is to be published first: a
            program, or the path of a state that `program.save("candidate.json")` wrote.
        evaluate, thresholds, baseline, margin, min_examples: the gate, as in `Gate`. A baseline such as
            `"triage@production"` means the version that the alias had when the deployment began.
        program: the program from the code to put versions into, or a function that makes it; needed unless
            `candidate` is a program.
        stages: the aliases to move, in order.
        until: the last of them to move now, as `"canary"`. The others wait for an experiment that compares the version
            with what they have: its promotion of `production` continues this deployment, as the same call without
            `until` would.
        recheck: start over: take the aliases as they are now, and evaluate the gate again.
        force: go on although the gate is inconclusive, also when it was in an earlier run; needs a `reason`. A gate
            that fails cannot be overruled.
        reason, by: why and who, for the record.
        report_dir: where `deployment-<name>-<version>.json` and `.md` are written; None: nowhere.
        display_progress: show the steps as a progress bar.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Returns:
        The deployment, with outcome `deployed`, `waiting` (up to `until`) or `unchanged`.

    Raises:
        PromotionRefusedError: the gate failed, had an error or is inconclusive; no alias was moved.
        PromotionConflictError: somebody else moved one of the aliases since the deployment began. Aliases that had
            been moved before stay.
        SignatureMismatchError, UnknownVersionError: the candidate does not fit, or does not exist.
        RegistryUnavailableError: MLflow did not answer; deploy again to continue.
        ConfigError: an impossible argument; the message names it.

    Errors of the registry carry the deployment so far as `deployment`, with advice on how to go on, and it is reported
    to the files too.

    Example:
        ```python
        deployment = registry.deploy(
            "triage", second, program=program, evaluate=evaluate, thresholds={"accuracy": 0.85}
        )
        print(deployment)
        ```
    """
    tracking_uri = unshown(tracking_uri)
    aliases = tuple(stages)
    if isinstance(stages, str) or not aliases or len(set(aliases)) != len(aliases):
        raise ConfigError(f"stages={stages!r}: name at least one alias, and none twice, such as {STAGES!r}")
    for alias in aliases:
        check_alias(name, alias)
    if until is not None and until not in aliases:
        raise ConfigError(f"until={until!r} is none of the stages {aliases!r}")
    if force and not reason:
        raise ConfigError("deploy(force=True) needs a reason=, which is kept in the audit log")
    gate = Gate(evaluate, thresholds or {}, baseline, margin, min_examples)
    last = aliases[-1] if until is None else until
    order = Order(name, gate, aliases, last, recheck, force, reason, by or provenance.author(), tracking_uri)
    server = server_at(tracking_uri)
    with tqdm(total=len(order.now) + 3, desc=f"deploy {name}", leave=False, disable=not display_progress) as bar:
        steps = Steps(lambda step: bar.set_description(f"deploy {name}: {step}"), bar.update)
        with steps.step("load") as said:
            found = resolve(server, name, candidate, program)
            run = Run(order, server, found, steps)
            said(f"{found.said}: {found.version or 'not published yet'}")
        try:
            run.go()
        except BaseException as error:
            run.end(error)
            deployment = run.report(report_dir)
            if isinstance(error, RegistryError):
                error.deployment = deployment
            raise
    return run.report(report_dir)
