"""Each rule of the rate limiter, and whole simulated hours of it: what is sent, how much of the limit is used."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import orjson
import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.feedback import LONGEST
from dspy_prod.stores.admission.limiter import Debit, LimiterState
from dspy_prod.stores.admission.slices import LATENESS, RequestPacer
from tests.stores.support import fitting

START = 1000.3
NOW = 5000.25


# -- a provider's minute, second by second -----------------------------------------------------------------------------
class Call(NamedTuple):
    at: float
    reserved: int
    real: int
    end: float


def saturate(
    limit: RateLimit,
    *,
    real: Callable[[random.Random], int] = lambda _: 100,
    over: float = 1.0,
    takes: float = 0.0,
    seconds: float = 300.0,
    calls: int = 10**9,
    late: float = 0.003,
    state: LimiterState | None = None,
) -> list[Call]:
    """A queue that never empties: its head goes when `ready_at` says so, up to `late` seconds late.

    Args:
        real: tokens a call really uses.
        over: how many times too high its estimate is.
        takes: seconds from sending to the end of a call.
    """
    rng = random.Random(7)
    state = state or LimiterState(limit, START)
    sent: list[Call] = []
    events: list[tuple[float, int, Debit | None, int]] = [(START, 0, None, 0)]
    timer, number, used = START, 0, real(rng)
    while events and len(sent) < calls:
        now, _, debit, settled = heapq.heappop(events)
        if now > START + seconds:
            break
        if debit is not None:
            state.give_back(debit, now=now, used=settled, sent=True)
        elif now != timer:
            continue  # only the newest timer of the head counts
        while len(sent) < calls:
            tokens, number = fitting(state.limit, int(used * over)), number + 1
            at = state.ready_at(now, tokens)
            if at > now:
                timer = at + rng.random() * late
                heapq.heappush(events, (timer, number, None, 0))
                break
            debit = state.take(now, tokens)
            sent.append(Call(now, tokens, used, now + takes))
            if takes:
                heapq.heappush(events, (now + takes, number, debit, used))
            else:
                state.give_back(debit, now=now, used=used, sent=True)
            used = real(rng)
    return sent


def worst(sent: list[Call], limit: RateLimit) -> None:
    """Check every 60 s window, at the moment of each sending: reservations count until they are settled."""
    window: deque[Call] = deque()
    open_calls: deque[Call] = deque()
    tokens = 0
    for call in sent:
        while open_calls and open_calls[0].end <= call.at:
            done = open_calls.popleft()
            if done.at > call.at - 60 - limit.guard:
                tokens -= done.reserved - done.real
        while window and window[0].at <= call.at - 60 - limit.guard:
            old = window.popleft()
            tokens -= old.real if old.end <= call.at else old.reserved
        window.append(call)
        tokens += call.reserved
        open_calls.append(call)
        assert len(window) <= (limit.rpm or math.inf)
        assert tokens <= (limit.tpm or math.inf)


def arrivals(sent: list[Call], jitter: float) -> list[tuple[float, int]]:
    rng = random.Random(11)
    return sorted((call.at + rng.random() * jitter, call.real) for call in sent)


def most_in(arrived: list[tuple[float, int]], seconds: float) -> tuple[int, int]:
    """The most requests and tokens in any window of that length."""
    window: deque[tuple[float, int]] = deque()
    tokens = most_requests = most_tokens = 0
    for at, real in arrived:
        while window and window[0][0] <= at - seconds:
            tokens -= window.popleft()[1]
        window.append((at, real))
        tokens += real
        most_requests, most_tokens = max(most_requests, len(window)), max(most_tokens, tokens)
    return most_requests, most_tokens


LIMITS = {
    "rpm": RateLimit(rpm=600),
    "tpm": RateLimit(tpm=100_000),
    "rpm binds": RateLimit(rpm=600, tpm=1_000_000),
    "tpm binds": RateLimit(rpm=6000, tpm=100_000),
    "both": RateLimit(rpm=600, tpm=120_000),
}


@pytest.mark.parametrize("takes", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("over", [1.0, 1.04, 4.0])
@pytest.mark.parametrize("name", LIMITS)
def test_conforms_and_uses_the_limit(name: str, over: float, takes: float) -> None:
    """Under saturation no window exceeds a limit, and the binding one is used as far as its bound allows."""
    limit = LIMITS[name]
    sent = saturate(limit, real=lambda rng: rng.randrange(100, 300), over=over, takes=takes)
    worst(sent, limit)
    requests, tokens = most_in(arrivals(sent, jitter=limit.guard), 60)
    assert requests <= (limit.rpm or math.inf)
    assert tokens <= (limit.tpm or math.inf)
    steady = [call for call in sent if START + 120 <= call.at < START + 300]
    used = max(
        len(steady) / 3 / (limit.rpm or math.inf), sum(call.real for call in steady) / 3 / (limit.tpm or math.inf)
    )
    assert used >= 0.95 / (1 + (over - 1) * takes / 60 if over > 1.05 else 1)


@pytest.mark.parametrize("rpm", [10, 60, 90, 119, 1200, 60 * 127, 60 * 191])
def test_uses_any_rate(rpm: int) -> None:
    """Bursts that are not round numbers, or too large for an exact log, use their minute as well."""
    sent = saturate(RateLimit(rpm=rpm), seconds=240)
    worst(sent, RateLimit(rpm=rpm))
    steady = [call for call in sent if START + 60 <= call.at < START + 60 + 156]
    assert len(steady) >= 0.95 * rpm * 156 / 60


@pytest.mark.parametrize("takes", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("real", [500, 2000])
def test_uses_what_estimates_four_times_too_high_leave(real: int, takes: float) -> None:
    """At least 97 % of what evenly spaced calls can use while the bound is held.

    With calls of 2 % of a minute, 0.95 / (1 + 3 D/60) of the limit is out of reach: of the call being sent, too, three
    times its use is reserved in vain, and the guard makes a minute 61 s long.
    """
    limit, seconds = RateLimit(tpm=100_000), 600.0
    sent = saturate(limit, real=lambda _: real, over=4.0, takes=takes, seconds=seconds)
    worst(sent, limit)
    possible = (1 - 3 * real / 100_000) * 60 / (60 + limit.guard + 3 * takes)
    used = sum(call.real for call in sent if call.at >= START + 120) / (100_000 * (seconds - 120) / 60)
    assert used >= 0.97 * possible
    if real == 500:
        assert used >= 0.95 / (1 + 3 * takes / 60)


def test_uses_the_limit_with_calls_of_two_percent() -> None:
    """Calls of 2 % of the minute, estimated 4 % too high, still use 95 % of it."""
    limit = RateLimit(tpm=100_000)
    sent = saturate(limit, real=lambda _: 2000, over=1.04, takes=1.0, seconds=600)
    worst(sent, limit)
    assert sum(call.real for call in sent if call.at >= START + 120) / 8 >= 95_000


@pytest.mark.parametrize(
    "limit", [RateLimit(rpm=60), RateLimit(tpm=100_000), RateLimit(rpm=600, tpm=60_000, burst=600)]
)
def test_idle_then_burst_conforms(limit: RateLimit) -> None:
    """A burst after a quiet time, at any phase of a slot, stays within every window."""
    for idle in (0.0, 30.4, 60.9, 61.5, 500.0):
        state = LimiterState(limit, START - 1000)
        early = [START - idle - 40 + step * 7.3 for step in range(5)] if idle else []
        before = []
        for at in early:
            debit = state.take(at, 1000)
            state.give_back(debit, now=at, used=1000, sent=True)
            before.append(Call(at, 1000, 1000, at))
        sent = saturate(limit, real=lambda _: 1000, state=state, seconds=150)
        worst(before + sent, limit)
        requests, tokens = most_in(arrivals(before + sent, jitter=limit.guard), 60)
        assert requests <= (limit.rpm or math.inf)
        assert tokens <= (limit.tpm or math.inf)


# -- pacing ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("burst", [1, 4, None])
def test_seconds_are_kept_and_lateness_does_not_add_up(burst: int | None) -> None:
    """At rpm=1200, 200 calls take at most 11 s and no second sees more than 20, with 30 ms of arrival jitter."""
    sent = saturate(RateLimit(rpm=1200, burst=burst), calls=200, late=0.008)
    assert len(sent) == 200
    assert sent[-1].at - START <= 11.0
    for _ in range(20):
        assert most_in(arrivals(sent, jitter=0.030), 1.0)[0] <= 20


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("burst", [1, 4, None])
def test_a_call_that_leaves_late_is_counted_from_then(burst: int | None, told: bool) -> None:
    """One call is held up for 0.2 s after its grant; when the limiter hears of it, no second sees more than 20."""
    state = LimiterState(RateLimit(rpm=1200, burst=burst), START)
    left: list[float] = []
    now, late = START, (math.inf, None)
    for number in range(100):
        now = max(now, state.ready_at(now, 0))
        if now >= late[0]:
            assert late[1] is not None
            state.sent_late(late[1], late[0])
            late = (math.inf, None)
            now = max(now, state.ready_at(now, 0))
        debit = state.take(now, 0)
        held_up = 0.2 if number == 30 else 0.0
        if held_up and told:
            late = (now + held_up, debit)
        left.append(now + held_up)
    assert now - START <= 5.5
    assert (most_in([(at, 0) for at in sorted(left)], 1.0)[0] <= 20) is told


def test_a_late_call_moves_within_a_large_log() -> None:
    """The log of a large burst counts a moved call once, at its new place, and stays in order."""
    pacer, rng = RequestPacer(600, 60.0, NOW), random.Random(9)
    nominal = [pacer.push(NOW + step * 0.1) for step in range(600)]
    for _ in range(300):
        at = rng.randrange(600)
        nominal[at] = pacer.move(nominal[at], nominal[at] + rng.random() * 3)
    assert sum(int(group[0]) for group in pacer._log) == 600
    assert len(pacer._log) <= 128
    assert [group[2] for group in pacer._log] == sorted(group[2] for group in pacer._log)
    assert pacer.ready_at() >= min(nominal) + 60


@pytest.mark.parametrize(("rpm", "burst"), [(60, 1), (60, 60), (1200, 20), (6000, 100), (6000, 97), (76_740, 1279)])
def test_no_slice_holds_more_than_a_burst(rpm: int, burst: int) -> None:
    """Any slice of `burst / (rpm / 60)` seconds holds at most `burst` requests, also after calls were not sent."""
    rng = random.Random(3)
    limit = RateLimit(rpm=rpm, burst=burst)
    state = LimiterState(limit, NOW)
    now, debits = NOW, list[tuple[float, Debit]]()
    for _ in range(4 * burst + 200):
        now = max(now, state.ready_at(now, 0)) + rng.random() * 0.004 * (rng.random() < 0.1)
        debits.append((now, state.take(now, 0)))
        if rng.random() < 0.3:
            _, debit = debits.pop(rng.randrange(max(0, len(debits) - 30), len(debits)))
            state.give_back(debit, now=now, used=None, sent=False)
    times = [at for at, _ in debits]
    apart = burst / (rpm / 60) if burst / rpm >= 1 / 480 else 1.04 * burst / (rpm / 60) - LATENESS
    assert all(later - earlier >= apart for earlier, later in zip(times, times[burst:], strict=False))


def test_a_large_burst_keeps_a_bounded_log() -> None:
    """However calls come and are refunded, the log of a large burst stays within twice 64 groups."""
    pacer, rng = RequestPacer(6000, 60.0, NOW), random.Random(5)
    nominal: list[float] = []
    for step in range(20_000):
        nominal.append(pacer.push(NOW + step * 0.01))
        if rng.random() < 0.9:
            pacer.refund(nominal.pop(rng.randrange(len(nominal))))
        nominal = nominal[-200:]
        assert len(pacer._log) <= 128


def test_a_slice_remembers_what_a_smaller_burst_had_no_place_for() -> None:
    """Lowering a burst and restoring it, by settings or a load, lets no slice hold more than the restored burst."""
    wide, narrow = RateLimit(rpm=60, burst=20), RateLimit(rpm=60, burst=5)
    for steps in ((narrow, wide), (narrow, RateLimit(rpm=60, burst=12), wide)):
        state = LimiterState(wide, NOW)
        debits = [state.take(NOW + step / 100, 0) for step in range(20)]
        state = LimiterState.load(state.dump(), steps[0])
        state.give_back(debits[-1], now=NOW + 1, used=None, sent=False)
        for limit in steps[1:]:
            state.reconfigure(limit, NOW + 1)
        assert state.ready_at(NOW + 1, 0) <= NOW + 1  # the one that was not sent
        state.take(NOW + 1, 0)
        assert state.ready_at(NOW + 1, 0) >= NOW + 20


def test_a_call_not_sent_gives_its_place_back() -> None:
    """The next call may go at once when one of a burst was not sent, whichever it was."""
    for index in range(3):
        state = LimiterState(RateLimit(rpm=180, burst=3), NOW)
        debits = [state.take(NOW + step / 100, 0) for step in range(3)]
        blocked = state.ready_at(NOW + 0.1, 0)
        assert (blocked > NOW + 0.9, state.blocked_on) == (True, "pacing")
        state.give_back(debits[index], now=NOW + 0.1, used=None, sent=False)
        assert state.ready_at(NOW + 0.1, 0) <= NOW + 0.1
        state.take(NOW + 0.1, 0)
        assert state.ready_at(NOW + 0.1, 0) >= blocked - (0.01 if index else 0.0)


def test_tokens_are_spread_over_the_minute() -> None:
    """Without rpm a second's worth of tokens may go at once, and a call larger than that goes alone."""
    state = LimiterState(RateLimit(tpm=60_000), NOW)
    for _ in range(4):
        assert state.ready_at(NOW, 250) <= NOW
        state.take(NOW, 250)
    assert state.ready_at(NOW, 250) == pytest.approx(NOW + 0.25, abs=0.01)
    assert state.blocked_on == "pacing"
    state = LimiterState(RateLimit(tpm=60_000), NOW)
    assert state.ready_at(NOW, 30_000) <= NOW
    state.take(NOW, 30_000)
    assert state.ready_at(NOW, 1) == pytest.approx(NOW + 29, abs=0.01)


