"""What every store keeps of experiments on live traffic (trials), see `base`.

A unit's first exposure is what counts: it has the next order number of its experiment, and the arm, propensity and
moment of it. What is known of the unit (calls, and one value or several of each metric) is gathered for a fixed window
from that moment on, and read when the window is over, in the order of exposure. What was read never changes: whatever
comes later is counted as late. So whoever reads it again, after a crash or in another process, reads the same.

Times are seconds since the epoch, as `Trials.now` tells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dspy_prod.stores.trial_posts import GRACE, Call, Exposure, Once, Outcome, Underway
from dspy_prod.stores.trial_terms import (
    CREATED,
    DECIDED,
    PART,
    PAUSED,
    RUNNING,
    STATES,
    STOPPED,
    Arm,
    Calls,
    Checkpoint,
    Decision,
    Ended,
    Lease,
    Matured,
    Progress,
    Tally,
    Trial,
    Values,
    Waiting,
)

__all__ = [
    "CREATED",
    "DECIDED",
    "GRACE",
    "PART",
    "PAUSED",
    "RUNNING",
    "STATES",
    "STOPPED",
    "Arm",
    "Call",
    "Calls",
    "Checkpoint",
    "Decision",
    "Ended",
    "Exposure",
    "Lease",
    "Matured",
    "Once",
    "Outcome",
    "Progress",
    "Tally",
    "Trial",
    "Trials",
    "Underway",
    "Values",
    "Waiting",
]


class Trials(Protocol):
    """What a store keeps of experiments. All methods are thread-safe.

    What is posted waits for nothing, and is lost with a process that is killed within the moment (25 ms, or what the
    file is behind) before it is written, as records are; it is never counted twice. Everything else is durable on
    return, and raises `StoreUnavailableError` where that cannot be had.
    """

    def now(self) -> float:
        """Seconds since the epoch, the same for all who share the store."""
        ...

    # -- experiments -------------------------------------------------------------------------------------------------
    def create(self, name: str, declaration: str, windows: Mapping[str | None, float], grace: float = GRACE) -> Trial:
        """The experiment of this name, made if there is none; else as it is, whatever is said here."""
        ...

    def trial(self, name: str) -> Trial | None:
        """One experiment."""
        ...

    def trials(self) -> list[Trial]:
        """All of them, by name."""
        ...

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
        """Change an experiment that still has this revision, and add a line to its audit in the same step.

        None, and nothing done, where somebody else changed it meanwhile, or there is none.
        """
        ...

    def remove(self, name: str) -> None:
        """Forget an experiment, with everything known of it."""
        ...

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure) -> None:
        """A unit got an arm: the first time counts. Posted.

        Nothing is kept of an experiment that is not there, or that is another one than it says (`made`); so with the
        three below. A unit whose exposure was lost with
        its process is exposed when it comes again, to the same arm.
        """
        ...

    def call(self, call: Call) -> None:
        """A unit's call has ended. Posted, after the exposure, once for each call; who is interrupted as he posts it
        posts the same again, with the same `Call.once`."""
        ...

    def outcome(self, outcome: Outcome) -> None:
        """What became of a unit. Posted."""
        ...

    def underway(self, underway: Underway) -> None:
        """A unit's call goes on: the unit is waited for. Posted, after the exposure.

        A call that was lost with its process is waited for no longer than was said last.
        """
        ...

    def seen(self, name: str, unit: str) -> str | None:
        """The arm in which a unit was seen last."""
        ...

    # -- reading -----------------------------------------------------------------------------------------------------
    def counts(self, name: str) -> list[Arm]:
        """Units by stage and arm; as quick for a million of them as for one."""
        ...

    def ended(self, name: str) -> list[Ended]:
        """How all calls of units ended, by what answered them; as quick. Calls of no known arm are in none."""
        ...

    def tally(self, name: str) -> Tally:
        """How many units there are, and what could not be used; as quick."""
        ...

    def matured(self, name: str, metric: str | None, after: int = 0, most: int = PART) -> list[Matured]:
        """Units whose window is over, in the order of exposure, from the one after number `after`.

        A unit is told when all before it are, since a faster arm would else be told first: a slow one holds up those
        behind it, for its window and the grace at most, or as long as its call is under way; also one whose moment a
        clock that was ahead has told, once somebody behind it is over. What is told is final. The last number told is
        the next `after`.

        Args:
            metric: whose window and values; None: calls.
            most: how many to tell; ask again for more.

        Raises:
            ValueError: no window was declared for the metric.
        """
        ...

    def exposed(self, name: str, after: int = 0, most: int = PART) -> list[Matured]:
        """Units in the order of exposure, from the one after number `after`, with nothing of what became of them."""
        ...

    def waiting(self, name: str) -> dict[str | None, Waiting]:
        """Units that are still waited for, by metric (None: calls); as quick for a million of them as for one."""
        ...

    # -- the controller ----------------------------------------------------------------------------------------------
    def checkpoint(self, name: str) -> Checkpoint | None:
        """What was saved last."""
        ...

    def save(self, name: str, state: str, revision: int) -> bool:
        """Save in the place of that revision (0: of none); False, and nothing done, where there is another one."""
        ...

    def lease(self, name: str, holder: str, seconds: float) -> Lease:
        """Take a lease that is free, over, one's own, or of a process that has ended; the one that is in force now.

        Args:
            name: of what. holder: tells who asks from all others, also of the same process.
        """
        ...

    def look(self, name: str, holder: str, seconds: float) -> tuple[Lease, Progress | None]:
        """`lease` what only one of those who look at an experiment has (`lease_of`), and see how far the experiment is,
        with everything that was posted before; None where another one has the lease, or there is no experiment."""
        ...

    def release(self, name: str, holder: str) -> None:
        """Give one's lease back. Posted: who asks for it through the same store gets it at once."""
        ...

    def decisions(self, name: str) -> list[Decision]:
        """The audit, oldest first."""
        ...

    def decide(self, name: str, decision: Decision) -> int:
        """Add a line to the audit of an experiment; its number, 0 where there is no such experiment."""
        ...
