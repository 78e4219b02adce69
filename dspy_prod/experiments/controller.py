"""The controller of an experiment: reads what has come in, decides, and acts, one look at a time.

A look may be broken off at any moment and done again by anybody. What it has read stands in a checkpoint with how far
it got; a decision is one compare-and-set in the store, with its line in the audit; and what follows from it, moving an
alias, is done until it is done, since moving one twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.aliases import Aliases
from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.decisions import Decision
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.emitting import emit
from dspy_prod.experiments.feedback import Feedback
from dspy_prod.experiments.history import Look
from dspy_prod.experiments.horizon import REASON, Horizon, has_asked
from dspy_prod.experiments.pairs import Pairs
from dspy_prod.experiments.reading import Reading
from dspy_prod.experiments.sample import Sample
from dspy_prod.experiments.variants_in_mlflow import VariantsInMlflow
from dspy_prod.options.experiments import SHADOW, Rollout
from dspy_prod.options.metrics import Metric
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores import trials as words
from dspy_prod.stores.trial_terms import lease_of
from dspy_prod.stores.trials import Trial, Trials
from dspy_prod.tracking import setup

LEASE: Final = 30.0
"""Seconds for which a controller that was killed keeps others from looking, where its process cannot be asked."""

TELLINGS: Final = 10
"""Times that it may have changed, or that others may save before, while MLflow is told, until the next look tells."""

_log = logging.getLogger("dspy_prod")


class Controller:
    """Looks at one experiment. One of several at a time does, whatever process they are in. Thread-safe.

    Args:
        name: the experiment's. trials: the store's. design: who gets what. metrics: what is compared.
        rollout: the stages; None: a fixed split. aliases: moves those of the registry; None where no variant has one.
        hold: whether a sample ratio that is off pauses the experiment; else everybody gets control.
        sample: whom judges look at; nobody else counts for their metrics.
        tracking_uri: the MLflow whose feedback counts while tracking is off; None: none does, then.
        horizon: when it pauses if it is still undecided; None: never.

    Attributes:
        page: makes the scorecard as a page, which MLflow keeps when the experiment ends; None: no page.
        over: as of its last look, there is nothing left to do: it was stopped or removed, or what was decided is done
            and told.
    """

    def __init__(
        self,
        name: str,
        trials: Trials,
        design: Design,
        metrics: Sequence[Metric],
        alpha: float,
        rollout: Rollout | None,
        aliases: Aliases | None,
        hold: bool = True,
        sample: Sample | None = None,
        tracking_uri: str | None = None,
        horizon: Horizon | None = None,
    ) -> None:
        self.name = name
        self._trials, self._design, self._metrics, self.alpha = trials, design, tuple(metrics), alpha
        self._rollout, self._aliases, self._hold, self._horizon = rollout, aliases, hold, horizon
        sample = sample or Sample("", {})
        self._reading = Reading(name, trials, design, self._metrics, alpha, rollout, sample)
        self._in_mlflow = VariantsInMlflow(name, trials, design.variants)
        self._feedback = Feedback(name, trials, self._metrics, sample.shares, tracking_uri)
        self.over = False
        self.page: Callable[[], str] | None = None
        self._told: tuple[int, float] | None = None
        self._asked = False
        self._declared: tuple[str, Declaration | None] = "", None
        self._after_fork()
        reset_after_fork(self)

    def step(self) -> Decision | None:
        """One look: read, decide, act. None when another controller is looking, or there is nothing to look at.

        Raises:
            StoreUnavailableError: the store cannot be read or written; look again later.
        """
        lease, progress = self._trials.look(self.name, self._me, LEASE)
        if lease.holder != self._me:
            return None
        try:
            if progress is None or not self._is_there(progress.trial):
                self.over = True  # it was removed, whatever has its name now
                self._in_mlflow.removed(self._design.salt)
                return None
            decision = self._reading.read(progress)
            trial: Trial | None = progress.trial
            if progress.trial.state == words.RUNNING:
                trial = self._act(progress.trial, decision)
            over = trial is not None and trial.state in (words.STOPPED, words.DECIDED)
            if trial is not None and self._aliases is not None:
                over &= self._aliases.follow(trial, self._trials.decisions(self.name))
            if trial is not None:
                over &= self._tell(trial, decision)
            self.over = over
            return decision
        finally:
            self._trials.release(lease_of(self.name), self._me)

    def tell(self) -> None:
        """Tell MLflow how it stands now, as after what a person has done: its runs end with it, and wait for no look.

        Nothing is decided. Where the store does not answer, the next look tells.
        """
        if setup.courier() is None:
            return
        told: int | None = None
        why: object = "others look at it all the time"
        try:
            for _ in range(TELLINGS):
                with self._reading.still:  # what is told is of one moment
                    trial = self._trials.trial(self.name)
                    if trial is None or not self._is_there(trial):
                        self.removed(None)  # whoever did so may have ended the runs before they were told of here
                        return
                    if trial.revision == told:
                        return
                    if self._tell_runs(trial, self._reading.read()):
                        told = trial.revision  # should it have changed meanwhile, who did so may have told it before
        except StoreUnavailableError as error:
            why = error
        _log.warning("MLflow is told with the next look how the experiment %s stands: %s", self.name, why)

    def removed(self, kept: Mapping[str, Any] | None) -> None:
        """End the runs in MLflow of an experiment that was removed; see `VariantsInMlflow.removed`."""
        self.over = True
        self._in_mlflow.removed(self._design.salt, kept)

    def _tell(self, trial: Trial, decision: Decision) -> bool:
        """Tell MLflow how it stands, and take in what people say there, for the next look; whether it was told."""
        told = self._tell_runs(trial, decision)
        if setup.courier() is not None and not self._is_there(self._trials.trial(self.name)):
            self._in_mlflow.removed(self._design.salt)  # meanwhile, and whoever did so has ended the runs before
        elif trial.state in (words.RUNNING, words.PAUSED):
            self._feedback.look(trial)
        return told

    def _tell_runs(self, trial: Trial, decision: Decision) -> bool:
        """Tell MLflow how it stands; False where others look all the time, so that there are no figures of now."""
        share = None if self._rollout is None else self._rollout.stages[trial.stage]
        stage = "split" if share is None else share if isinstance(share, str) else f"{100 * share:g} %"
        with self._reading.still:  # others look with the same object
            if self._reading.evidence is None:
                decision = self._reading.read()
            evidence = self._reading.evidence
            if evidence is not None:
                self._in_mlflow.look(trial, stage, decision, evidence, self._reading.spread, self.page)
            return evidence is not None

    def read(self) -> Decision:
        """Take in what has come since, save how far that is, and say what it means; see `Reading`."""
        return self._reading.read()

    def known(self) -> Decision:
        """What the last `read` of anybody has found, without writing anything."""
        return self._reading.known()

    def history(self) -> tuple[Look, ...]:
        """How the evidence grew until the last `read`."""
        return self._reading.history()

    @property
    def impossible(self) -> dict[str, int]:
        """Units that have what a metric cannot be, by metric; see `Reading`."""
        return self._reading.impossible

    @property
    def pairs(self) -> Pairs | None:
        """Those of a shadow stage, as of the last `read` or `known`; None without one."""
        return self._reading.pairs

    def _declaration(self, trial: Trial) -> Declaration:
        """What a trial is; it seldom changes from look to look."""
        text, found = self._declared
        if text != trial.declaration:
            found = Declaration.from_json(trial.declaration)
            self._declared = trial.declaration, found
        assert found is not None
        return found

    def _is_there(self, trial: Trial | None) -> bool:
        """Whether this is the experiment, and no later one of its name."""
        return trial is not None and self._declaration(trial).salt == self._design.salt

    def _after_fork(self) -> None:
        """A child is another controller."""
        self._me = uuid.uuid4().hex

    # -- acting --------------------------------------------------------------------------------------------------------
    def _act(self, trial: Trial, decision: Decision) -> Trial | None:
        control = self._design.variants[0]
        moved = [] if self._aliases is None else self._aliases.moved()
        if moved:
            return self._change(trial, "pause", f"somebody moved {', '.join(moved)} meanwhile", decision, words.PAUSED)
        if decision.verdict == "invalid":
            if self._hold:
                return self._change(trial, "pause", decision.reason, decision, words.PAUSED)
            return self._decided(trial, "rollback", control, decision)
        if decision.verdict == "rollback":
            return self._decided(trial, "rollback", control, decision)
        if decision.verdict == "promote" and decision.winner is not None:
            return self._decided(trial, "promote", decision.winner, decision)
        worse = {name: each.reason for name, each in decision.candidates.items() if each.verdict == "rollback"}
        worse |= {} if self._reading.pairs is None else self._reading.pairs.worse()
        declaration = self._declaration(trial)
        new = [name for name in worse if name not in declaration.dropped]
        if new:
            reason = "; ".join(worse[name] for name in new)
            gone = [*declaration.dropped, *new]
            if len(gone) == len(self._design.variants) - 1:
                back = replace(declaration, serves=control, dropped=gone)
                return self._change(trial, "rollback", reason, decision, words.DECIDED, None, back)
            return self._change(trial, "drop", reason, decision, None, None, replace(declaration, dropped=gone))
        if self._horizon is not None and self._is_over(self._horizon, trial, decision):
            told = self._horizon.words(declaration.unit)
            return self._change(trial, "pause", f"{REASON} ({told}): {decision.reason}", decision, words.PAUSED)
        after = self._next_stage(trial, declaration.dropped)
        if after is not None:
            return self._change(trial, "stage", f"stage {after} of the rollout", decision, None, after)
        return self._inconclusive(trial, decision)

    def _inconclusive(self, trial: Trial, decision: Decision) -> Trial | None:
        """A stage that has lasted as long as it may, and shows neither harm nor enough users."""
        rollout = self._rollout
        longest = None if rollout is None else rollout.most_time(trial.stage)
        if rollout is None or longest is None or self._trials.now() - trial.since < longest:
            return trial
        reason = f"stage {rollout.stages[trial.stage]} has lasted {longest:g} seconds: {decision.reason}"
        if rollout.on_inconclusive == "pause":
            return self._change(trial, "pause", f"inconclusive: {reason}", decision, words.PAUSED)
        if self._told != (trial.stage, trial.since):
            self._told = trial.stage, trial.since
            emit("inconclusive", reason, trial, None, decision.verdict)
        return trial

    def _is_over(self, horizon: Horizon, trial: Trial, decision: Decision) -> bool:
        """Whether an undecided experiment has reached its horizon, and nobody was told yet."""
        now = self._trials.now()
        if self._asked or not horizon.may_be_reached(decision.units, trial.created, now):
            return False
        audit = self._trials.decisions(self.name)
        self._asked = has_asked(audit)
        return not self._asked and horizon.reached(decision.units, audit, now)

    def _decided(self, trial: Trial, what: str, serves: str, decision: Decision) -> Trial | None:
        declaration = replace(self._declaration(trial), serves=serves)
        return self._change(trial, what, decision.reason, decision, words.DECIDED, None, declaration)

    def _change(
        self,
        trial: Trial,
        what: str,
        reason: str,
        decision: Decision,
        state: str | None,
        stage: int | None = None,
        declaration: Declaration | None = None,
    ) -> Trial | None:
        evidence = json.dumps({"reason": reason, "decision": decision.to_dict()}, default=str)
        changed = self._trials.change(
            self.name, trial.revision, state=state, stage=stage,
            declaration=None if declaration is None else declaration.to_json(),
            decision=words.Decision(what, "controller", evidence),
        )  # fmt: skip
        if changed is not None:
            emit(what, reason, changed, None if declaration is None else declaration.serves, decision.verdict)
        return changed

    def _next_stage(self, trial: Trial, dropped: Sequence[str]) -> int | None:
        """The stage that follows, once this one has had its time and its units."""
        if self._rollout is None or trial.stage + 1 >= len(self._design.shares):
            return None
        if self._trials.now() - trial.since < self._rollout.least_time(trial.stage):
            return None
        if self._rollout.stages[trial.stage] == SHADOW:
            assert self._reading.pairs is not None
            pairs = [each for name, each in self._reading.pairs.counts.items() if name not in dropped]
            return trial.stage + 1 if all(each >= self._rollout.shadow_calls for each in pairs) else None
        units = [0] * len(self._design.variants)
        for arm in self._trials.counts(self.name):
            if arm.stage == trial.stage:
                units[self._design.variants.index(arm.arm)] += arm.units
        least = self._rollout.least_users(trial.stage)
        known = zip(self._design.variants[1:], units[1:], strict=True)
        return trial.stage + 1 if all(each >= least for name, each in known if name not in dropped) else None
