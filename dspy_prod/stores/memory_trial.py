"""What a memory store knows of one experiment: its units, in the order of exposure. Not thread-safe."""

from __future__ import annotations

from math import isfinite
from typing import Final

from dspy_prod.stores.trial_posts import Call, Exposure, Outcome, Underway
from dspy_prod.stores.trial_terms import (
    Arm,
    Calls,
    Checkpoint,
    Decision,
    Ended,
    Matured,
    Trial,
    Values,
    Waiting,
    is_early,
    ready_before,
)

_NO_CALLS: Final = Calls()
_MOST_UNDERWAY: Final = 10_000
"""Units whose calls go on that are waited for longer than others."""


class Room:
    """How much more a store keeps, of all its experiments together."""

    def __init__(self, units: int, values: int) -> None:
        self.units = units
        self.values = values


class Unit:
    """A unit, from its first exposure on.

    Attributes:
        mixed: it saw two arms within one stage. left_out: that was known before anything of it was read.
        later: its arms in later stages.
        values: (value, at) by metric and id.
    """

    __slots__ = (
        *("arm", "at", "calls", "first_call", "full", "later", "left_out", "mixed", "name", "propensity", "stage"),
        "values",
    )

    def __init__(self, exposure: Exposure, at: float) -> None:
        self.name, self.stage, self.arm = exposure.unit, exposure.stage, exposure.arm
        self.propensity, self.full, self.at = exposure.propensity, exposure.full, at
        self.mixed = self.left_out = False
        self.later: dict[int, tuple[str, int]] | None = None
        self.calls = self.first_call = _NO_CALLS
        self.values: dict[str, dict[str | None, tuple[float, float]]] | None = None

    def known(self, stage: int) -> tuple[str | None, int]:
        """Its arm in a stage, and the candidates that were full then; None where it was not seen in that stage."""
        if stage == self.stage:
            return self.arm, self.full
        return (None, 0) if self.later is None else self.later.get(stage, (None, 0))

    def has_been_in(self, arm: str) -> bool:
        """Whether it was seen in an arm; the second one within a stage is no other arm, but a mistake."""
        return arm == self.arm or arm in [each for each, _ in (self.later or {}).values()]

    def valued(self, metric: str) -> dict[str | None, tuple[float, float]]:
        """(value, at) of a metric by id."""
        return {} if self.values is None else self.values.get(metric, {})


