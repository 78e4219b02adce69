"""An optimization in MLflow: a run of a compile, below it one of each candidate, so that they stand side by side.

Nothing here waits for MLflow but the end of the run, for `PATIENCE` seconds at most; what is missing then follows.
What is told is made in `mlflow_messages`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.compat.mlflow import place_here
from dspy_prod.errors import ConfigError
from dspy_prod.optimize import mlflow_messages as messages
from dspy_prod.optimize.candidates import Candidate, Progress
from dspy_prod.runtime.threads import begin
from dspy_prod.tracking.runs import Runs
from dspy_prod.tracking.setup import Place, place

if TYPE_CHECKING:
    from dspy_prod.optimize.report import OptimizationReport

_log = logging.getLogger("dspy_prod")

PATIENCE: Final = 2.0
"""Seconds for which the end of a run waits for MLflow."""


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
        self._seen: dict[str, int] = {}  # when it was first heard of, and when it was decided, in milliseconds
        self._decided: dict[str, int] = {}
        self._scored = 0
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
        _, above = place_here(self._where.uri)  # a run of another experiment can be above too
        message = messages.beginning(progress, self._settings, self._datasets, self._resumed)
        self._runs.tell({"run": self._key, "under": above, **message})
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """A candidate may be new or complete."""
        with self._lock:
            for one in progress.candidates:
                self._seen.setdefault(one.key, messages.now())
                if one.status in ("complete", "raced"):
                    self._decided.setdefault(one.key, messages.now())
                    self._candidate(one)
            scored = sum(one.score is not None for one in progress.candidates)
            if scored > self._scored:
                self._scored = scored
                self._runs.tell({"run": self._key, **messages.standing(progress, scored)})

    def end(self, progress: Progress, report: OptimizationReport | None) -> None:
        """The compile ends: what was found follows in the background; waits `PATIENCE` seconds for it."""
        until = time.monotonic() + PATIENCE - self._waited
        self._runs.expect()
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
            with self._lock:
                best = None if report is None or report.best is None else report.best.key
                for one in progress.candidates if report is None else report.candidates:
                    if one.status != "minibatch" or one.key in self._said:
                        self._candidate(one, best=one.key == best, over=True)
                self._runs.tell({"run": self._key, **messages.standing(progress, self._scored + 1)})
            for message in messages.outcome(progress, report, self._scored + 1, whole=self._whole):
                self._runs.tell({"run": self._key, **message})
        except Exception:
            _log.exception("What MLflow is told of an optimization could not be drawn; its figures are there")
        finally:
            self._runs.tell({"run": self._key, **messages.ending(progress)})
            self._runs.finish()
            self._written.set()

    @property
    def _whole(self) -> bool:
        """Whether prompts and demonstrations may be told."""
        return self._where.content != "off"

    def _candidate(self, one: Candidate, best: bool = False, over: bool = False) -> None:
        known = (
            one.status, one.score, one.predicted, one.examples, one.index, one.parents,
            one.cost_usd if over else None, best,
        )  # fmt: skip
        if self._said.get(one.key) == known:
            return
        new, self._said[one.key] = one.key not in self._said, known
        self._runs.tell({
            "run": f"{self._key}/{one.key}",
            "parent": self._key,
            "start": self._seen.setdefault(one.key, messages.now()),
            "end": self._decided.get(one.key) or messages.now(),
            **messages.candidate(one, best, self._resumed),
            **(messages.content(one, whole=self._whole) if new else {}),
        })  # fmt: skip