def test_estimates_far_too_high_do_not_slow_tokens_down() -> None:
    """Once usage is known to be a quarter of the estimates, pacing lets four times as many reserved tokens go."""
    state = LimiterState(RateLimit(tpm=600_000), NOW)
    now = NOW
    for _ in range(100):
        now += 1.0
        state.give_back(state.take(now, 4000), now=now, used=1000, sent=True)
    sent, end = 0, now + 10
    while now < end:
        at = state.ready_at(now, 4000)
        if at <= now:
            state.take(now, 4000)
            sent += 1
        now = max(now, at)
    assert 95 <= sent <= 115  # 10 s at 10,000 real tokens a second, one second ahead


# -- the minute --------------------------------------------------------------------------------------------------------
def test_nothing_limits_without_settings() -> None:
    """Without limits every call may go, and only what is in flight is counted."""
    state = LimiterState(RateLimit(), NOW)
    for _ in range(1000):
        assert state.ready_at(NOW, 10**6) <= NOW
        state.take(NOW, 10**6)
    snapshot = state.snapshot(NOW, "key", 3)
    assert snapshot == ("key", None, None, None, None, 1000, None, 3, 0.0, 1.0)


@pytest.mark.parametrize(("rpm", "guard"), [(1, 1.0), (1.5, 0.0), (3, 1.0), (3.9, 2.5)])
def test_requests_of_a_minute(rpm: float, guard: float) -> None:
    """The request after `rpm` waits until the first is older than 60 s + guard, and at most half a second more."""
    limit = RateLimit(rpm=rpm, burst=math.floor(rpm), guard=guard)
    state = LimiterState(limit, NOW)
    for _ in range(math.floor(rpm)):
        assert state.ready_at(NOW, 0) <= NOW
        state.take(NOW, 0)
    at = state.ready_at(NOW, 0)
    assert at >= NOW + 60 + guard
    assert at <= max(NOW + 60.5 + guard, NOW + 1.04 * 60 * math.floor(rpm) / rpm)


