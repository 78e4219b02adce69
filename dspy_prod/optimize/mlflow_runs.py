"""An optimization in MLflow: a run of a compile, below it one of each candidate, so that they stand side by side.

Nothing here waits for MLflow but the end of the run, for `PATIENCE` seconds at most; what is missing then follows.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.compat.mlflow import place_here
from dspy_prod.errors import ConfigError
from dspy_prod.optimize import figures
from dspy_prod.optimize.candidates import Candidate, Progress
from dspy_prod.privacy.outward import outward
from dspy_prod.registry.errors import RegistryError
from dspy_prod.runtime.threads import begin
from dspy_prod.tracking.runs import Runs
from dspy_prod.tracking.setup import Place, place

if TYPE_CHECKING:
    import dspy

    from dspy_prod.optimize.report import OptimizationReport
    from dspy_prod.registry.published.manifest import ProgramVersion

_log = logging.getLogger("dspy_prod")

PATIENCE: Final = 2.0
"""Seconds for which the end of a run waits for MLflow."""
_LINK_PATIENCE: Final = 15.0
"""Seconds for which publishing waits for the run that the version is linked to."""
_LONGEST: Final = 5000
"""Characters of a parameter or a tag; MLflow refuses longer ones. Artifacts have the whole text."""
_TAG: Final = "dspy_prod."
_STATUS: Final = {"failed": "FAILED", "interrupted": "KILLED"}


def watcher(
    *,
    track: bool | None = None,
    resumed: bool = False,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    datasets: Mapping[str, Sequence[Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> InMlflow | None:
    """Who keeps a run in MLflow; None where tracking is off.

    Args:
        track: False: nobody. True: tracking must be on. None: when it is on.
        resumed: go on with the MLflow run of the same name, if there is one.
        tracking_uri, experiment: where, in place of what `dspy_prod.tracking.enable` was given.
        datasets: examples by what they are for, "trainset", "valset", "testset"; MLflow is told size and digest.
        settings: parameters of the run, by name.

    Raises:
        ConfigError: `track=True` while tracking is off, or an impossible URI.

    Example:
        ```python
        dspy_prod.tracking.enable("triage")
        watching = watcher(datasets={"trainset": train, "valset": val})
        ```
    """
    if track is False:
        return None
    where = place(tracking_uri, experiment)
    if where is None:
        if track:
            raise ConfigError(
                "track=True: tracking is off; call dspy_prod.tracking.enable(...) before, or leave it out"
            )
        return None
    return InMlflow(where, resumed=resumed, datasets=datasets, settings=settings)


class InMlflow:
    """Keeps one run in MLflow. A `Watcher`.

    Args:
        where: see `tracking.setup.place`. The other arguments are those of `watcher`.
    """

    def __init__(
        self,
        where: Place,
        *,
        resumed: bool = False,
        datasets: Mapping[str, Sequence[Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._runs = Runs(where)
        self._where = where
        self._resumed = resumed
        self._datasets = dict(datasets or {})
        self._settings = dict(settings or {})
        self._key = uuid.uuid4().hex
        self._said: dict[str, tuple[Any, ...]] = {}  # of a candidate's key: what MLflow was told last
        self._seen: dict[str, int] = {}
        self._steps = self._scored = 0
        self._waited = 0.0
        self._lock = threading.Lock()
        self._written = threading.Event()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, None while it has none."""
        return self._runs.ids.get(self._key)

    def wait_for_id(self, seconds: float = PATIENCE) -> str | None:
        """MLflow's id of the run; None when it takes longer to have one. What is waited here, `end` waits less."""
        began = time.monotonic()
        try:
            return self._runs.wait_for(self._key, seconds)
        finally:
            self._waited += time.monotonic() - began

    def begin(self, progress: Progress) -> None:
        """The compile begins, in the thread of whoever called it."""
        experiment, above = place_here(self._where.uri)
        del experiment  # a run of another experiment can be above too
        caps = {name: getattr(progress, name) for name in ("budget_usd", "max_calls", "max_tokens", "max_time")}
        params = {**self._settings, "optimizer": progress.optimizer, "run": progress.run, **caps}
        message: dict[str, Any] = {
            "run": self._key,
            "under": above,
            "name": progress.run,
            "start": _now(),
            "tags": {_TAG + "optimization": progress.run, _TAG + "optimizer": progress.optimizer},
            "params": {name: _short(value) for name, value in params.items() if value is not None},
            "datasets": [_dataset(*one) for one in self._datasets.items() if one[1]],
        }
        if self._resumed:
            message["continues"] = {_TAG + "optimization": progress.run}
        self._runs.tell(message)
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """A candidate may be new or complete."""
        with self._lock:
            for one in progress.candidates:
                self._seen.setdefault(one.key, _now())
                if one.status in ("complete", "raced"):
                    self._candidate(one)
            scored = sum(one.score is not None for one in progress.candidates)
            if scored > self._scored:
                self._scored = scored
                self._progress(progress)

    def end(self, progress: Progress, report: OptimizationReport | None) -> None:
        """The compile ends: what was found follows in the background; waits `PATIENCE` seconds for it."""
        until = time.monotonic() + PATIENCE - self._waited
        with self._lock:
            best = None if report is None or report.best is None else report.best.key
            for one in progress.candidates if report is None else report.candidates:
                if one.status != "minibatch" or one.key in self._said:
                    self._candidate(one, best=one.key == best, over=True)
            self._progress(progress)
        if begin("dspy_prod-optimization-ends", self._end, progress, report) is None:
            self._end(progress, report)
        self._written.wait(max(0.0, until - time.monotonic()))
        self._runs.wait(max(0.0, until - time.monotonic()), patiently=False)

    def wait(self, seconds: float) -> bool:
        """After the end: wait until everything is in MLflow or known to be lost; False when that took longer."""
        until = time.monotonic() + seconds
        return self._written.wait(seconds) and self._runs.wait(max(0.0, until - time.monotonic()))

    def _end(self, progress: Progress, report: OptimizationReport | None) -> None:
        try:
            for message in _artifacts(progress, report):
                self._runs.tell({"run": self._key, **message})
        except Exception:
            _log.exception("What MLflow is told of an optimization could not be drawn; its figures are there")
        finally:
            status = _STATUS.get(progress.stopped_by or "failed", "FINISHED")
            self._runs.tell({"run": self._key, "status": status, "end": _now()})
            self._runs.finish()
            self._written.set()

    def _progress(self, progress: Progress) -> None:
        """How far the run is, as points over the candidates that have a score."""
        self._steps += 1
        best = progress.best
        metrics = {
            "best_score": None if best is None else best.score,
            "baseline_score": progress.baseline,
            "spent_usd": progress.spent_usd,
            "calls": progress.calls,
            "tokens": progress.tokens,
            "candidates": len(progress.candidates),
        }
        self._runs.tell({"run": self._key, "metrics": _metrics(metrics, self._steps)})

    def _candidate(self, one: Candidate, best: bool = False, over: bool = False) -> None:
        known = (one.status, one.score, one.predicted, one.examples, one.index, one.cost_usd if over else None, best)
        if self._said.get(one.key) == known:
            return
        new, self._said[one.key] = one.key not in self._said, known
        metrics = {
            "score": one.score,
            "predicted": one.predicted if one.score is None else None,
            "examples": one.examples,
            "cost_usd": one.cost_usd,
            "usd_per_1000": None if one.usd_per_answer is None else 1000 * one.usd_per_answer,
            "tokens": one.tokens,
            "latency_s": one.latency,
            "demos": sum(one.demos.values()),
        }
        name = f"#{one.index} {outward(one.origin)}"
        tags = {
            "mlflow.runName": name,  # a number may change while earlier candidates turn out to be some
            _TAG + "candidate": str(one.index),
            _TAG + "status": one.status,
            _TAG + "parents": " ".join(f"#{parent}" for parent in one.parents),
            _TAG + "state": one.key,
            **({_TAG + "best": "true"} if best else {}),
        }
        self._runs.tell({
            "run": f"{self._key}/{one.key}",
            **({"continues": {_TAG + "state": one.key}} if self._resumed else {}),
            "parent": self._key,
            "name": name,
            "start": self._seen.get(one.key, _now()),
            "end": _now(),
            "status": "FINISHED" if one.status == "complete" else "KILLED",
            "metrics": _metrics(metrics, one.index),
            "tags": {name: _short(value) for name, value in tags.items()},
            **(self._content(one) if new else {}),
        })  # fmt: skip

    def _content(self, one: Candidate) -> dict[str, Any]:
        """What the program is. Without content, only how it came about."""
        said: dict[str, Any] = {"params": {"origin": _short(one.origin)}}
        if self._where.content != "off":
            alone = len(one.prompts) == 1
            said["params"].update({"prompt" if alone else f"prompt.{_name(name)}": _short(text)
                                   for name, text in one.prompts.items()})  # fmt: skip
            prompts = "\n\n".join(f"# {name}\n\n{text}" for name, text in one.prompts.items())
            state = json.dumps(one.state, default=str, indent=2, ensure_ascii=False)
            said["texts"] = {"prompts.md": outward(prompts), "program.json": outward(state)}
        return said


