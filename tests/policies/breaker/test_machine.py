"""Any sequence of calls, waits and operators' moves: the breaker does what a plain model of its rules does.

Its windows hold what brute force over a list holds; and neither threads, nor the garbage collector, nor a fork find a
gap in it.

The model keeps every outcome and recomputes each sum and interval from scratch; it knows no ring, bucket or lease
table. All numbers are exact in binary (quarters of a second), so that both agree at every boundary.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, initialize, invariant, multiple, rule

from dspy_prod.errors import CircuitOpenError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker.breaker import Breaker, Permit
from dspy_prod.policies.breaker.window import FAILED, SLOW, CountWindow, TimeWindow
from dspy_prod.telemetry.events import Event, EventBus
from tests.examples import examples
from tests.policies.conftest import FakeClock

from .test_breaker import Circuit, given, given_half_open, given_open

T = TypeVar("T")
DRAW = 0.5  # what the random source always says


@dataclass
class Call:
    """A permit as the model sees it."""

    era: int
    sent: float
    settled: bool = False


@dataclass
class Model:
    """The rules, written down as directly as possible."""

    options: CircuitBreaker
    now: float
    state: str = "closed"
    era: int = 0
    outcomes: list[tuple[float, bool, bool]] = field(default_factory=list)  # when, failed, slow; since last closed
    probes: list[Call] = field(default_factory=list)
    probe_durations: list[float] = field(default_factory=list)
    trips_in_a_row: int = 0
    opened_at: float = 0.0
    reopens_at: float = 0.0
    opened_count: int = 0
    totals: dict[str, int] = field(default_factory=lambda: {"failed": 0, "succeeded": 0})
    told: list[tuple[str, float | None, int]] = field(default_factory=list)

    # what time does

    def look(self) -> None:
        """A probe is written off once its lease is over, at the next look."""
        hung = [p for p in self.probes if not p.settled and self.now >= p.sent + self.options.probe_lease]
        if self.state == "half_open" and hung:
            self.totals["failed"] += len(hung)
            self.trip(None)

    def move(self, state: str, event: str, interval: float | None = None) -> None:
        previous, self.state = self.state, state
        self.era += 1
        self.probes, self.probe_durations = [], []
        if state != previous:
            self.told.append((event, interval, self.era))
            if event == "breaker_opened":
                self.opened_count += 1

    def trip(self, retry_after: float | None) -> None:
        longest = self.options.max_recovery_timeout
        interval = self.options.recovery_timeout
        for _ in range(self.trips_in_a_row):
            interval = min(interval * 2, longest)
        if retry_after:
            interval = min(retry_after, longest)
        interval += interval * self.options.jitter * DRAW
        self.trips_in_a_row += 1
        self.opened_at, self.reopens_at = self.now, self.now + interval
        self.move("open", "breaker_opened", interval)

    def close(self) -> None:
        self.trips_in_a_row = 0
        self.outcomes = []
        self.move("closed", "breaker_closed")

    # what callers do

    def refused(self) -> tuple[bool, float | None]:
        """Whether a call would be refused now, and for how many seconds."""
        out = [p for p in self.probes if not p.settled]
        if self.state == "forced_open":
            return True, None
        if self.state == "open" and self.now < self.reopens_at:
            return True, self.reopens_at - self.now
        if self.state == "half_open" and len(out) >= self.options.half_open_probes:
            return True, min(p.sent for p in out) + self.options.probe_lease - self.now
        return False, 0.0

    def permit(self) -> Call:
        if self.state == "open":
            self.move("half_open", "breaker_half_open")
        call = Call(self.era, self.now)
        if self.state == "half_open":
            self.probes.append(call)
        return call

    def settle(self, call: Call, outcome: str, duration: float, retry_after: float | None) -> None:
        if call.settled or call.era != self.era:
            return
        self.look()
        if call.era != self.era:  # its own or another probe's lease had decided before
            return
        call.settled = True
        if outcome == "ignored":
            return
        self.totals[outcome] += 1
        if self.state == "closed":
            slow = self.options.slow_call_duration is not None and duration > self.options.slow_call_duration
            self.outcomes.append((self.now, outcome == "failed", slow))
            if self.should_open(outcome):
                self.trip(retry_after)
        elif self.state == "half_open" and outcome == "failed":
            self.trip(retry_after)
        elif self.state == "half_open":
            self.probe_durations.append(duration)
            if len(self.probe_durations) == self.options.success_threshold:
                limit = self.options.slow_call_duration
                slow_ones = [d for d in self.probe_durations if limit is not None and d > limit]
                share = Fraction(len(slow_ones), len(self.probe_durations))
                if slow_ones and share >= Fraction(self.options.slow_call_rate):
                    self.trip(None)
                else:
                    self.close()

    # what the closed circuit sees

    def in_a_row(self) -> int:
        run = 0
        for _, failed, _ in reversed(self.outcomes):
            if not failed:
                break
            run += 1
        return run

    def window(self) -> list[tuple[float, bool, bool]]:
        size = self.options.window
        if self.options.window_type == "count":
            return self.outcomes[-size:]

        def slice_of(moment: float) -> int:
            return math.floor(Fraction(moment) * 60 / size)

        return [outcome for outcome in self.outcomes if slice_of(self.now) - slice_of(outcome[0]) < 60]

    def should_open(self, outcome: str) -> bool:
        options, window = self.options, self.window()
        threshold = options.failure_threshold
        if outcome == "failed" and threshold is not None and self.in_a_row() >= threshold:
            return True
        if len(window) < options.minimum_calls:
            return False
        failed = Fraction(sum(failed for _, failed, _ in window), len(window))
        slow = Fraction(sum(slow for _, _, slow in window), len(window))
        return (options.failure_rate is not None and failed >= Fraction(options.failure_rate)) or (
            options.slow_call_duration is not None and slow >= Fraction(options.slow_call_rate)
        )


@st.composite
def all_options(draw: st.DrawFn) -> CircuitBreaker:
    """Small numbers, so that every rule, boundary and state is reached within a few steps."""
    by_time = draw(st.booleans())
    window = draw(st.sampled_from([15, 30, 60])) if by_time else draw(st.integers(1, 6))
    return CircuitBreaker(
        failure_threshold=draw(st.none() | st.integers(1, 4)),
        failure_rate=draw(st.none() | st.sampled_from([0.25, 0.5, 0.75, 1.0])),
        window=window,
        window_type="time" if by_time else "count",
        minimum_calls=draw(st.integers(1, 6 if by_time else window)),
        slow_call_duration=draw(st.none() | st.just(1.0)),
        slow_call_rate=draw(st.sampled_from([0.5, 1.0])),
        recovery_timeout=draw(st.sampled_from([1.0, 4.0, 30.0])),
        max_recovery_timeout=draw(st.sampled_from([30.0, 48.0, 200.0])),
        jitter=draw(st.sampled_from([0.0, 0.5, 1.0])),
        success_threshold=draw(st.integers(1, 3)),
        half_open_probes=draw(st.integers(1, 3)),
        probe_lease=draw(st.sampled_from([2.0, 20.0])),
    )


class BreakerMachine(RuleBasedStateMachine):
    """Drives the breaker and the model with the same steps."""

    permits: Bundle[tuple[Permit, Call]] = Bundle("permits")

    @initialize(options=all_options())
    def start(self, options: CircuitBreaker) -> None:
        self.clock = FakeClock()
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.add(self.events.append)
        self.breaker = Breaker(options, name="r", clock=self.clock, bus=self.bus, random=lambda: DRAW)
        self.model = Model(options, self.clock.monotonic())

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.0, 7.5, 20.0, 60.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds

    @rule()
    def wait_as_told(self) -> None:
        """Exactly until the next permit, lease end or the like."""
        _, seconds = self.model.refused()
        self.clock.advance(seconds or 0.0)
        self.model.now += seconds or 0.0

    def ask(self, how: Callable[[], T]) -> T | None:
        """What the breaker answers, after comparing whether it refuses and for how long."""
        self.model.look()
        expected = self.model.refused()
        answer, error = None, None
        try:
            answer = how()
        except CircuitOpenError as refusal:
            error = refusal
        assert expected == ((True, error.retry_after) if error else (False, 0.0))
        return answer

    def send_one(self) -> list[tuple[Permit, Call]]:
        permit = self.ask(self.breaker.permit)
        if permit is None:
            return []
        call = self.model.permit()
        assert permit.probe == (self.model.state == "half_open")
        assert permit.generation == call.era
        return [(permit, call)]

    def settle_one(self, permit: Permit, call: Call, outcome: str, duration: float, retry_after: float | None) -> None:
        if outcome == "failed":
            self.breaker.failure(permit, duration, "X", retry_after)
        elif outcome == "succeeded":
            self.breaker.success(permit, duration)
        else:
            self.breaker.release(permit)
        self.model.settle(call, outcome, duration, retry_after if outcome == "failed" else None)

    @rule()
    def check(self) -> None:
        self.ask(self.breaker.check)

    @rule(target=permits, times=st.integers(1, 4))
    def send(self, times: int) -> MultipleResults[tuple[Permit, Call]]:
        return multiple(*[sent for _ in range(times) for sent in self.send_one()])

    @rule(
        sent=permits,  # not consumed: a permit may be settled twice, and long after its time
        outcome=st.sampled_from(["failed", "failed", "succeeded", "succeeded", "ignored"]),
        duration=st.sampled_from([0.5, 1.0, 1.25]),
        retry_after=st.sampled_from([None, None, 0.0, 3.0, 100.0]),
    )
    def settle(self, sent: tuple[Permit, Call], outcome: str, duration: float, retry_after: float | None) -> None:
        self.settle_one(*sent, outcome, duration, retry_after)

    @rule(outcomes=st.lists(st.sampled_from(["failed", "succeeded"]), min_size=1, max_size=8))
    def call_at_once(self, outcomes: list[str]) -> None:
        for outcome in outcomes:
            for permit, call in self.send_one():
                self.settle_one(permit, call, outcome, 0.5, None)

    @rule(move=st.sampled_from(["force_open", "disable", "reset"]), often=st.integers(0, 3))
    def operator(self, move: str, often: int) -> None:
        if often:  # rare, so that the circuit mostly moves by itself
            return
        getattr(self.breaker, move)()
        if move == "force_open":
            if self.model.state != "forced_open":
                self.model.opened_at = self.model.now
            self.model.move("forced_open", "breaker_opened")
        elif move == "disable":
            self.model.move("disabled", "breaker_closed")
        else:
            self.model.close()

    @rule()
    def snapshot(self) -> None:
        model, shown = self.model, self.breaker.snapshot()
        model.look()
        window = model.window()
        failures = sum(failed for _, failed, _ in window)
        is_open = model.state in ("open", "half_open", "forced_open")
        assert shown.state == model.state
        assert (shown.failures, shown.successes) == (failures, len(window) - failures)
        assert shown.slow == sum(slow for _, _, slow in window)
        assert shown.consecutive_failures == model.in_a_row()
        assert shown.failure_rate == (failures / len(window) if window else None)
        assert shown.opened_count == model.opened_count
        assert shown.open_for == (model.now - model.opened_at if is_open else None)
        assert shown.retry_after == model.refused()[1]
        assert bool(shown.cause) == is_open
        assert shown.probes_in_flight == sum(not probe.settled for probe in model.probes)
        assert shown.total_failures == model.totals["failed"]
        assert shown.total_successes == model.totals["succeeded"]

    @invariant()
    def listeners_heard_the_transitions(self) -> None:
        """Looks at nothing that would itself write off a probe."""
        if hasattr(self, "events"):
            heard = [(event.name, event.data["retry_after"], event.data["generation"]) for event in self.events]
            assert heard == self.model.told

    @invariant()
    def no_more_probes_than_allowed(self) -> None:
        if hasattr(self, "model"):
            out = sum(not probe.settled for probe in self.model.probes)
            assert out <= self.model.options.half_open_probes


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = examples(100, stateful_step_count=40)


# -- windows against brute force ---------------------------------------------------------------------------------------

outcomes = st.sampled_from([0, FAILED, SLOW, FAILED | SLOW])


@for_all(size=st.integers(1, 9), calls=st.lists(outcomes, max_size=60))
def test_a_count_window_holds_the_sums_of_the_last_calls(size: int, calls: list[int]) -> None:
    window, kept = CountWindow(size), deque[int](maxlen=size)

    for outcome in calls:
        window.add(outcome)
        kept.append(outcome)

        assert (window.calls, window.failures, window.slow) == (
            len(kept),
            sum(outcome in (1, 3) for outcome in kept),
            sum(outcome in (2, 3) for outcome in kept),
        )


pauses = st.sampled_from([0.0, 0.0, 1 / 60, 1 / 30, 0.5, 58.5 / 60, 59.5 / 60, 1.0]) | st.floats(0, 1.5)


@for_all(
    seconds=st.sampled_from([1, 7, 60, 3600]),
    steps=st.lists(st.tuples(pauses, st.none() | outcomes), max_size=80),
)
def test_a_time_window_holds_the_sums_of_its_slices(seconds: int, steps: list[tuple[float, int | None]]) -> None:
    """Pauses are shares of the window. Never a call older than the window, always those of 59 of its 60 slices."""
    clock = FakeClock(monotonic=12_345.678)
    window = TimeWindow(seconds, clock.monotonic)
    log: list[tuple[float, int]] = []

    for pause, outcome in steps:
        clock.advance(pause * seconds)
        if outcome is None:
            window.expire()
        else:
            window.add(outcome)
            log.append((clock.monotonic(), outcome))

        width = seconds / 60
        slices = range(int(clock.monotonic() // width) - 59, int(clock.monotonic() // width) + 1)
        kept = [(at, outcome) for at, outcome in log if int(at // width) in slices]
        assert (window.calls, window.failures, window.slow) == (
            len(kept),
            sum(outcome in (1, 3) for _, outcome in kept),
            sum(outcome in (2, 3) for _, outcome in kept),
        )
        ages = {round((clock.monotonic() - at) / seconds, 9) for at, _ in kept}
        gone = {round((clock.monotonic() - at) / seconds, 9) for at, _ in log} - ages
        assert max(ages, default=0) <= 1
        assert min(gone, default=1) >= round(59 / 60, 9)


def test_a_clock_read_by_a_slower_thread_does_not_turn_a_time_window_back() -> None:
    clock = FakeClock()
    window = TimeWindow(60, clock.monotonic)
    window.add(FAILED)
    clock.advance(30)
    window.add(0)

    clock.advance(-2)
    window.add(FAILED)
    clock.advance(2)
    window.add(0)

    assert (window.calls, window.failures) == (4, 2)


def test_windows_cost_the_same_however_many_calls_they_hold() -> None:
    """Counted in executed lines, not in seconds."""

    def lines(window: Any) -> int:
        count = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            window.add(FAILED)
        finally:
            sys.settrace(before)
        return count

    clock = FakeClock()
    for window in (CountWindow(100_000), TimeWindow(3600, clock.monotonic)):
        window.add(FAILED)
        first = lines(window)
        for _ in range(50_000):
            window.add(FAILED)
        assert lines(window) <= first
    clock.advance(1e12)
    assert lines(window) < 50


# -- threads, the garbage collector, fork ------------------------------------------------------------------------------


@pytest.fixture
def eager_threads() -> Any:
    """Threads that take turns a thousand times more often than usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("probes", [1, 3])