def test_a_token_correction_belongs_to_its_slot() -> None:
    """A settle frees or charges tokens in the slot of the debit, and nothing once that slot is forgotten."""
    state = LimiterState(RateLimit(tpm=1000, guard=0), NOW)
    first = state.take(NOW, 600)
    second = state.take(NOW + 30, 400)
    assert state.ready_at(NOW + 30, 400) == pytest.approx(NOW + 60, abs=0.5)
    assert state.blocked_on == "tokens"
    state.give_back(second, now=NOW + 31, used=100, sent=True)
    assert state.snapshot(NOW + 31, "key", 0).tokens_available == 300
    state.give_back(first, now=NOW + 40, used=900, sent=True)
    assert state.snapshot(NOW + 40, "key", 0).tokens_available == 0
    assert state.snapshot(NOW + 61, "key", 0).tokens_available == 900
    for after in (60.0, 60.25, 60.5, 61.0):  # not even in the slot that was forgotten last
        other = LimiterState(RateLimit(tpm=1000, guard=0), NOW)
        other.give_back(other.take(NOW, 600), now=NOW + after, used=0, sent=True)
        assert other.snapshot(NOW + after, "key", 0).tokens_available == 1000
        assert other.snapshot(NOW + after + 200, "key", 0).tokens_available == 1000
        assert other._window.tokens == other._window.held == 0
    late = state.take(NOW + 70, 500)
    state.take(NOW + 140, 300)
    state.give_back(late, now=NOW + 141, used=1000, sent=True)
    assert state.snapshot(NOW + 141, "key", 0).tokens_available == 700