class MemoryTrial:
    """One experiment.

    Args:
        room: shared with the others of the store.

    Attributes:
        units: in the order of exposure; `numbers` tells the place of each, from 1.
        sums: [units, first, mixed, entered] by stage, arm and `full`.
        read: for each metric (None: calls), up to which number it was told.
        calling: until when units are waited for whose calls go on, by number.
        endings: how calls ended, by arm.
        values: how many there are.
    """

    def __init__(self, trial: Trial, room: Room) -> None:
        self.trial = trial
        self.units: list[Unit] = []
        self.numbers: dict[str, int] = {}
        self.sums: dict[tuple[int, str, int], list[int]] = {}
        self.read: dict[str | None, int] = {}
        self.calling: dict[int, float] = {}
        self.mixed = self.late = self.stray = self.unkept = self.early = self.unpriced = self.repeated = 0
        self.values = 0
        self.endings: dict[str, Ended] = {}
        self.checkpoint: Checkpoint | None = None
        self.decisions: list[Decision] = []
        self._room = room

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure, now: float) -> None:
        """See `Trials.expose`."""
        number, chance = self.numbers.get(exposure.unit), exposure.propensity < 1
        if number is None:
            if chance:
                self._add(exposure, min(exposure.at, now))
            return
        unit, stage = self.units[number - 1], exposure.stage
        arm, full = unit.known(stage)
        if arm is None and chance:
            sums = self._sums(stage, exposure.arm, exposure.full)
            sums[0] += 1
            sums[3] += not unit.has_been_in(exposure.arm)
            unit.later = {**(unit.later or {}), stage: (exposure.arm, exposure.full)}
        elif arm is not None and arm != exposure.arm and not unit.mixed:
            unit.mixed = True
            unit.left_out = number > max(self.read.values(), default=0)
            self.mixed += 1
            self._sums(stage, arm, full)[2] += 1

    def _add(self, exposure: Exposure, at: float) -> None:
        if self._room.units <= 0:
            self.unkept += 1
            return
        self._room.units -= 1
        self.units.append(Unit(exposure, at))
        self.numbers[exposure.unit] = len(self.units)
        sums = self._sums(exposure.stage, exposure.arm, exposure.full)
        sums[0] += 1
        sums[1] += 1

    def _sums(self, stage: int, arm: str, full: int) -> list[int]:
        return self.sums.setdefault((stage, arm, full), [0, 0, 0, 0])

    def call(self, call: Call) -> None:
        """See `Trials.call`."""
        number, window = self.numbers.get(call.unit), self.trial.windows.get(None)
        if number is None or window is None:
            return
        unit = self.units[number - 1]
        if call.once is None:
            self._call(call, number, unit, window)
            return
        if call.once.taken:
            return
        counted = self.late, self.repeated, self.unpriced, unit.calls, unit.first_call
        endings = self.endings
        try:
            self.endings = dict(endings)
            self._call(call, number, unit, window)
            call.once.taken = True
        except BaseException:  # interrupted: it is posted again
            if not call.once.taken:
                self.late, self.repeated, self.unpriced, unit.calls, unit.first_call = counted
                self.endings = endings
            raise

    def _call(self, call: Call, number: int, unit: Unit, window: float) -> None:
        read = self.read.get(None, 0)
        if call.arm is not None:
            _, *sums = self.endings.get(call.arm, Ended(call.arm))
            ends = 1, call.failed, call.fell_back, call.abandoned
            self.endings[call.arm] = Ended(call.arm, *map(sum, zip(sums, ends, strict=True)))
        if self.trial.repeats(call, unit.arm, unit.at, window, bool(unit.calls.calls)):
            self.repeated += 1
            return
        if not self.trial.takes(number, read, unit.at, call.at, window, bool(unit.calls.calls)):
            self.late += 1
            return
        one = Calls.of(call)
        if not unit.calls.calls:
            unit.first_call = one
        unit.calls = unit.calls.plus(one)
        self.unpriced += one.unpriced

    def underway(self, underway: Underway, now: float) -> None:
        """See `Trials.underway`."""
        number = self.numbers.get(underway.unit)
        if len(self.calling) >= _MOST_UNDERWAY:
            self.calling = {each: until for each, until in self.calling.items() if until > now}
        if number is not None and (number in self.calling or len(self.calling) < _MOST_UNDERWAY):
            until = min(underway.at, now) + underway.seconds
            self.calling[number] = max(until, self.calling.get(number, until))

    def outcome(self, outcome: Outcome, now: float) -> None:
        """See `Trials.outcome`."""
        number, window = self.numbers.get(outcome.unit), self.trial.windows.get(outcome.metric)
        if number is None or window is None or not isfinite(outcome.value):
            self.stray += 1
            return
        unit, read = self.units[number - 1], self.read.get(outcome.metric, 0)
        values = unit.valued(outcome.metric)
        fresh = outcome.id not in values
        has = bool(values) and (fresh or outcome.id is None)
        if not self.trial.takes(number, read, unit.at, outcome.at, window, has):
            self.late += 1
        elif is_early(outcome.at, unit.at, now):
            self.early += 1
        elif fresh and self._room.values <= 0:
            self.unkept += 1
        else:
            self._room.values -= fresh
            self.values += fresh
            values[outcome.id] = (outcome.value, outcome.at)
            unit.values = unit.values or {}
            unit.values[outcome.metric] = values

    def forget(self) -> None:
        """Give back the room it had."""
        self._room.units += len(self.units)
        self._room.values += self.values

    # -- reading -----------------------------------------------------------------------------------------------------
    def seen(self, name: str) -> str | None:
        """See `Trials.seen`."""
        number = self.numbers.get(name)
        if number is None:
            return None
        unit = self.units[number - 1]
        return unit.later[max(unit.later)][0] if unit.later else unit.arm

    def arms(self) -> list[Arm]:
        """See `Trials.counts`."""
        return [Arm(*key, *sums) for key, sums in sorted(self.sums.items())]

    def ended(self) -> list[Ended]:
        """See `Trials.ended`."""
        return sorted(self.endings.values())

    def matured(self, metric: str | None, after: int, most: int, now: float) -> list[Matured]:
        """See `Trials.matured`."""
        read = self.read[metric] = self._ready(metric, now, most)
        units = self.units[after : min(read, after + most)]
        return [_matured(number, unit, metric) for number, unit in enumerate(units, after + 1)]

    def exposed(self, after: int, most: int) -> list[Matured]:
        """See `Trials.exposed`."""
        return [_exposed(number, unit) for number, unit in enumerate(self.units[after : after + most], after + 1)]

    def waiting(self) -> dict[str | None, Waiting]:
        """See `Trials.waiting`."""
        return {metric: self._waiting(metric, window) for metric, window in self.trial.windows.items()}

    def _waiting(self, metric: str | None, window: float) -> Waiting:
        read = self.read.get(metric, 0)
        if read >= len(self.units):
            return Waiting()
        until = max(self.units[read].at + window + self.trial.grace, self.calling.get(read + 1, 0.0))
        return Waiting(len(self.units) - read, until)

    def _ready(self, metric: str | None, now: float, most: int) -> int:
        """Up to which number nothing need be waited for."""
        window, grace = self.trial.window(metric), self.trial.grace
        before = ready_before(now, window, grace)
        number = self.read.get(metric, 0)
        over: int | None = None  # the last unit that is
        for unit in self.units[number : number + most]:
            told = unit.calls.calls if metric is None else unit.valued(metric)
            calling = self.calling.get(number + 1, now) > now
            if (calling or unit.at > before) and not (window == 0 and told):
                if calling or unit.at <= now + grace:
                    break
                # Stamped by a clock that was wrong: it was exposed before those after it, and is over when one is.
                if over is None:
                    over = next(
                        (last for last in range(len(self.units), 0, -1) if self.units[last - 1].at <= before), 0
                    )
                if number + 1 > over:
                    break
            number += 1
        return number

    # -- the audit ---------------------------------------------------------------------------------------------------
    def decide(self, decision: Decision, now: float) -> int:
        """See `Trials.decide`."""
        self.decisions.append(decision._replace(at=now, number=len(self.decisions) + 1))
        return len(self.decisions)


def _matured(number: int, unit: Unit, metric: str | None) -> Matured:
    found = _exposed(number, unit)
    if metric is None:
        return found._replace(calls=unit.calls, first_call=unit.first_call)
    values = unit.valued(metric)
    return found._replace(values=Values.of(values.values())) if values else found


def _exposed(number: int, unit: Unit) -> Matured:
    return Matured(number, unit.name, unit.stage, unit.arm, unit.propensity, unit.at, unit.full, unit.left_out)
