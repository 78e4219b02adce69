"""An experiment in MLflow: a run for each variant, with its metrics over time and its traces, so that two of them stand
side by side on the page of evaluation runs.

Told at the controller's looks, through the queue of the traces; nothing here waits for MLflow. Runs end with the
experiment, and go on when it does.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.decisions import Decision
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.spread import Spread
from dspy_prod.experiments.variant_figures import TAG, figures, note, standing, tags
from dspy_prod.privacy.names import bare_url
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores import trials as words
from dspy_prod.stores.trials import Trial, Trials
from dspy_prod.tracking import setup
from dspy_prod.tracking.run_messages import RunMessages, TrackedRun
from dspy_prod.tracking.variant_runs import variant_runs

TRACKED: Final = "tracked"
"""The line of the audit that says which runs of MLflow's the variants have."""
LOCAL: Final = "http://127.0.0.1:5000"
"""Where `mlflow server` listens unless told otherwise: an MLflow that is a database has no address of its own."""
REMOVED: Final = "removed"
"""The state of an experiment that nobody has any more, as its runs tell it."""
_ENDED: Final = (words.PAUSED, words.STOPPED, words.DECIDED)

_log = logging.getLogger("dspy_prod")


class VariantsInMlflow:
    """Keeps the runs of one experiment's variants, while tracking is on.

    Args:
        name: the experiment's. trials: the store's. variants: control first.
    """

    def __init__(self, name: str, trials: Trials, variants: Sequence[str]) -> None:
        self._name, self._trials, self._variants = name, trials, tuple(variants)
        self._courier: Any = None
        self._runs: dict[str, TrackedRun] = {}
        self._open = False
        self._told: Any = None
        self._revision = 0
        self._kept: dict[str, Any] | None = None
        self._after_fork()
        reset_after_fork(self)

    def look(
        self, trial: Trial, stage: str, decision: Decision, evidence: Evidence, spread: Spread,
        page: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        """Tell how the experiment stands, if it has changed since it was told last.

        Args:
            trial: as the store has it. stage: in words. decision, evidence, spread: what is known.
            page: makes the scorecard as a page, for the end.
        """
        with self._lock:  # an operator and a controller may tell at once
            self._look(trial, stage, decision, evidence, spread, page)

    def removed(self, salt: str, kept: Mapping[str, Any] | None = None) -> None:
        """End the runs of an experiment that was removed: those this process told of, and those that others did.

        Runs in another MLflow than the one that is told now stay as they are.

        Args:
            salt: the experiment's. kept: where the audit says that its runs are, see `tracked`.
        """
        with self._lock:
            courier = setup.courier()
            if courier is not self._courier:  # what this process told of is elsewhere
                self._courier, self._runs = courier, {}
            if courier is None:
                return
            if not self._runs and kept is not None and _is_here(kept, courier):
                its = variant_runs(self._name, salt, self._variants)
                self._runs = {variant: TrackedRun(each.key, each.name) for variant, each in its.items()}
            for run in self._runs.values():
                run.tag(**{f"{TAG}state": REMOVED})
                run.end()
            self._runs, self._open, self._told = {}, False, None

    def _look(
        self, trial: Trial, stage: str, decision: Decision, evidence: Evidence, spread: Spread,
        page: Callable[[], str] | None,
    ) -> None:  # fmt: skip
        courier = setup.courier()
        if courier is None:
            return
        if courier is not self._courier:  # tracking was turned on, perhaps anew: nothing of this was told there
            self._courier, self._runs, self._open, self._told = courier, {}, False, None
        declaration = Declaration.from_json(trial.declaration)
        if trial.state == words.CREATED or trial.revision < self._revision:
            return  # somebody has told what it became since
        self._revision = trial.revision
        users = dict.fromkeys(self._variants, 0)
        for arm in self._trials.counts(self._name):
            users[arm.arm] += arm.first
        now = (trial.revision, users, [evidence.units(each.name, arm) for each in evidence.metrics for arm in users])
        if now != self._told:
            self._told = None  # should this fail, as where the page cannot be made, the next look tells
            self._tell(trial, stage, decision, declaration, evidence, spread, users, page)
            self._told = now
        self._keep()

    def _tell(
        self, trial: Trial, stage: str, decision: Decision, declaration: Declaration, evidence: Evidence,
        spread: Spread, users: Mapping[str, int], page: Callable[[], str] | None,
    ) -> None:  # fmt: skip
        ended, step = trial.state in _ENDED, sum(users.values())
        its = variant_runs(self._name, declaration.salt, self._variants)
        if not self._runs or (not ended and not self._open):
            self._runs = {variant: self._opened(variant, its[variant], declaration, ended) for variant in its}
            self._open = True
        said = {variant: figures(variant, decision, evidence, spread, users) for variant in self._runs}
        card = None if page is None or not ended else page()  # a look of its own, by which the evidence may grow
        for variant, run in self._runs.items():
            run.log(said[variant], step=step)
            run.tag(**standing(trial, stage, decision, declaration.serves))
            if card is not None:
                run.text("scorecard.html", card)
            if ended:
                run.end(at=trial.since)
        if ended:
            self._open = False

    def _opened(self, variant: str, its: Any, declaration: Declaration, ended: bool) -> TrackedRun:
        """A variant's run, made or gone on with; one of an experiment that is over is not opened again."""
        version, role = declaration.pinned.get(variant), "control" if variant == self._variants[0] else "candidate"
        named, described = tags(self._name, variant, version, role), note(self._name, variant, version, role)
        if ended:
            run = TrackedRun(its.key, its.name)
            run.tag(**named)
            run.note(described)
            return run
        return RunMessages().open(its.name, key=its.key, tags=named, note=described)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # the page is a look of its own

    def _keep(self) -> None:
        """Keep in the audit where the runs are, once MLflow has them: every process can link to them then."""
        ids = {variant: run.id for variant, run in self._runs.items()}
        where = setup.status()
        experiment = self._courier.messages.experiment
        if where is None or experiment is None or None in ids.values():
            return
        kept = {"uri": bare_url(where.uri), "experiment": experiment, "runs": ids, "name": where.experiment}
        if kept == self._kept:
            return
        try:
            if kept != tracked(self._trials.decisions(self._name)):
                reason = f"the runs of the variants are at {address(kept, self._variants)}"
                line = words.Decision(TRACKED, "controller", json.dumps({"reason": reason, **kept}))
                self._trials.decide(self._name, line)
            self._kept = kept
        except StoreUnavailableError as error:
            _log.warning("Where the runs of the experiment %s are cannot be kept now: %s", self._name, error)


def _is_here(kept: Mapping[str, Any], courier: Any) -> bool:
    """Whether runs are where tracking writes now. Which experiment of MLflow's that is, is known once it was reached;
    before, it goes by the name, which audits of earlier releases do not have."""
    where, found = setup.status(), courier.messages.experiment
    if where is None or kept["uri"] != bare_url(where.uri):
        return False
    return bool(kept["experiment"] == found if found is not None else kept["name"] in (None, where.experiment))


def tracked(audit: Sequence[words.Decision]) -> dict[str, Any] | None:
    """Where the variants' runs are, as the audit says: `{"uri", "experiment", "name", "runs"}`, of which the name is of
    the experiment in MLflow, None where an earlier release has kept it; None if the audit does not say."""
    for line in reversed(audit):
        if line.what == TRACKED:
            said = json.loads(line.evidence)
            return {**{each: said[each] for each in ("uri", "experiment", "runs")}, "name": said.get("name")}
    return None


def address(kept: Mapping[str, Any] | None, variants: Sequence[str], candidate: str | None = None) -> str | None:
    """The page of MLflow's that compares a candidate's run with control's; None where there are none.

    Args:
        kept: see `tracked`. variants: control first. candidate: default: the first one.
    """
    if kept is None:
        return None
    base = str(kept["uri"]).rstrip("/") if str(kept["uri"]).startswith("http") else LOCAL
    control, runs = variants[0], kept["runs"]
    chosen = candidate if candidate in runs and candidate != control else variants[1]
    return (
        f"{base}/#/experiments/{kept['experiment']}/evaluation-runs"
        f"?selectedRunUuid={runs[chosen]}&compareToRunUuid={runs[control]}"
    )