def publish_found(report: OptimizationReport, program: dspy.Module, name: str, **more: Any) -> ProgramVersion | None:
    """As `publish_best`, at the end of a compile: what was found is not lost because it could not be published.

    Returns:
        The version; None when it could not be published, which the log tells.
    """
    try:
        return publish_best(report, program, name, **more)
    except (ConfigError, RegistryError) as error:
        _log.warning("%r was not published: %s. Publish it when that is mended: registry.publish(best, %r)", name,
                     outward(str(error)), name)  # fmt: skip
        return None


def _artifacts(progress: Progress, report: OptimizationReport | None) -> Iterator[dict[str, Any]]:
    """What belongs to the whole run, the most useful first."""
    candidates = progress.candidates if report is None else report.candidates
    rows = [
        [f"#{one.index}", outward(one.origin), " ".join(f"#{up}" for up in one.parents), one.status, size, score]
        for one in candidates
        for size, score in one.minibatches
    ]
    if rows:
        columns = ["candidate", "origin", "from", "status", "examples", "score"]
        yield {"tables": {"minibatches.json": {"columns": columns, "data": rows}}}
    if report is None:
        return
    found = {
        "best_score": report.best_score,
        "expected_score": report.expected_score,
        **dict(zip(("expected_low", "expected_high"), report.expected_interval or (), strict=False)),
        "unconfirmed_usd": report.unconfirmed_usd,
        "seconds": report.seconds,
    }
    if report.test is not None:
        found.update(test_score=report.test.best, test_score_given=report.test.given)
    tags = {_TAG + "stopped_by": report.stopped_by, "mlflow.note.content": _summary(report)}
    yield {"metrics": _metrics(found, len(candidates)), "tags": {name: _short(text) for name, text in tags.items()}}
    yield {"texts": {"report.json": outward(json.dumps(report.to_dict(), indent=2)), "report.txt": str(report)}}
    yield {"texts": {"report.html": f'<meta charset="utf-8">{report._repr_html_()}'}}
    try:
        score = figures.score_against_dollars(
            candidates, spent_usd=report.spent_usd, budget_usd=report.budget_usd,
            baseline=None if report.baseline is None else report.baseline.score,
        )  # fmt: skip
        quality = figures.quality_against_cost(candidates, best=report.best)
    except ConfigError as error:
        _log.debug("MLflow gets no figures of the optimization: %s", error)
        return
    pictures = {"score_against_dollars.png": score, "quality_against_cost.png": quality}
    yield {"files": {path: base64.b64encode(figures.png(one)).decode("ascii") for path, one in pictures.items()}}


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
        report: of the run. program: the best one, or another of its candidates.
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
    server = server_at(uri)
    server.write(
        lambda client: client.set_prompt_version_tag(name, version.version, "dspy_prod_optimization", report.run)
    )
    if run is not None:
        server.write(lambda client: client.set_tag(run, _TAG + "published", f"{name}/{version.version}"))
    return version