def test_any_number_of_threads_at_the_end_of_the_interval_gets_exactly_the_probes(probes: int) -> None:
    """The BAR: a burst at each expiry is what other routers let through."""
    threads, rounds = 16, 60
    circuit = given_open(
        half_open_probes=probes, recovery_timeout=1, max_recovery_timeout=1, probe_lease=1e6, success_threshold=10**6
    )
    granted: list[list[Permit]] = [[] for _ in range(rounds)]
    start, done = threading.Barrier(threads + 1), threading.Barrier(threads + 1)

    def worker() -> None:
        for number in range(rounds):
            start.wait(30)
            try:
                permit = circuit.breaker.permit()
            except CircuitOpenError:
                pass
            else:
                granted[number].append(permit)
            done.wait(30)

    workers = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for thread in workers:
        thread.start()
    for number in range(rounds):
        circuit.clock.advance(1)
        start.wait(30)
        done.wait(30)
        assert len(granted[number]) == probes
        assert len({permit.id for permit in granted[number]}) == probes
        assert all(permit.probe for permit in granted[number])
        circuit.breaker.failure(granted[number][0], 0.1, "LMServerError 503")
    for thread in workers:
        thread.join(30)

    assert circuit.told == ["breaker_opened"] + ["breaker_half_open", "breaker_opened"] * rounds