def test_unknown_usage_keeps_the_reservation() -> None:
    """`used=None` leaves the reserved tokens counted; a call not sent leaves nothing."""
    state = LimiterState(RateLimit(rpm=60, tpm=1000), NOW)
    state.give_back(state.take(NOW, 600), now=NOW, used=None, sent=True)
    assert state.snapshot(NOW, "key", 0)[1:5] == (59, 60, 400, 1000)
    state.give_back(state.take(NOW, 300), now=NOW, used=None, sent=False)
    assert state.snapshot(NOW, "key", 0)[1:5] == (59, 60, 400, 1000)


def test_more_than_a_minute_holds() -> None:
    """A call above tpm can never go."""
    state = LimiterState(RateLimit(tpm=1000.5), NOW)
    assert state.ready_at(NOW, 1001) == math.inf
    assert state.blocked_on == "tokens"
    assert state.earliest(NOW, 1001, 0) == math.inf
    assert state.ready_at(NOW, 1000) <= NOW


def test_usage_far_beyond_a_reservation_blocks_for_a_minute_only() -> None:
    """Usage of several minutes' worth blocks until it leaves the window, not longer."""
    state = LimiterState(RateLimit(tpm=1000), NOW)
    state.give_back(state.take(NOW, 10), now=NOW, used=20_000, sent=True)
    assert NOW + 61 <= state.ready_at(NOW, 1) <= NOW + 61.5


