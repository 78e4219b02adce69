"""The words of experiments on live traffic (trials), and the rules that all stores share, see `trials`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import fsum, isfinite
from operator import itemgetter
from typing import Final, NamedTuple

from dspy_prod.stores.trial_posts import Call

CREATED: Final = "created"
RUNNING: Final = "running"
PAUSED: Final = "paused"
STOPPED: Final = "stopped"
DECIDED: Final = "decided"
STATES: Final = (CREATED, RUNNING, PAUSED, STOPPED, DECIDED)

PART: Final = 5_000
"""Units that are told at once."""

MOST_NANO: Final = 10**15
"""What one call counts for at most, in nano-USD: a million dollars."""

EARLY: Final = 5.0
"""Seconds by which the clocks of processes may differ: an outcome may be dated so much before its unit's exposure."""

LONGEST: Final = 1e9
"""Seconds that a call takes at most; a latency beyond, or below 0, is none."""

_MOMENT: Final = itemgetter(1, 0)


class Trial(NamedTuple):
    """An experiment as the store has it.

    Attributes:
        name: its name.
        declaration: what it is, as JSON; the store does not look into it.
        windows: for each metric the seconds from the first exposure that count; 0: the first value alone counts, as it
            is corrected under its id in time, and the unit is ready as soon as it is there. The window of calls has the
            name None.
        grace: seconds after a window for which it is waited for what belongs into it; a unit of which nothing has come
            by then counts as one without a value.
        state: one of `STATES`.
        stage: the stage of the rollout, from 0.
        since: when state or stage changed last.
        revision: grows with every change.
        created: when it was made.
    """

    name: str
    declaration: str
    windows: Mapping[str | None, float]
    grace: float
    state: str
    stage: int
    since: float
    revision: int
    created: float

    def window(self, metric: str | None) -> float:
        """Seconds of a metric's window (None: of calls).

        Raises:
            ValueError: it has none.
        """
        if metric not in self.windows:
            declared = ", ".join(map(repr, self.windows)) or "none"
            raise ValueError(f"The experiment {self.name!r} has no window for {metric!r}; it has: {declared}")
        return self.windows[metric]

    def takes(self, number: int, read: int, exposed_at: float, at: float, window: float, has: bool) -> bool:
        """Whether something that happened at `at` counts for the unit of this number.

        Args:
            read: the number up to which units were told already.
            has: there is something of the kind, which this does not correct.
        """
        return number > read and (at <= exposed_at + window if window else not has)

    def repeats(self, call: Call, arm: str, exposed_at: float, window: float, has: bool) -> bool:
        """Whether a call is none of what counts of a unit of this first arm, so that it cannot be late."""
        return call.arm not in (None, arm) or (call.at > exposed_at + window if window else has)

    def changed(self, now: float, state: str | None, stage: int | None, declaration: str | None) -> Trial:
        """The same after a change; None leaves a part as it is."""
        new = self._replace(
            state=self.state if state is None else state,
            stage=self.stage if stage is None else stage,
            declaration=self.declaration if declaration is None else declaration,
            revision=self.revision + 1,
        )
        return new if (new.state, new.stage) == (self.state, self.stage) else new._replace(since=now)


class Calls(NamedTuple):
    """Sums of calls: how many, how many of them failed or fell back, nano-USD at list price, the seconds of the `timed`
    ones, and of how many the price is not known, which are in none of the nano-USD."""

    calls: int = 0
    failed: int = 0
    fell_back: int = 0
    list_nano: int = 0
    timed: int = 0
    latency: float = 0.0
    unpriced: int = 0

    @classmethod
    def of(cls, call: Call) -> Calls:
        """The sums of one call."""
        timed = call.latency is not None and 0 <= call.latency <= LONGEST
        latency = call.latency if timed and call.latency is not None else 0.0
        nano = max(0, min(call.list_nano or 0, MOST_NANO))
        return cls(1, int(call.failed), int(call.fell_back), nano, int(timed), latency, int(call.list_nano is None))

    def plus(self, more: Calls) -> Calls:
        """Both together."""
        return Calls(
            self.calls + more.calls,
            self.failed + more.failed,
            self.fell_back + more.fell_back,
            self.list_nano + more.list_nano,
            self.timed + more.timed,
            self.latency + more.latency,
            self.unpriced + more.unpriced,
        )


class Values(NamedTuple):
    """The values of one metric of a unit: how many, their sum, the first and the last of them in time, and when the
    first one was."""

    size: int = 0
    total: float = 0.0
    first: float = 0.0
    last: float = 0.0
    at: float = 0.0

    @classmethod
    def of(cls, values: Iterable[tuple[float, float]]) -> Values:
        """Of (value, moment)."""
        told = sorted(values, key=_MOMENT)
        numbers = [value for value, _ in told]
        return cls(len(numbers), fsum(numbers), numbers[0], numbers[-1], told[0][1]) if numbers else cls()

    @property
    def mean(self) -> float | None:
        """None where there is none."""
        return self.total / self.size if self.size else None