_PLACES: Final = 9
"""Of a metric: MLflow's tables show every digit, and a nano-dollar is the smallest amount."""


def _metrics(values: Mapping[str, float | None], step: int) -> list[tuple[str, float, int, int]]:
    now = _now()
    known = {name: float(value) for name, value in values.items() if value is not None and isfinite(value)}
    return [
        (name, round(value, _PLACES if "usd" in name else _PLACES // 2), step, now) for name, value in known.items()
    ]


def _summary(report: OptimizationReport) -> str:
    """The run's description, in Markdown."""
    interval = report.expected_interval
    given = None if report.baseline is None else report.baseline.score
    lines = [f"**{report.optimizer}**, ended: **{report.stopped_by}**{f', {report.detail}' if report.detail else ''}"]
    if report.best is not None and report.best_score is not None:
        before = "" if given is None else f", the given program {given:.4g}"
        lines.append(
            f"Best program: **#{report.best.index}** ({report.best.origin}), score {report.best_score:.4g}{before}"
        )
    if report.expected_score is not None:
        within = "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})"
        lines.append(f"Expected on new examples: **{report.expected_score:.4g}**{within}")
    cap = "" if report.budget_usd is None else f" of ${report.budget_usd:,.4g}"
    lines.append(f"Spent: **${report.spent_usd:,.4f}**{cap}, {report.calls:,} calls, {report.tokens:,} tokens")
    lines += [f"Warning: {warning}" for warning in report.warnings[:5]]
    return "\n".join(f"- {line}" for line in lines) + "\n\nThe whole report is the artifact `report.html`."


def _dataset(context: str, examples: Sequence[Any]) -> dict[str, str]:
    from dspy_prod.registry.published.provenance import dataset_name

    told = dataset_name(list(examples)) or ""
    digest = told.removeprefix("sha256:").partition(" ")[0]
    return {"name": f"{context} ({len(examples)} examples)", "digest": digest, "context": context}


def _short(value: Any) -> str:
    text = outward(str(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _name(predictor: str) -> str:
    """A predictor's name as MLflow takes it for a parameter: no brackets or quotes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in predictor)


def _now() -> int:
    return time.time_ns() // 1_000_000
