"""What a memory store knows of experiments, for as long as its process lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Final

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.trial_terms import (
    CREATED,
    GRACE,
    Arm,
    Call,
    Calls,
    Checkpoint,
    Decision,
    Exposure,
    Lease,
    Matured,
    Outcome,
    Tally,
    Trial,
    Values,
    check_state,
    check_windows,
    ready_before,
)

MOST_UNITS: Final = 200_000
"""Units kept, of all experiments together, about 100 MB; newcomers beyond are served and not counted (`unkept`)."""
MOST_VALUES: Final = 1_000_000
"""Values of metrics kept, of all experiments together, about 200 MB; further ones are not counted either."""


_NO_CALLS: Final = Calls()


class _Unit:
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
        self.later: dict[int, tuple[str, int]] = {}
        self.calls = self.first_call = _NO_CALLS
        self.values: dict[str, dict[str | None, tuple[float, float]]] = {}


class _Kept:
    """One experiment.

    Attributes:
        units: in the order of exposure; `numbers` tells the place of each, from 1.
        arms: [units, first, mixed] by stage, arm and `full`.
        read: for each metric (None: calls), up to which number it was told.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.units: list[_Unit] = []
        self.numbers: dict[str, int] = {}
        self.arms: dict[tuple[int, str, int], list[int]] = {}
        self.read: dict[str | None, int] = {}
        self.mixed = self.late = self.stray = self.unkept = self.values = 0
        self.checkpoint: Checkpoint | None = None
        self.decisions: list[Decision] = []

    def arm(self, stage: int, arm: str, full: int) -> list[int]:
        return self.arms.setdefault((stage, arm, full), [0, 0, 0])

    def add_decision(self, decision: Decision, now: float) -> int:
        self.decisions.append(decision._replace(at=now, number=len(self.decisions) + 1))
        return len(self.decisions)