def test_time_may_jump() -> None:
    """Time that goes back counts as the latest seen; after a leap forward nothing is left."""
    state = LimiterState(RateLimit(rpm=2, burst=2), NOW)
    state.take(NOW, 0)
    state.take(NOW - 3600, 0)
    at = state.ready_at(NOW - 50, 0)
    assert at == state.ready_at(NOW, 0) > NOW + 60
    assert state.ready_at(NOW + 1e9, 0) <= NOW + 1e9
    assert not state.idle(NOW + 1e9)
    state = LimiterState(RateLimit(rpm=2), NOW)
    state.give_back(state.take(NOW, 5), now=NOW, used=5, sent=True)
    assert not state.idle(NOW + 60)
    assert state.idle(NOW + 63)


# -- concurrency -------------------------------------------------------------------------------------------------------
def test_concurrency_waits_for_a_release() -> None:
    """With all seats taken only a release helps."""
    state = LimiterState(RateLimit(concurrency=2), NOW)
    debits = [state.take(NOW, 0) for _ in range(2)]
    assert state.ready_at(NOW, 0) == math.inf
    assert state.blocked_on == "concurrency"
    state.give_back(debits[0], now=NOW + 1, used=None, sent=True)
    assert state.ready_at(NOW + 1, 0) <= NOW + 1


def test_a_dead_holder_loses_its_seat() -> None:
    """An expired lease stops counting, at the end of its second, and its late end frees nobody else's seat."""
    state = LimiterState(RateLimit(concurrency=2), NOW)
    dead, _ = state.take(NOW, 0, 9.5), state.take(NOW, 0, 103.5)
    assert state.ready_at(NOW + 6, 0) == NOW + 9.75
    assert state.ready_at(NOW + 10, 0) <= NOW + 10
    state.take(NOW + 10, 0)
    state.give_back(dead, now=NOW + 11, used=None, sent=True)
    assert state.snapshot(NOW + 11, "key", 0).in_flight == 2
    assert state.ready_at(NOW + 11, 0) == NOW + 103.75


def test_a_call_may_outlive_a_forgotten_limiter() -> None:
    """A debit of a state that was forgotten frees no seat in the one that replaced it."""
    dead = LimiterState(RateLimit(concurrency=2), NOW).take(NOW, 0, 5)
    state = LimiterState(RateLimit(concurrency=2), NOW + 100)
    state.take(NOW + 100, 0)
    state.give_back(dead, now=NOW + 101, used=None, sent=True)
    assert state.snapshot(NOW + 101, "key", 0)[1:6] == (None, None, None, None, 1)


def test_calls_in_flight_take_no_room() -> None:
    """The row that processes share is as large with a thousand calls in flight as with eight."""
    few, many = (LimiterState(RateLimit(concurrency=2000), NOW) for _ in range(2))
    for state, count in ((few, 8), (many, 1024)):
        for number in range(count):
            state.take(NOW, 0, 30 + number % 8)
    assert many.snapshot(NOW, "key", 0).in_flight == 1024
    assert len(many.dump()) < len(few.dump()) + 64


# -- what the provider says --------------------------------------------------------------------------------------------
def test_a_throttle_pauses() -> None:
    """Retry-After is the pause; without it the pause is 1 s and doubles with each round that brings no success."""
    state = LimiterState(RateLimit(rpm=600), NOW)
    state.throttled(NOW, 7.5)
    assert state.ready_at(NOW, 0) == NOW + 7.5
    assert state.blocked_on == "paused"
    assert state.earliest(NOW, 0, 0) == NOW + 7.5
    state = LimiterState(RateLimit(adaptive=False), NOW)
    now, pauses = NOW, []
    for _ in range(8):
        state.throttled(now, None)
        pauses.append(state.snapshot(now, "key", 0).paused_for)
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    state.give_back(state.take(now, 0), now=now, used=0, sent=True)
    state.throttled(now, None)
    assert state.snapshot(now, "key", 0).paused_for == 60
    state.give_back(state.take(now, 0), now=now, used=3, sent=True)
    now += 60
    state.throttled(now, None)
    assert state.snapshot(now, "key", 0)[-2:] == (1, 1.0)


def test_a_burst_of_throttles_lowers_the_rate_once() -> None:
    """Many 429s of one burst count once; the next round counts again, down to the floor."""
    state = LimiterState(RateLimit(rpm=600, tpm=6000, floor=0.3), NOW)
    for step in range(50):
        state.throttled(NOW + step / 100, 0.1)
    state.throttled(NOW + 0.95, 0.0)  # sent before the pause, perhaps, and answered after it
    assert state.snapshot(NOW + 1, "key", 0).rate_factor == pytest.approx(0.7)
    assert state.snapshot(NOW + 1, "key", 0).tokens_available == pytest.approx(4200)
    for step, factor in enumerate([0.49, 0.343, 0.3, 0.3]):
        state.throttled(NOW + 10 * (step + 1), 5)
        state.throttled(NOW + 10 * (step + 1) + 4.9, 5)
        assert state.snapshot(NOW, "key", 0).rate_factor == pytest.approx(factor)