@pytest.mark.usefixtures("eager_threads")
def test_threads_that_settle_and_ask_at_once_never_have_more_probes_out_than_allowed() -> None:
    probes, threads, calls = 2, 8, 400
    circuit = given_half_open(half_open_probes=probes, probe_lease=1e6, success_threshold=10**6)
    out: set[int] = set()
    most: list[int] = []
    start = threading.Barrier(threads)

    def worker(seed: int) -> None:
        chance = random.Random(seed)
        start.wait(30)
        for _ in range(calls):
            try:
                permit = circuit.breaker.permit()
            except CircuitOpenError:
                continue
            out.add(permit.id)
            most.append(len(out))
            out.discard(permit.id)
            if chance.random() < 0.5:
                circuit.breaker.success(permit, 0.1)
            else:
                circuit.breaker.release(permit)

    workers = [threading.Thread(target=worker, args=(seed,), daemon=True) for seed in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)

    assert max(most) <= probes
    assert circuit.breaker.snapshot().probes_in_flight == 0
    assert circuit.told == ["breaker_opened", "breaker_half_open"]


@pytest.mark.usefixtures("eager_threads")
def test_no_result_is_lost_or_counted_twice_between_threads() -> None:
    threads, calls = 8, 500
    circuit = given(window=threads * calls)
    start = threading.Barrier(threads)

    def worker() -> None:
        start.wait(30)
        for _ in range(calls):
            circuit.succeeds()
            circuit.fails()

    workers = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)

    snapshot = circuit.breaker.snapshot()
    assert (snapshot.total_failures, snapshot.total_successes) == (threads * calls, threads * calls)
    assert snapshot.failures + snapshot.successes == threads * calls


