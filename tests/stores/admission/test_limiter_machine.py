"""Random lives of a limiter against a model that remembers every call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.feedback import LONGEST
from dspy_prod.stores.admission.limiter import LimiterState
from dspy_prod.stores.admission.slices import LATENESS
from tests.examples import examples
from tests.stores.support import fitting

SHORT = st.integers(0, 3_000).map(lambda ms: ms / 1000)
LONG = st.sampled_from([10.0, 30.0, 59.0, 60.0, 60.999, 61.0, 61.5, 62.0, 1e4])
TOKENS = st.integers(0, 400)
LIMITS = st.builds(
    lambda rpm, burst, **rest: RateLimit(rpm=rpm, burst=None if rpm is None or burst > rpm else burst, **rest),
    rpm=st.sampled_from([None, 1, 1.5, 6, 60, 119, 600, 7800]),
    burst=st.sampled_from([1, 2, 3, 30, 70, 130]),
    tpm=st.sampled_from([None, 400, 1000.5, 6000]),
    concurrency=st.sampled_from([None, 1, 3]),
    guard=st.sampled_from([0.0, 0.3, 1.0]),
    floor=st.sampled_from([0.1, 1.0]),
    adaptive=st.booleans(),
)


@dataclass
class Sent:
    """A call as the provider and the caller know it."""

    at: float
    reserved: int
    until: float  # the end of its lease
    debit: Any
    counts: int = 0  # the larger of real usage and what is still reserved
    settled: bool = False
    unsent: bool = False


class LimiterMachine(RuleBasedStateMachine):
    """Any calls, settles, throttles, headers and jumps of time; each call sent is checked against the limits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.calls: list[Sent] = []
        self.told: list[float] | None = None  # requests left, until
        self.before = 0  # calls sent before that was told
        self.throttled = False

    @initialize(limit=LIMITS, now=st.sampled_from([0.0, 7.25, 1_700_000_000.123]))
    def begin(self, limit: RateLimit, now: float) -> None:
        self.limit, self.now = limit, now
        self.state = LimiterState(limit, now)

    # -- what happens ------------------------------------------------------------------------------------------------
    @rule(seconds=SHORT | LONG)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(back=SHORT, tokens=TOKENS)
    def a_clock_steps_back(self, back: float, tokens: int) -> None:
        tokens = fitting(self.limit, tokens)
        assert self.state.ready_at(self.now, tokens) == self.state.ready_at(self.now - back, tokens)

    @rule(tokens=TOKENS, count=st.integers(1, 40), lease=st.sampled_from([math.inf, 2.0, 90.0]), wait=st.booleans())
    def calls_ask(self, tokens: int, count: int, lease: float, wait: bool) -> None:
        tokens = fitting(self.limit, tokens)
        for _ in range(count):
            at = self.state.ready_at(self.now, tokens)
            assert self.state.earliest(self.now, tokens, 0) <= max(at, self.now)
            if at > self.now:
                assert self.state.blocked_on in {"requests", "tokens", "concurrency", "paused", "pacing"}
                self.is_honest(at, tokens)
                if not wait or at == math.inf:
                    return
                self.now = at
            self.send(tokens, lease)

    def is_honest(self, at: float, tokens: int) -> None:
        """At that time the call may go, just before it may not."""
        other = LimiterState.load(self.state.dump(), self.limit)
        before = self.now + 1e6 if at == math.inf else at - max(1e-4, (at - self.now) * 1e-3)
        if before > self.now:
            assert other.ready_at(before, tokens) == at
        assert at == math.inf or other.ready_at(at, tokens) <= at

    def send(self, tokens: int, lease: float) -> None:
        until = lease if lease == math.inf else math.ceil(self.now + lease)
        self.calls.append(Sent(self.now, tokens, until, self.state.take(self.now, tokens, lease), tokens))
        self.within_the_minute()
        self.within_the_slice()
        if self.limit.concurrency is not None:
            assert self.in_flight() <= self.limit.concurrency
        if self.told is not None and self.now < self.told[1]:
            self.told[0] -= 1
            assert self.told[0] >= 0

    def within_the_minute(self) -> None:
        window = [call for call in self.calls if call.at > self.now - 60 - self.limit.guard and not call.unsent]
        assert len(window) <= (self.limit.rpm or math.inf)
        assert sum(call.counts for call in window) <= (self.limit.tpm or math.inf)

    def within_the_slice(self) -> None:
        if self.limit.rpm is not None:
            burst = self.limit.burst or max(1, math.floor(self.limit.rpm / 60))
            times = [call.at for call in self.calls if not call.unsent]
            if len(times) > burst:
                apart = 1.04 * burst * 60 / self.limit.rpm - LATENESS
                assert times[-1] - times[-1 - burst] >= apart - 1e-6

    def open(self, index: int) -> Sent | None:
        calls = [call for call in self.calls if not call.settled]
        return calls[index % len(calls)] if calls else None

    @rule(index=st.integers(0, 100), share=st.sampled_from([None, 0.0, 0.25, 0.96, 1.0, 3.0]))
    def a_call_ends(self, index: int, share: float | None) -> None:
        call = self.open(index)
        if call is not None:
            used = None if share is None else int(call.reserved * share)
            call.settled, call.counts = True, call.reserved if used is None else used
            self.state.give_back(call.debit, now=self.now, used=used, sent=True)

    @rule(index=st.integers(0, 100))
    def a_call_is_not_sent(self, index: int) -> None:
        call = self.open(index)
        if call is not None:
            call.settled = call.unsent = True
            call.counts = 0
            if self.told is not None and any(call is late for late in self.calls[self.before :]):
                self.told[0] += 1
            self.state.give_back(call.debit, now=self.now, used=None, sent=False)

    @rule(retry_after=st.sampled_from([None, 0.0, 0.2, 5.0, 1e9]))
    def the_provider_throttles(self, retry_after: float | None) -> None:
        self.throttled = True
        self.state.throttled(self.now, retry_after)
        paused = self.state.snapshot(self.now, "key", 0).paused_for
        assert paused >= min(0.0 if retry_after is None else retry_after, LONGEST) - 1e-6
        if paused > 0:
            assert self.state.ready_at(self.now, 0) >= self.now + paused - 1e-6

    @rule(left=st.integers(0, 70), reset=st.sampled_from([0.0, 1.0, 30.0, 90.0]))
    def the_provider_tells(self, left: int, reset: float) -> None:
        """Headers bind where they leave less than the minute does when they come; the latest ones count."""
        own = (self.limit.rpm or math.inf) - self.state._window.requests
        self.told, self.before = [left, self.now + reset] if left < max(own, 1) else None, len(self.calls)
        self.state.resync(self.now, {"requests": (left, reset), "tokens": (1e9, 1.0)})
        assert ("requests" in self.state._feedback.told) == (self.told is not None and reset > 0)

    @precondition(lambda self: self.calls)
    @rule()
    def another_process_takes_over(self) -> None:
        data = self.state.dump()
        assert len(data) < 8_000  # however many are in flight
        self.state = LimiterState.load(data, self.limit)
        assert orjson.loads(self.state.dump()) == orjson.loads(data)
        for call in self.calls:
            call.debit = orjson.loads(orjson.dumps(call.debit))

    # -- what always holds -------------------------------------------------------------------------------------------
    def in_flight(self) -> int:
        return sum(not call.settled and call.until > self.now for call in self.calls)

    @invariant()
    def it_counts_what_is_in_flight(self) -> None:
        snapshot = self.state.snapshot(self.now, "key", 0)
        assert snapshot.in_flight == self.in_flight()
        assert 0.1 <= snapshot.rate_factor <= 1.0
        assert (snapshot.requests_available or 0.0) >= 0.0
        assert (snapshot.tokens_available or 0.0) >= 0.0
        window = self.state._window
        assert window.requests >= 0
        assert 0 <= window.held <= window.tokens or any(call.counts > call.reserved for call in self.calls)
        assert window.tokens >= 0

    def teardown(self) -> None:
        while (call := self.open(0)) is not None:
            call.settled = True
            self.state.give_back(call.debit, now=self.now, used=call.reserved, sent=True)
        self.now += 1e4
        window = self.state._window
        lowered = self.throttled and self.limit.adaptive and (self.limit.rpm or self.limit.tpm)
        assert self.state.idle(self.now) or lowered
        assert (window.requests, window.tokens, window.held) == (0, 0, 0)
        assert self.state.ready_at(self.now, fitting(self.limit, 400)) <= self.now


LimiterMachine.TestCase.settings = examples(60, stateful_step_count=40)
TestLimiterMachine = LimiterMachine.TestCase