class Matured(NamedTuple):
    """A unit whose window is over.

    Attributes:
        number: its place in the order of exposure, from 1.
        unit, stage, arm, propensity, at, full: of its first exposure.
        mixed: it saw two arms within one stage, and is to be left out.
        calls: all its calls within the window. first_call: the first of them alone. Both empty unless calls were read.
        values: those of the metric that was read.
    """

    number: int
    unit: str
    stage: int
    arm: str
    propensity: float
    at: float
    full: int
    mixed: bool
    calls: Calls = Calls()
    first_call: Calls = Calls()
    values: Values = Values()


class Arm(NamedTuple):
    """How many units got an arm in a stage, while these candidates took no new ones.

    Attributes:
        stage, arm, full: which.
        units: units seen. first: those of them that had not been exposed in an earlier stage.
        mixed: those of them that also saw another arm in this stage; they are counted where they were first.
        entered: units that had been in another arm, and came into this one here.
    """

    stage: int
    arm: str
    full: int
    units: int
    first: int
    mixed: int
    entered: int = 0


class Tally(NamedTuple):
    """What an experiment has, and what it could not use.

    Attributes:
        units: order numbers given, which is the number of units exposed.
        mixed: units that saw two arms within one stage.
        late: calls and values that came after their window was read, and values of after their window.
        stray: values of units without an exposure, and of metrics that were not declared. Calls of such units are no
            mistake: once a candidate is full, newcomers get control without being exposed.
        unkept: exposures for which there was no room.
        early: values that are dated before the exposure of their unit.
        unpriced: calls that count, but for what they cost, which is not known.
        repeated: calls that are none of what counts of their unit: after its first one where there is no window, after
            the window, or answered by another arm. They are in `Trials.ended`.
    """

    units: int = 0
    mixed: int = 0
    late: int = 0
    stray: int = 0
    unkept: int = 0
    early: int = 0
    unpriced: int = 0
    repeated: int = 0


class Ended(NamedTuple):
    """How all calls of units ended that an arm has answered, whatever counts for the units themselves.

    Attributes:
        arm: which. calls: how many. failed, fell_back, abandoned: so many of them did, or were.
    """

    arm: str
    calls: int = 0
    failed: int = 0
    fell_back: int = 0
    abandoned: int = 0


class Waiting(NamedTuple):
    """Units of a metric that were exposed and not told yet.

    Attributes:
        units: how many. until: when the first of them is told at the latest, in seconds since the epoch; None where
            there is none.
    """

    units: int = 0
    until: float | None = None


class Checkpoint(NamedTuple):
    """Where a controller got to: what it said last, as JSON, when, and the revision of that."""

    state: str
    revision: int
    at: float


class Lease(NamedTuple):
    """Who may do something alone, and until when."""

    holder: str
    until: float


class Progress(NamedTuple):
    """How far an experiment is, so that who looks at it knows whether there is anything to be read.

    Attributes:
        trial: as it is. tally: its units. saved: the revision of its checkpoint; 0: it has none.
    """

    trial: Trial
    tally: Tally
    saved: int


class Decision(NamedTuple):
    """A line of the audit.

    Attributes:
        what: what was decided, e.g. `"promote"`.
        by: who did: a user, or `"controller"`.
        evidence: JSON.
        at: when; given by the store.
        number: its place, from 1; given by the store.
    """

    what: str
    by: str
    evidence: str
    at: float = 0.0
    number: int = 0


def lease_of(name: str) -> str:
    """The name of the lease of who looks at an experiment."""
    return f"experiment/{name}"


def is_early(at: float, exposed_at: float, now: float) -> bool:
    """Whether an outcome is dated before its unit's exposure, which was not stamped by a clock that was ahead."""
    return at < exposed_at - EARLY and exposed_at <= now + EARLY


def ready_before(now: float, window: float, grace: float) -> float:
    """Units exposed up to this moment need not be waited for any longer."""
    return now - window - grace


def check_state(state: str | None) -> None:
    """Refuse a state that is none with a ValueError."""
    if state is not None and state not in STATES:
        raise ValueError(f"state={state!r} is not one of {', '.join(STATES)}")


def check_windows(windows: Mapping[str | None, float], grace: float) -> None:
    """Refuse windows that never end, or end before they begin, with a ValueError."""
    for metric, seconds in windows.items():
        if not (isfinite(seconds) and seconds >= 0):
            raise ValueError(f"the window of {metric!r} is {seconds!r}; it must be seconds, 0 or more")
    if not (isfinite(grace) and grace >= 0):
        raise ValueError(f"grace={grace!r} must be seconds, 0 or more")