def test_a_lowered_rate_scales_requests_tokens_and_pacing() -> None:
    """The factor holds in every dimension, and a call that only the configured tpm can hold goes alone."""
    state = LimiterState(RateLimit(rpm=60, tpm=1000), NOW)
    state.throttled(NOW, 1)
    state.take(NOW + 1, 10)
    factor = state.snapshot(NOW + 1, "key", 0).rate_factor
    assert state.ready_at(NOW + 1, 10) == pytest.approx(NOW + 1 + 1.04 / factor, abs=0.01)
    at = state.ready_at(NOW + 1, 900)
    assert (NOW + 62 <= at <= NOW + 62.5, state.blocked_on) == (True, "tokens")
    assert state.ready_at(at, 900) <= at


def test_a_lowered_rate_grows_back_only_in_use() -> None:
    """Idle time restores nothing; a queue that presses on the limit restores it within a minute."""
    limit = RateLimit(rpm=600)
    state = LimiterState(limit, START - 1000)
    state.throttled(START - 1000, 1)
    while state.ready_at(START - 950, 0) <= START - 950:
        state.take(START - 950, 0)
    state = LimiterState.load(state.dump(), limit)
    for step in range(50):  # far below the limit
        debit = state.take(START - 900 + 10 * step, 0)
        state.give_back(debit, now=START - 900 + 10 * step, used=5, sent=True)
    assert state.snapshot(START, "key", 0).rate_factor == pytest.approx(0.75)  # for the one call that was delayed
    assert not state.idle(START)
    sent = saturate(limit, state=state, seconds=60)
    assert state.snapshot(START + 60, "key", 0).rate_factor == 1.0
    assert len([call for call in sent if call.at < START + 1]) <= 8
    assert len([call for call in sent if START + 20 <= call.at < START + 30]) >= 95


def test_it_finds_a_limit_below_the_configured_one() -> None:
    """Against a provider with half the configured rate, most of what it serves is used and few calls are refused."""
    state, now, end = LimiterState(RateLimit(rpm=1200), NOW), NOW, NOW + 600
    arrived: deque[float] = deque()
    served = refused = 0
    while now < end:
        at = state.ready_at(now, 0)
        if at > now:
            now = at
            continue
        debit = state.take(now, 0)
        while arrived and arrived[0] <= now - 1:
            arrived.popleft()
        if len(arrived) >= 10:
            refused += 1
            state.throttled(now, arrived[0] + 1 - now)
        else:
            served += 1
            arrived.append(now)
        state.give_back(debit, now=now, used=int(arrived[-1] == now), sent=True)
    assert served >= 0.6 * 6000
    assert refused <= 0.1 * served


def test_without_a_configured_rate_the_measured_one_is_lowered() -> None:
    """After a 429 a limiter without rpm and tpm allows 0.7 of what it saw, grows back in use and lets go."""
    limit = RateLimit()
    state = LimiterState(limit, START - 10)
    for step in range(200):
        at = START - 10 + step / 20
        state.give_back(state.take(at, 0), now=at, used=1, sent=True)
    state.throttled(START, 1)
    assert state.snapshot(START, "key", 0).rate_factor == pytest.approx(0.7)
    sent = saturate(limit, state=state, seconds=60, calls=3000)
    first = len([call for call in sent if START + 1 <= call.at < START + 3])
    assert 22 <= first <= 34  # 0.7 × 20 a second, growing by one a second
    assert len(sent) == 3000
    assert not state._feedback.slowed
    state = LimiterState(limit, NOW)
    state.give_back(state.take(NOW, 0), now=NOW, used=1, sent=True)
    state.throttled(NOW, 1)
    state.give_back(state.take(NOW + 2, 0), now=NOW + 2, used=1, sent=True)
    assert state.ready_at(NOW + 2, 0) == pytest.approx(NOW + 2 + 1.04 / 0.7, abs=0.01)  # at least one a second
    assert not state.idle(NOW + 50)
    assert state.idle(NOW + 64)
    state.take(NOW + 64, 0)
    assert state.snapshot(NOW + 64, "key", 0).rate_factor == 1.0


def test_without_any_measured_rate_a_throttle_only_pauses() -> None:
    """Calls without a limit are not counted before their first 429, so that there is no rate to lower yet."""
    state = LimiterState(RateLimit(), NOW)
    state.throttled(NOW, 1)
    assert state.ready_at(NOW, 0) == NOW + 1
    assert state.snapshot(NOW + 1, "key", 0).rate_factor == 1.0
    for step in range(100):
        at = NOW + 1 + step / 100
        assert state.ready_at(at, 0) <= at
        state.take(at, 0)
    state.throttled(NOW + 2, 1)
    assert state.ready_at(NOW + 3, 0) <= NOW + 3
    assert state.snapshot(NOW + 3, "key", 0).rate_factor == pytest.approx(0.7)