class MemoryTrials:
    """See `Trials`.

    Args:
        now: seconds since the epoch.
        most_units, most_values: how much is kept.
    """

    def __init__(self, now: Callable[[], float], most_units: int = MOST_UNITS, most_values: int = MOST_VALUES) -> None:
        self.now = now
        self._most_units = most_units
        self._most_values = most_values
        self._kept: dict[str, _Kept] = {}
        self._units = self._values = 0
        self._leases: dict[str, Lease] = {}
        self._after_fork()
        reset_after_fork(self)

    # -- experiments -------------------------------------------------------------------------------------------------
    def create(self, name: str, declaration: str, windows: Mapping[str | None, float], grace: float = GRACE) -> Trial:
        check_windows(windows, grace)
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                trial = Trial(name, declaration, dict(windows), grace, CREATED, 0, now, 1, now)
                kept = self._kept[name] = _Kept(trial)
            return kept.trial

    def trial(self, name: str) -> Trial | None:
        with self._lock:
            kept = self._kept.get(name)
            return None if kept is None else kept.trial

    def trials(self) -> list[Trial]:
        with self._lock:
            return [kept.trial for _, kept in sorted(self._kept.items())]

    def change(
        self,
        name: str,
        revision: int,
        *,
        state: str | None = None,
        stage: int | None = None,
        declaration: str | None = None,
        decision: Decision | None = None,
    ) -> Trial | None:
        check_state(state)
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or kept.trial.revision != revision:
                return None
            kept.trial = kept.trial.changed(now, state, stage, declaration)
            if decision is not None:
                kept.add_decision(decision, now)
            return kept.trial

    def remove(self, name: str) -> None:
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is not None:
                self._units -= len(kept.units)
                self._values -= kept.values

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure) -> None:
        now = self.now()
        with self._lock:
            kept = self._kept.get(exposure.trial)
            if kept is None:
                return
            number, chance = kept.numbers.get(exposure.unit), exposure.propensity < 1
            if number is None:
                if chance:
                    self._add(kept, exposure, min(exposure.at, now))
                return
            unit, stage = kept.units[number - 1], exposure.stage
            arm, full = (unit.arm, unit.full) if stage == unit.stage else unit.later.get(stage, (None, 0))
            if arm is None and chance:
                unit.later[stage] = (exposure.arm, exposure.full)
                kept.arm(stage, exposure.arm, exposure.full)[0] += 1
            elif arm is not None and arm != exposure.arm and not unit.mixed:
                unit.mixed = True
                unit.left_out = number > max(kept.read.values(), default=0)
                kept.mixed += 1
                kept.arm(stage, arm, full)[2] += 1

    def _add(self, kept: _Kept, exposure: Exposure, at: float) -> None:
        if self._units >= self._most_units:
            kept.unkept += 1
            return
        self._units += 1
        kept.units.append(_Unit(exposure, at))
        kept.numbers[exposure.unit] = len(kept.units)
        arm = kept.arm(exposure.stage, exposure.arm, exposure.full)
        arm[0] += 1
        arm[1] += 1

    def call(self, call: Call) -> None:
        with self._lock:
            kept = self._kept.get(call.trial)
            if kept is None:
                return
            number, window = kept.numbers.get(call.unit), kept.trial.windows.get(None)
            if number is None or window is None:
                kept.stray += 1
                return
            unit = kept.units[number - 1]
            if not kept.trial.takes(number, kept.read.get(None, 0), unit.at, call.at, window, bool(unit.calls.calls)):
                kept.late += 1
                return
            one = Calls.of(call)
            if not unit.calls.calls:
                unit.first_call = one
            unit.calls = unit.calls.plus(one)

    def outcome(self, outcome: Outcome) -> None:
        with self._lock:
            kept = self._kept.get(outcome.trial)
            if kept is None:
                return
            number, window = kept.numbers.get(outcome.unit), kept.trial.windows.get(outcome.metric)
            if number is None or window is None or not isfinite(outcome.value):
                kept.stray += 1
                return
            unit, read = kept.units[number - 1], kept.read.get(outcome.metric, 0)
            values = unit.values.setdefault(outcome.metric, {})
            if not kept.trial.takes(number, read, unit.at, outcome.at, window, bool(values)):
                kept.late += 1
            elif outcome.id not in values and self._values >= self._most_values:
                kept.unkept += 1
            else:
                fresh = outcome.id not in values
                self._values += fresh
                kept.values += fresh
                values[outcome.id] = (outcome.value, outcome.at)

    def seen(self, name: str, unit: str) -> str | None:
        with self._lock:
            kept = self._kept.get(name)
            number = None if kept is None else kept.numbers.get(unit)
            if kept is None or number is None:
                return None
            one = kept.units[number - 1]
            return one.later[max(one.later)][0] if one.later else one.arm

    # -- reading -----------------------------------------------------------------------------------------------------
    def counts(self, name: str) -> list[Arm]:
        with self._lock:
            kept = self._kept.get(name)
            arms = {} if kept is None else {key: tuple(sums) for key, sums in kept.arms.items()}
        return [Arm(*key, *sums) for key, sums in sorted(arms.items())]

    def tally(self, name: str) -> Tally:
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return Tally()
            return Tally(len(kept.units), kept.mixed, kept.late, kept.stray, kept.unkept)

    def matured(self, name: str, metric: str | None, after: int = 0, most: int = 5_000) -> list[Matured]:
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return []
            read = kept.read[metric] = self._ready(kept, metric, now, most)
            return [
                _matured(number, unit, metric)
                for number, unit in enumerate(kept.units[after : min(read, after + most)], after + 1)
            ]

    def _ready(self, kept: _Kept, metric: str | None, now: float, most: int) -> int:
        """Up to which number nothing need be waited for."""
        window = kept.trial.window(metric)
        before = ready_before(now, window, kept.trial.grace)
        number = kept.read.get(metric, 0)
        for unit in kept.units[number : number + most]:
            told = unit.calls.calls if metric is None else unit.values.get(metric)
            if unit.at > before and not (window == 0 and told):
                break
            number += 1
        return number

    # -- the controller ----------------------------------------------------------------------------------------------
    def checkpoint(self, name: str) -> Checkpoint | None:
        with self._lock:
            kept = self._kept.get(name)
            return None if kept is None else kept.checkpoint

    def save(self, name: str, state: str, revision: int) -> bool:
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or (0 if kept.checkpoint is None else kept.checkpoint.revision) != revision:
                return False
            kept.checkpoint = Checkpoint(state, revision + 1, now)
            return True

    def lease(self, name: str, holder: str, seconds: float) -> Lease:
        now = self.now()
        with self._lock:
            held = self._leases.get(name)
            if held is None or held.until <= now or held.holder == holder:
                held = self._leases[name] = Lease(holder, now + seconds)
            return held

    def release(self, name: str, holder: str) -> None:
        with self._lock:
            held = self._leases.get(name)
            if held is not None and held.holder == holder:
                del self._leases[name]

    def decisions(self, name: str) -> list[Decision]:
        with self._lock:
            kept = self._kept.get(name)
            return [] if kept is None else list(kept.decisions)

    def decide(self, name: str, decision: Decision) -> int:
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            return 0 if kept is None else kept.add_decision(decision, now)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def _matured(number: int, unit: _Unit, metric: str | None) -> Matured:
    head = (number, unit.name, unit.stage, unit.arm, unit.propensity, unit.at, unit.full, unit.left_out)
    if metric is None:
        return Matured(*head, calls=unit.calls, first_call=unit.first_call)
    values = unit.values.get(metric)
    return Matured(*head) if not values else Matured(*head, values=Values.of(values.values()))
