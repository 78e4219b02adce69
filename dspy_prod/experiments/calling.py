"""A call of an `Experiment`: which variant answers, and what is left to be done once it has."""

from __future__ import annotations

import logging
from typing import Any

from dspy_prod.context.assignments import Assignment as Place
from dspy_prod.context.current import CallContext, current
from dspy_prod.context.scoring import is_raising
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.assignment import ELSEWHERE, HASH, KEPT, Assignment
from dspy_prod.experiments.inside import Inside
from dspy_prod.experiments.opened import stage_of
from dspy_prod.experiments.operating import put
from dspy_prod.experiments.turn import Turn
from dspy_prod.privacy.redactor import claimed
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.trials import RUNNING

_log = logging.getLogger("dspy_prod")


class Calling(Inside):
    """The part of an `Experiment` that answers calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the caller's variant; called through `exp(...)`."""
        turn = self._turn()
        try:
            with turn:
                return turn.answered(turn.variant.program(*args, **kwargs))
        finally:
            self._after(turn, args, kwargs)

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        """Asynchronous `forward`; called through `await exp.acall(...)`."""
        turn = self._turn()
        try:
            with turn:
                return turn.answered(await turn.variant.program.acall(*args, **kwargs))
        finally:
            self._after(turn, args, kwargs)

    def assign(self, unit: str) -> str:
        """The variant of a unit, as it is now. It counts as no exposure.

        Raises:
            ConfigError: the unit is no text.
        """
        if not isinstance(unit, str):
            raise ConfigError(f"Experiment({self.name!r}).assign: unit={unit!r} must be text, as str({unit!r})")
        serves = self._serves()
        if serves is not None:
            return serves
        return self._assigned(claimed(unit))

    def _assigned(self, unit: str) -> str:
        """The variant of a unit as contexts have it, without an exposure."""
        exposing = self._works.exposing
        variant = self._works.design.assign(
            unit, exposing.stage, exposing.full, lambda: self._works.trials.seen(self.name, unit)
        ).variant
        return self._control if variant in self._works.standing.dropped else variant

    def _turn(self) -> Turn:
        outer, control = current(), self._control
        if is_raising():
            return Turn(self.variants[control], None, None, outer)
        unit: str | None = getattr(outer, self._unit)
        serves = self._serves()
        if unit is None or serves is not None:
            return Turn(self.variants[serves or control], Place(self.name, serves or control, unit=unit), None, outer)
        if outer.aside:
            return self._unseen(unit, outer)
        try:
            got = self._works.exposing(unit)
        except Exception as error:  # of `assign=`: whoever calls has no part in it
            _log.error("Experiment(%r): %r gets control, for assign= failed", self.name, unit, exc_info=error)
            return Turn(self.variants[control], Place(self.name, control, unit=unit), None, outer)
        if got.variant in self._works.standing.dropped:
            return Turn(self.variants[control], Place(self.name, control, unit=unit), None, outer)
        place = Place(self.name, got.variant, stage_of(self.rollout, got.stage), unit, got.propensity)
        works = self._works
        return Turn(
            self.variants[got.variant], place, works.trials if self._counts(got) else None, outer, works.flights,
            works.exposing.made,
        )  # fmt: skip

    def _unseen(self, unit: str, outer: CallContext) -> Turn:
        """A call whose answer nobody sees, as of the shadow stage of an experiment around this one: the unit has its
        variant, and is not exposed by it."""
        try:
            variant = self._assigned(unit)
        except Exception as error:  # of `assign=`, or of a store that is away
            _log.debug("Experiment(%r): %r gets control unseen", self.name, unit, exc_info=error)
            variant = self._control
        return Turn(self.variants[variant], Place(self.name, variant, unit=unit), None, outer)

    def _counts(self, got: Assignment) -> bool:
        """Whether a call counts for its unit: it is exposed now, or may have been before its candidate was full."""
        return got.random or got.how == KEPT or (self._calls_last and got.full != 0 and got.how in (HASH, ELSEWHERE))

    def _after(self, turn: Turn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have an answer judged, perhaps; and in a shadow stage, have the candidates asked once more, unseen.

        A call that its caller left, or that was interrupted as it ended, has none. What is left to be done for it the
        reaper does: nothing interrupts its thread, and it has none of the locks that a collected call's may have.
        """
        if turn.abandoned or not turn.over:
            REAPER.post(lambda: self._leave(turn))
            return
        shadow, judges, counted = self._works.shadow, self._works.judges, turn.counted
        self._see(counted)
        if counted is not None and turn.unpriced:
            self._cannot_compare_costs(turn)
        if judges is not None and counted is not None and not turn.failed:
            judges.offer(*counted, args, kwargs, turn.prediction)
        if shadow is not None and turn.shadowed:
            shadow.offer(args, kwargs, turn.outcome, current())

    def _leave(self, turn: Turn) -> None:
        turn.end()
        self._see(turn.counted)

    def _see(self, counted: tuple[str, float, str | None] | None) -> None:
        if counted is not None and counted[2] is not None:
            self._works.traced.see(counted[2], counted[0])

    def _cannot_compare_costs(self, turn: Turn) -> None:
        """Pause it: calls that nobody knows the price of would count as free, and no harm would ever be seen."""
        works, trial = self._works, self._works.standing.trial
        running = trial is not None and trial.state == RUNNING
        if works.unpriced or not running or not any(metric.name == "cost" for metric in self.metrics):
            return
        works.unpriced.append(turn.variant.name)
        reason = (
            f"costs cannot be compared: a call of {turn.variant.name} has no known price. Give its LM prices=, or "
            "leave the guardrail cost out (guardrails=)"
        )
        _log.warning("Experiment(%r) pauses: %s", self.name, reason)

        def pause() -> None:
            try:
                put(works.trials, self.name, "pause", reason, "dspy_prod")
                works.standing.look()
            except StoreUnavailableError as error:
                _log.warning("Experiment(%r) pauses with another call, for its store is away: %s", self.name, error)
            finally:
                works.unpriced.clear()  # should it be resumed unmended, it pauses again

        if begin("dspy_prod-experiment", pause) is None:  # no call waits for the store
            works.unpriced.clear()

    def _serves(self) -> str | None:
        """The variant that everybody gets now; None: units are assigned."""
        self._works.standing.keep_up()
        if self._attending is not None:
            self._attending.keep_going()
        return self._works.standing.serves