def test_a_measured_rate_never_falls_to_nothing() -> None:
    """However often it is throttled, a call goes every five seconds or so."""
    state = LimiterState(RateLimit(), NOW)
    now = NOW
    for _ in range(30):
        state.take(now, 0)
        state.throttled(now, 0.0)
        now = max(now + 1.1, state.ready_at(now, 0))
    state.take(now, 0)
    assert now + 1 <= state.ready_at(now, 0) <= now + 5.3


def test_headers_that_leave_less_are_believed_until_their_reset() -> None:
    """Less than we believe binds until the reset; more than our own limit never does; the latest headers count."""
    state = LimiterState(RateLimit(rpm=600, tpm=60_000), NOW)
    state.resync(NOW, {"requests": (2, 20.0), "tokens": (60_001, 20.0), "else": (0, 20.0)})
    debit = state.take(NOW, 100)
    assert state.snapshot(NOW, "key", 0)[1:5] == (1, 600, 59_900, 60_000)
    assert state.ready_at(NOW, 10) <= NOW
    state.take(NOW, 10)
    assert state.ready_at(NOW, 10) == NOW + 20
    assert state.blocked_on == "requests"
    state.give_back(debit, now=NOW, used=None, sent=False)
    assert state.ready_at(NOW, 10) <= NOW
    state.resync(NOW, {"requests": (0, 30.0), "tokens": (50, 40.0)})
    assert state.ready_at(NOW, 10) == NOW + 30
    assert state.ready_at(NOW, 51) == NOW + 40
    assert state.blocked_on == "tokens"
    assert not state.idle(NOW + 35)
    assert state.ready_at(NOW + 40, 51) <= NOW + 40
    state.resync(NOW + 41, {"requests": (0, 30.0)})
    state.resync(NOW + 41, {"requests": (600, 30.0)})
    assert state.ready_at(NOW + 41, 10) <= NOW + 41
    for nonsense in (math.nan, math.inf):
        state.resync(NOW + 41, {"requests": (nonsense, 30.0), "tokens": (0, -1.0)})
        assert state.ready_at(NOW + 41, 10) <= NOW + 41


def test_the_later_of_our_own_window_and_the_headers_holds() -> None:
    """With nothing left until 90 s from now and our own minute full, a call was sent after 62 s."""
    state = LimiterState(RateLimit(rpm=2, burst=2), NOW)
    for _ in range(2):
        state.take(NOW, 0)
    state.resync(NOW, {"requests": (0, 90.0)})
    assert state.ready_at(NOW, 0) == NOW + 90
    assert state.ready_at(NOW + 62, 0) == NOW + 90
    assert state.blocked_on == "requests"
    assert state.ready_at(NOW + 90, 0) <= NOW + 90


@pytest.mark.parametrize(("retry_after", "paused"), [(0.0, 1.0), (-3.0, 1.0), (1e9, LONGEST), (2.5, 2.5)])
def test_a_hint_of_zero_is_none_and_no_answer_pauses_a_key_for_an_hour(retry_after: float, paused: float) -> None:
    """A Retry-After of a thousand years stopped everybody who shared the key."""
    state = LimiterState(RateLimit(rpm=600), NOW)
    state.throttled(NOW, retry_after)
    assert state.snapshot(NOW, "key", 0).paused_for == pytest.approx(paused)


def test_headers_count_without_settings() -> None:
    """A limiter without rpm and tpm follows the headers alone."""
    state = LimiterState(RateLimit(), NOW)
    state.resync(NOW, {"requests": (1, 5.0)})
    debit = state.take(NOW, 10)
    assert state.ready_at(NOW, 10) == NOW + 5
    assert state.earliest(NOW, 10, 0) == NOW  # the call in flight may bring better news
    state.give_back(debit, now=NOW, used=10, sent=True)
    assert state.earliest(NOW, 10, 0) == NOW + 5


