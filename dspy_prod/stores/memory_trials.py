"""What a memory store knows of experiments, for as long as its process lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.memory_trial import MemoryTrial, Room
from dspy_prod.stores.trial_posts import GRACE, Call, Exposure, Outcome, Underway
from dspy_prod.stores.trial_terms import (
    CREATED,
    PART,
    Arm,
    Checkpoint,
    Decision,
    Ended,
    Lease,
    Matured,
    Progress,
    Tally,
    Trial,
    Waiting,
    check_state,
    check_windows,
    lease_of,
)

MOST_UNITS: Final = 200_000
"""Units kept, of all experiments together: 60 MB, 130 MB with their calls. Newcomers beyond are served, and not counted
(`Tally.unkept`): a unit that were forgotten to make room would be counted twice when it returns."""
MOST_VALUES: Final = 400_000
"""Values of metrics kept, of all experiments together: 100 to 200 MB; further ones are not counted either."""


class MemoryTrials:
    """See `Trials`.

    Args:
        now: seconds since the epoch.
        most_units, most_values: how much is kept.
    """

    def __init__(self, now: Callable[[], float], most_units: int = MOST_UNITS, most_values: int = MOST_VALUES) -> None:
        self.now = now
        self._room = Room(most_units, most_values)
        self._kept: dict[str, MemoryTrial] = {}
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
                kept = self._kept[name] = MemoryTrial(trial, self._room)
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
                kept.decide(decision, now)
            return kept.trial

    def remove(self, name: str) -> None:
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is not None:
                kept.forget()

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure) -> None:
        now = self.now()
        with self._lock:
            kept = self._of(exposure)
            if kept is not None:
                kept.expose(exposure, now)

    def call(self, call: Call) -> None:
        with self._lock:
            kept = self._of(call)
            if kept is not None:
                kept.call(call)

    def outcome(self, outcome: Outcome) -> None:
        now = self.now()
        with self._lock:
            kept = self._of(outcome)
            if kept is not None:
                kept.outcome(outcome, now)

    def underway(self, underway: Underway) -> None:
        now = self.now()
        with self._lock:
            kept = self._of(underway)
            if kept is not None:
                kept.underway(underway, now)

    def _of(self, post: Exposure | Call | Outcome | Underway) -> MemoryTrial | None:
        """The experiment that something was posted of, if it is still that one."""
        kept = self._kept.get(post.trial)
        return kept if kept is not None and post.made in (None, kept.trial.created) else None

    def seen(self, name: str, unit: str) -> str | None:
        with self._lock:
            kept = self._kept.get(name)
            return None if kept is None else kept.seen(unit)

    # -- reading -----------------------------------------------------------------------------------------------------
    def counts(self, name: str) -> list[Arm]:
        with self._lock:
            kept = self._kept.get(name)
            return [] if kept is None else kept.arms()

    def ended(self, name: str) -> list[Ended]:
        with self._lock:
            kept = self._kept.get(name)
            return [] if kept is None else kept.ended()

    def tally(self, name: str) -> Tally:
        with self._lock:
            kept = self._kept.get(name)
            return Tally() if kept is None else _tally(kept)

    def matured(self, name: str, metric: str | None, after: int = 0, most: int = PART) -> list[Matured]:
        now = self.now()
        with self._lock:
            kept = self._kept.get(name)
            return [] if kept is None else kept.matured(metric, after, most, now)

    def exposed(self, name: str, after: int = 0, most: int = PART) -> list[Matured]:
        with self._lock:
            kept = self._kept.get(name)
            return [] if kept is None else kept.exposed(after, most)

    def waiting(self, name: str) -> dict[str | None, Waiting]:
        with self._lock:
            kept = self._kept.get(name)
            return {} if kept is None else kept.waiting()

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
            return self._leased(name, holder, seconds, now)

    def look(self, name: str, holder: str, seconds: float) -> tuple[Lease, Progress | None]:
        now = self.now()
        with self._lock:
            lease, kept = self._leased(lease_of(name), holder, seconds, now), self._kept.get(name)
            if lease.holder != holder or kept is None:
                return lease, None
            return lease, Progress(kept.trial, _tally(kept), 0 if kept.checkpoint is None else kept.checkpoint.revision)

    def _leased(self, name: str, holder: str, seconds: float, now: float) -> Lease:
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
            return 0 if kept is None else kept.decide(decision, now)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def _tally(kept: MemoryTrial) -> Tally:
    lost = kept.late, kept.stray, kept.unkept, kept.early, kept.unpriced, kept.repeated
    return Tally(len(kept.units), kept.mixed, *lost)