class CollectingClock(FakeClock):
    """A clock during whose reading Python collects garbage: here abandoned streams, which settle their permits."""

    def __init__(self) -> None:
        super().__init__()
        self.garbage: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        while self.garbage:
            self.garbage.pop()()
        return super().monotonic()


class WatchedLock:
    """Counts how often it is taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("given_state", "use", "taken"),
    [
        (given, lambda breaker: breaker.check(), 0),
        (given, lambda breaker: breaker.permit(), 0),
        (given, lambda breaker: breaker.success(breaker.permit(), 0.1), 1),
        (given, lambda breaker: breaker.failure(breaker.permit(), 0.1, "X"), 1),
        (given, lambda breaker: breaker.release(breaker.permit()), 1),
        (given, lambda breaker: breaker.force_open(), 1),
        (given, lambda breaker: breaker.disable(), 1),
        (given, lambda breaker: breaker.reset(), 1),
        (given, lambda breaker: breaker.snapshot(), 1),
        (given, lambda breaker: [breaker.disable(), breaker.check(), breaker.permit()], 1),
        (given_half_open, lambda breaker: breaker.check(), 1),
        (given_half_open, lambda breaker: breaker.permit(), 1),
    ],
)
def test_asking_a_closed_or_disabled_circuit_takes_no_lock_and_all_else_takes_it_once(
    given_state: Callable[[], Circuit], use: Callable[[Breaker], Any], taken: int
) -> None:
    """No test of threads can promise what a missing lock would break: most of these are atomic by luck, under a GIL."""
    circuit = given_state()
    lock: Any = WatchedLock()
    circuit.breaker._lock = lock

    use(circuit.breaker)

    assert lock.taken == taken


def test_a_call_settled_by_the_garbage_collector_inside_the_breaker_cannot_deadlock() -> None:
    clock = CollectingClock()
    circuit = given_half_open(clock=clock, half_open_probes=2, success_threshold=9)
    abandoned = [circuit.breaker.permit(), circuit.breaker.permit()]
    clock.garbage = [partial(circuit.breaker.release, permit) for permit in abandoned]

    looking = threading.Thread(target=circuit.breaker.snapshot, daemon=True)
    looking.start()
    looking.join(5)

    assert not looking.is_alive()
    assert clock.garbage == []
    assert circuit.breaker.snapshot().probes_in_flight == 0


def test_after_a_fork_the_lock_is_free_and_the_parents_probes_are_gone() -> None:
    """A fork copies a lock that another thread holds, but not the thread that would release it."""
    circuit = given_half_open(half_open_probes=1, probe_lease=30)
    circuit.breaker.permit()
    held, free = threading.Event(), threading.Event()

    def holder(lock: Any) -> None:
        with lock:
            held.set()
            free.wait(30)

    other = threading.Thread(target=holder, args=(circuit.breaker._lock,), daemon=True)
    other.start()
    held.wait(30)
    circuit.breaker._after_fork()

    child = threading.Thread(target=circuit.succeeds, daemon=True)
    child.start()
    child.join(5)
    alive = child.is_alive()
    free.set()
    other.join(30)

    assert not alive
    circuit.clock.advance(30)
    assert circuit.state == "half_open"


def test_after_a_fork_an_open_circuit_is_still_open() -> None:
    circuit = given_open()

    circuit.breaker._after_fork()

    assert circuit.interval() == 60