# -- refusing at once --------------------------------------------------------------------------------------------------
def test_earliest_is_a_lower_bound() -> None:
    """Whatever the calls ahead use, none behind them goes before its bound, and a full minute is seen through."""
    rng = random.Random(1)
    for limit in (RateLimit(rpm=30, burst=5), RateLimit(rpm=600, tpm=3000), RateLimit(rpm=90)):
        state, now, waiting, number = LimiterState(limit, NOW), NOW, deque[tuple[float, int]](), 0
        open_calls: list[Debit] = []
        for _ in range(1500):
            now += rng.random() * 0.3
            while rng.random() < 0.5 and len(waiting) < 80:
                tokens = rng.randrange(1, 60)
                waiting.append((state.earliest(now, tokens, len(waiting)), tokens))
            while open_calls and rng.random() < 0.5:
                used = rng.choice([0, 5, 60])
                state.give_back(open_calls.pop(rng.randrange(len(open_calls))), now=now, used=used, sent=True)
            if rng.random() < 0.002:
                state.throttled(now, None)
            while waiting and state.ready_at(now, waiting[0][1]) <= now:
                bound, tokens = waiting.popleft()
                open_calls.append(state.take(now, tokens))
                number += 1
                assert now >= bound - 1e-6
        assert number > 90
    state = LimiterState(RateLimit(rpm=60), NOW)
    assert state.earliest(NOW, 0, 59) >= NOW + 59
    assert state.earliest(NOW, 0, 150) >= NOW + 150
    state.throttled(NOW, 30)
    assert state.earliest(NOW, 0, 59) >= NOW + 30 + 59
    state = LimiterState(RateLimit(rpm=60, guard=10), NOW)
    for step in range(60):
        state.take(NOW + step * 1.04, 0)
    assert NOW + 70 <= state.earliest(NOW + 63, 0, 0) <= NOW + 70.5
    assert NOW + 75 <= state.earliest(NOW + 63, 0, 5) <= NOW + 76
    state = LimiterState(RateLimit(tpm=1000), NOW)
    debit = state.take(NOW, 1000)
    assert state.earliest(NOW, 500, 0) <= NOW  # may be refunded
    state.give_back(debit, now=NOW + 1, used=900, sent=True)
    assert NOW + 61 <= state.earliest(NOW + 1, 500, 0) <= NOW + 61.5


# -- keeping -----------------------------------------------------------------------------------------------------------
def test_a_dump_holds_everything() -> None:
    """A loaded state answers as the dumped one did, debits survive JSON, and another version is refused."""
    limit = RateLimit(rpm=600, tpm=6000, concurrency=3, burst=3)
    state = LimiterState(limit, NOW)
    debit = state.take(NOW, 500, 30)
    state.take(NOW + 1, 700)
    state.throttled(NOW + 1, 4)
    state.resync(NOW + 2, {"tokens": (10, 30.0)})
    other = LimiterState.load(state.dump(), limit)
    assert other.dump() == state.dump()
    assert other.snapshot(NOW + 2, "key", 1) == state.snapshot(NOW + 2, "key", 1)
    for one in (state, other):
        one.give_back(orjson.loads(orjson.dumps(debit)), now=NOW + 3, used=20, sent=True)
    assert other.dump() == state.dump()
    assert other.ready_at(NOW + 3, 10) == state.ready_at(NOW + 3, 10)
    for data in (b"[0,1]", b"{}", b"[]", b"nonsense"):
        with pytest.raises(ValueError):
            LimiterState.load(data, limit)


def test_new_settings_keep_the_counts() -> None:
    """Limits may change at any time, in place or on loading; what was sent still counts."""
    state = LimiterState(RateLimit(rpm=60, burst=60, tpm=1000), NOW)
    for _ in range(40):
        state.take(NOW, 10)
    state.reconfigure(RateLimit(rpm=100, burst=100, tpm=2000, guard=5.0, concurrency=40), NOW)
    assert state.snapshot(NOW, "key", 0)[1:7] == (60, 100, 1600, 2000, 40, 40)
    assert state.ready_at(NOW, 1) == math.inf
    state.reconfigure(RateLimit(rpm=50, burst=10, guard=0.0), NOW + 1)
    assert state.limit.burst == 10
    assert state.snapshot(NOW + 1, "key", 0)[1:5] == (10, 50, None, None)
    assert state.ready_at(NOW + 1, 1) > NOW + 12
    other = LimiterState.load(state.dump(), RateLimit(rpm=41, burst=41, guard=30.0))
    other.take(NOW + 61, 1)
    assert NOW + 90 <= other.ready_at(NOW + 61, 1) <= NOW + 90.5
    state.throttled(NOW + 2, 1)
    state.reconfigure(RateLimit(rpm=50, adaptive=False), NOW + 2)
    assert state.snapshot(NOW + 2, "key", 0).rate_factor == 1.0
    state = LimiterState(RateLimit(), NOW)
    state.throttled(NOW, 1)
    state.reconfigure(RateLimit(rpm=600), NOW)
    assert state.snapshot(NOW, "key", 0).rate_factor == 1.0


def test_settings_without_a_rate_keep_what_others_on_the_key_are_paced_by() -> None:
    """An LM without `rpm` on the same key and file forgot the last second of one that has it: too many went at once."""
    paced = RateLimit(rpm=600, burst=1)
    state = LimiterState(paced, NOW)
    state.take(NOW, 0)
    other = LimiterState.load(state.dump(), RateLimit())
    assert LimiterState.load(other.dump(), paced).dump() == state.dump()
