"""What is posted of an experiment's units, see `trials`: exposures, calls, what became of them, calls that go on.

Each may say of which experiment it is: `made`, when that was created, as `Trial.created` tells it. A process that still
has one that was removed else told of its units in the next one of the same name.
"""

from __future__ import annotations

from typing import Final, NamedTuple

GRACE: Final = 60.0
"""Seconds after the end of a window for which what belongs into it may still arrive."""


class Exposure(NamedTuple):
    """A unit got an arm.

    Attributes:
        trial: the experiment's name. unit: the unit's.
        stage: the stage. arm: what it got.
        propensity: with which probability. 1: it was not left to chance, which tells nothing of the arms. Such a unit
            is not taken in; but one that chance had given another arm in this stage has seen two.
        at: when.
        full: which candidates took no new units, a bit for each; with the stage it tells the propensities of all arms.
        made: when the experiment was; where another one has the name, nothing is kept. None: of whichever there is.
    """

    trial: str
    unit: str
    stage: int
    arm: str
    propensity: float
    at: float
    full: int = 0
    made: float | None = None


class Once:
    """Whether a store has taken what was posted. Who was interrupted as he posted it does not know, and posts it again.

    Both come from one process, and nothing else is remembered of it.
    """

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = False


class Call(NamedTuple):
    """One call of the program for a unit, as a guardrail sees it.

    Attributes:
        trial: the experiment's name. unit: the unit's.
        at: when it began.
        failed: it raised. fell_back: it was answered by a fallback.
        list_nano: what it would have cost without caches, in nano-USD; None when that is not known.
        latency: seconds; None where it tells nothing (a cached answer).
        arm: what answered; a call of another arm than the unit's first one is none of its. None: of that arm.
        abandoned: whoever called left before it had ended.
        made: as of `Exposure`.
        once: however often it is posted with this, it is counted once. None: each time.
    """

    trial: str
    unit: str
    at: float
    failed: bool = False
    fell_back: bool = False
    list_nano: int | None = 0
    latency: float | None = None
    arm: str | None = None
    abandoned: bool = False
    made: float | None = None
    once: Once | None = None


class Outcome(NamedTuple):
    """What became of a unit, in one metric.

    Attributes:
        trial: the experiment's name. unit: the unit's. metric: the metric's.
        value: what was measured.
        at: when.
        id: what it is the value of (a call, a trace, an answer): said again under the same id it is a correction, and
            the last one before the unit is told holds; values of several ids are several. None: of the unit as a whole.
        made: as of `Exposure`.
    """

    trial: str
    unit: str
    metric: str
    value: float
    at: float
    id: str | None = None
    made: float | None = None


class Underway(NamedTuple):
    """A unit's call has not ended: nothing is told of the unit while that is said again, whatever its windows are.

    Attributes:
        trial: the experiment's name. unit: the unit's.
        at: when that was so.
        seconds: for which it is waited for from then on.
        made: as of `Exposure`.
    """

    trial: str
    unit: str
    at: float
    seconds: float = GRACE
    made: float | None = None


Thing = Exposure | Call | Outcome | Underway
"""What is posted."""


def taken(things: list[Thing]) -> list[Thing]:
    """Those that were not taken before; from now on all of them are. For one thread, which nobody interrupts."""
    found = []
    for thing in things:
        if type(thing) is Call and isinstance(thing.once, Once):
            if thing.once.taken:
                continue
            thing.once.taken = True
        found.append(thing)
    return found
