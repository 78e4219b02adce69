"""Settling: each end of an attempt, told once to ledger, limiter, money and breaker, on whatever path it came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dspy.lm15 import Response
from dspy.utils.exceptions import LMRateLimitError, LMServerError, LMTimeoutError

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, RateLimit, call_context
from dspy_prod.errors import CircuitOpenError, DeadlineExceededError
from dspy_prod.pipeline import settling
from dspy_prod.pipeline.admission import admission
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.effects import Send
from dspy_prod.pipeline.plan import plan
from dspy_prod.pipeline.settling import failed, succeeded
from dspy_prod.pipeline.upstream.deadline import StalledError
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.runtime.reaper import REAPER, Reaper
from dspy_prod.stores.base import GRANTED, PENDING, WITHDRAWN
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, ScriptedEngine
from tests.compose.support import CENT, over, records
from tests.pipeline.support import answer, call_of

ALL: dict[str, Any] = {
    "budget": Budget(usd=1, name="all"),
    "limit": RateLimit(rpm=60, tpm=10_000),
    "breaker": CircuitBreaker(),
}


def lm_of(**policies: Any) -> dspy_prod.LM:
    clock = FakeClock()
    return over(ScriptedEngine("ok"), store=MemoryStore(clock=clock), clock=clock, **{**ALL, **policies})


def under_way(lm: dspy_prod.LM, sent: bool = True) -> Attempt:
    """An attempt as the flow leaves it at the upstream's door, or just before."""
    attempt = plan(call_of(lm), lm.pipeline.primary, 2)
    if attempt.reservation is not None:
        assert lm.pipeline.store.admit(attempt.reservation).state == GRANTED
    breaker = attempt.route.breaker
    if breaker is not None:
        attempt.permit = breaker.permit()
    attempt.until = attempt.call.attempt_until(attempt.route, attempt.started)
    if sent:
        attempt.send = Send(attempt.route, attempt.request, None, attempt.until, gone=True)
    advance(lm, 2.0)
    return attempt


def advance(lm: dspy_prod.LM, seconds: float) -> None:
    clock: Any = lm.pipeline.clock
    clock.advance(seconds)


def spent(lm: dspy_prod.LM) -> tuple[int, int]:
    """(spent, held) of the budget."""
    rule = lm.pipeline.budgets[0]
    account = rule.account(call_of(lm).context, lm.model, lm.pipeline.clock.time())
    state = lm.pipeline.store.account(account.key)
    return state.spent, state.held


def tokens_taken(lm: dspy_prod.LM) -> int:
    limiter = lm.pipeline.store.limiter(lm.pipeline.primary.limit_key)
    assert limiter is not None
    assert limiter.tokens_max is not None
    assert limiter.tokens_available is not None
    return round(limiter.tokens_max - limiter.tokens_available)


@contextmanager
def heard(lm: dspy_prod.LM) -> Iterator[list[Any]]:
    """The events of a block."""
    events: list[Any] = []
    remove = lm.pipeline.bus.add(events.append)
    try:
        yield events
    finally:
        remove()


# -- answered --------------------------------------------------------------------------------------------------------
def test_an_answer_is_charged_what_it_cost() -> None:
    """The bound was held; the real cost, the real tokens and the time it took are what stays."""
    lm = lm_of()
    attempt = under_way(lm)
    assert spent(lm) == (0, CENT)

    succeeded(attempt, answer(50))

    assert spent(lm) == (CENT // 2, 0)
    (record,) = records(lm)
    assert attempt.reservation is not None
    assert (record.id, record.attempt, record.outcome) == (attempt.reservation.id, 2, "ok")
    assert (record.cost_nano, record.estimated, record.output_tokens) == (CENT // 2, False, 50)
    assert (record.latency, record.started_at) == (2.0, lm.pipeline.clock.time() - 2.0)
    assert record.accounts == tuple(account.key for account in attempt.reservation.accounts)
    assert attempt.call.records == [record]
    breaker = attempt.route.breaker
    assert breaker is not None
    assert breaker.snapshot().successes == 1


def test_an_answer_without_usage_costs_its_bound() -> None:
    """The provider did not tell: the cost is the most it can be, marked as estimated."""
    lm = lm_of()
    succeeded(under_way(lm), answer(None))
    (record,) = records(lm)
    assert (record.cost_nano, record.estimated) == (CENT, True)
    assert spent(lm) == (CENT, 0)


def test_an_answer_that_reserved_nothing_is_recorded_all_the_same() -> None:
    """Without budget and limit the ledger still knows what it cost."""
    lm = lm_of(budget=None, limit=None, breaker=False)
    attempt = under_way(lm)
    assert attempt.reservation is None
    succeeded(attempt, answer(50))
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.accounts) == ("ok", CENT // 2, ())


def test_an_answer_above_its_bound_is_told_aloud() -> None:
    """It must not happen; when it does, the whole of it is charged, and listeners hear of it."""
    lm = lm_of()
    attempt = under_way(lm)
    with heard(lm) as events:
        succeeded(attempt, answer(150))
    assert [event.name for event in events] == ["budget_overrun", "call_finished"]
    assert spent(lm) == (CENT * 3 // 2, 0)


def test_the_time_in_a_consumers_hands_is_not_the_upstreams() -> None:
    """A slow reader of a stream must not open the circuit as a slow upstream would."""
    lm = lm_of(breaker=CircuitBreaker(slow_call_duration=1.5))
    for paused, slow in ((1.0, 0), (0.0, 1)):
        attempt = under_way(lm)
        attempt.call.paused = paused
        succeeded(attempt, answer())
        assert attempt.route.breaker is not None
        assert attempt.route.breaker.snapshot().slow == slow


# -- failed ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raised", "sent", "outcome", "cost", "failures"),
    [
        (LMServerError("down", status=500), True, "error", 0, 1),
        (LMServerError("late", status=504), True, "timeout", CENT, 1),
        (LMServerError("down", status=504), False, "timeout", 0, 1),
        (LMRateLimitError("slow down", status=429), True, "error", 0, 0),
        (KeyboardInterrupt(), True, "cancelled", CENT, 0),
        (asyncio.CancelledError(), True, "cancelled", CENT, 0),
        (asyncio.CancelledError(), False, None, 0, 0),
        (CircuitOpenError("meanwhile"), False, None, 0, 0),
        (ValueError("an engine's bug"), True, "error", CENT, 1),
    ],
)
def test_a_failure_owes_what_it_may_have_cost(
    raised: BaseException, sent: bool, outcome: str | None, cost: int, failures: int
) -> None:
    """Money is kept when the provider may have worked, and the breaker hears of what is the upstream's fault."""
    lm = lm_of()
    attempt = under_way(lm, sent)

    assert failed(attempt, raised) is raised

    assert [(record.outcome, record.cost_nano, record.estimated) for record in records(lm)] == (
        [] if outcome is None else [(outcome, cost, cost > 0)]
    )
    assert spent(lm) == (cost, 0)
    breaker = attempt.route.breaker
    assert breaker is not None
    assert breaker.snapshot().failures == failures
    assert lm.pipeline.store.holds() == 0


def test_a_failure_before_anything_was_reserved_is_recorded_alone() -> None:
    """An engine that cannot be built has cost nothing, and must be seen in the ledger."""
    lm = lm_of()
    attempt = plan(call_of(lm), lm.pipeline.primary, 1)
    failed(attempt, ImportError("no such engine"))
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.error) == ("error", 0, "ImportError")
    assert record.accounts == ()
    assert attempt.reservation is not None
    assert attempt.reservation.state == WITHDRAWN


@pytest.mark.parametrize(("raised", "deadline", "kind", "failures"), [
    (AttemptTimeoutError(), None, LMTimeoutError, 1),
    (AttemptTimeoutError(), 1.0, DeadlineExceededError, 0),
    (StalledError(), 1.0, LMTimeoutError, 1),
])  # fmt: skip
def test_a_time_limit_is_the_routes_or_the_callers(
    raised: AttemptTimeoutError, deadline: float | None, kind: type[Exception], failures: int
) -> None:
    """`timeout` says something about the upstream; a caller's hurry does not, and its refusal is final."""
    lm = lm_of(timeout=5)
    clock: Any = lm.pipeline.clock
    with call_context(deadline=deadline, clock=clock):
        attempt = under_way(lm)
    error = failed(attempt, raised)
    assert type(error) is kind
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("timeout", CENT, True)
    assert attempt.route.breaker is not None
    assert attempt.route.breaker.snapshot().failures == failures


def test_a_time_limit_that_is_noticed_after_the_deadline_is_the_callers() -> None:
    """A machine so busy that an attempt's `timeout` ends it late: the call's time is over, and that is what it says."""
    lm = lm_of(timeout=5)
    clock: Any = lm.pipeline.clock
    with call_context(deadline=8, clock=clock):
        attempt = under_way(lm)
    advance(lm, 7.0)
    assert type(failed(attempt, AttemptTimeoutError())) is DeadlineExceededError
    assert attempt.route.breaker is not None
    assert attempt.route.breaker.snapshot().failures == 1, "the upstream had more than its time"


def test_a_429_is_told_to_the_limiter() -> None:
    """From now on the store is asked, even where no limit was configured."""
    lm = lm_of(limit=None)
    attempt = under_way(lm)
    with heard(lm) as events:
        failed(attempt, LMRateLimitError("slow down", status=429, retry_after=7.0))
    assert attempt.route.state.throttled
    told = {event.name: event for event in events}
    assert told["throttled"].data["retry_after"] == 7.0
    wait, _ = lm.pipeline.store.preview(_reservation(plan(call_of(lm), lm.pipeline.primary, 1)))
    assert wait == pytest.approx(7.0, abs=0.1)


# -- left ------------------------------------------------------------------------------------------------------------
def test_who_leaves_has_the_reaper_settle() -> None:
    """The garbage collector may run this path under any lock: nothing is done on its thread."""
    lm = lm_of()
    attempt = under_way(lm)
    gone = GeneratorExit()
    with lm.pipeline.store._lock:  # type: ignore[attr-defined]
        assert failed(attempt, gone) is gone
    assert REAPER.flush()
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.latency) == ("cancelled", CENT, 2.0)
    assert spent(lm) == (CENT, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_place_in_line_is_given_back(error: BaseException, meanwhile: bool) -> None:
    """Whether it still waits or was granted in the meantime: nothing stays held, and nothing is charged."""
    lm = lm_of(budget=Budget(usd=0.01, name="all"))
    first, second = under_way(lm), plan(call_of(lm), lm.pipeline.primary, 1)
    reservation = _reservation(second)
    assert lm.pipeline.store.admit(reservation).state == PENDING
    if meanwhile:
        failed(first, LMServerError("down", status=500))
        assert reservation.state == GRANTED
    assert failed(second, error) is error
    assert REAPER.flush()
    assert records(lm)[1:] == []
    assert spent(lm) == (0, 0 if meanwhile else CENT)
    assert lm.pipeline.store.waiting() == 0


def test_a_call_that_is_planned_anew_in_line_gives_back_what_it_was_granted_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The day of a budget ended while it waited, and Ctrl-C came just after the grant on the account of the new one."""
    lm = lm_of(budget=Budget(usd=0.01, per="day", name="all"))
    under_way(lm)
    attempt, store = plan(call_of(lm), lm.pipeline.primary, 1), lm.pipeline.store
    first = _reservation(attempt)
    assert store.admit(first).state == PENDING
    steps = admission(attempt)
    next(steps)
    advance(lm, 86_400.0)
    admit = store.admit

    def interrupted(reservation: Any) -> None:
        assert admit(reservation).state == GRANTED
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "admit", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        steps.send(None)
    assert _reservation(attempt) is not first
    assert (store.holds(), store.waiting()) == (2, 0)
    failed(attempt, caught.value)
    assert (store.holds(), store.waiting()) == (1, 0)


def test_settling_that_was_interrupted_is_gone_through_again() -> None:
    """Each listener is interrupted as it hears of it; then what is left is done, and nothing twice."""
    for script in (None, LMServerError("late", status=504), LMRateLimitError("slow down", status=429)):
        lm = lm_of(breaker=CircuitBreaker(failure_threshold=1))
        attempt, heard = under_way(lm), []

        def interrupted(event: Any, heard: list[Any] = heard) -> None:
            heard.append(event.name)
            raise KeyboardInterrupt

        remove = lm.pipeline.bus.add(interrupted)
        for _ in range(4):
            try:
                if script is None and not heard:
                    succeeded(attempt, answer(50))
                failed(attempt, script or KeyboardInterrupt())
            except KeyboardInterrupt:
                continue
        remove()
        (record,) = records(lm)
        cost = CENT // 2 if script is None else CENT if isinstance(script, LMServerError) else 0
        assert (record.cost_nano, spent(lm)) == (cost, (cost, 0))
        assert len(heard) == len(set(heard))
        assert attempt.call.records == [record]
        assert breaker_of(attempt).total_successes == (script is None)
        assert breaker_of(attempt).total_failures == isinstance(script, LMServerError)


# -- late ------------------------------------------------------------------------------------------------------------
class Late:
    """An attempt that goes on in its worker after nobody waits for it."""

    heard = False

    def __init__(self) -> None:
        self.report: Callable[[Any, Any], None] | None = None

    def on_end(self, report: Callable[[Response | None, BaseException | None], None]) -> None:
        self.report = report


@pytest.mark.parametrize(
    ("raised", "outcome", "error"),
    [
        (AttemptTimeoutError(), "timeout", "LMTimeoutError"),
        (KeyboardInterrupt(), "cancelled", "KeyboardInterrupt"),
        (GeneratorExit(), "cancelled", "GeneratorExit"),
        (TimeoutError("an alarm rang"), "error", "TimeoutError"),
    ],
    ids=["time limit", "Ctrl-C", "let fall", "alarm"],
)
@pytest.mark.parametrize(
    ("response", "failure", "cost", "estimated"),
    [
        (answer(20), None, CENT // 5, False),
        (answer(None), None, CENT, True),
        (None, LMServerError("down", status=500), 0, False),
        (None, LMServerError("late", status=504), CENT, True),
        (None, None, CENT, True),
    ],
)
def test_an_abandoned_attempt_is_settled_when_it_ends(
    response: Response | None, failure: BaseException | None, cost: int, estimated: bool, raised: BaseException,
    outcome: str, error: str,
) -> None:  # fmt: skip
    """Until then its money is held; then it is charged what it really came to, as far as that is known."""
    lm = lm_of(timeout=2)
    attempt, late = under_way(lm), Late()
    assert attempt.send is not None
    attempt.send.late = late
    assert type(failed(attempt, raised)).__name__ == error
    assert REAPER.flush()
    assert (spent(lm), records(lm)) == ((0, CENT), [])
    advance(lm, 3.0)
    assert late.report is not None
    late.report(response, failure)
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == (outcome, cost, estimated)
    assert (record.latency, record.error) == (5.0, error), "the error that its caller had"
    assert spent(lm) == (cost, 0)
    assert attempt.call.records == [record]


@pytest.fixture
def reaper(monkeypatch: pytest.MonkeyPatch) -> Reaper:
    """One of its own, for the end of a process: that of this one keeps what other tests have left."""
    reaper = Reaper()
    monkeypatch.setattr(settling, "REAPER", reaper)
    reaper.start()
    return reaper


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [(AttemptTimeoutError(), "timeout"), (KeyboardInterrupt(), "cancelled"), (GeneratorExit(), "cancelled")],
    ids=["time limit", "Ctrl-C", "let fall"],
)
@pytest.mark.parametrize("gone", [True, False], ids=["sent", "connecting"])
def test_an_abandoned_attempt_is_settled_when_its_process_ends_before_it(
    reaper: Reaper, raised: BaseException, outcome: str, gone: bool
) -> None:
    """Its seat was taken until the lease ended. It may go out until the very end, so its bound is owed."""
    lm = lm_of(timeout=2)
    attempt, late = under_way(lm), Late()
    assert attempt.send is not None
    attempt.send.late, attempt.send.gone = late, gone
    failed(attempt, raised)
    assert reaper.finish(5)
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == (outcome, CENT, True)
    assert spent(lm) == (CENT, 0)
    assert late.report is not None
    late.report(answer(20), None)  # its thread runs on for a moment
    assert records(lm) == [record]
    assert spent(lm) == (CENT, 0)


def test_an_abandoned_attempt_that_has_ended_is_not_settled_again_by_the_end_of_its_process(reaper: Reaper) -> None:
    lm = lm_of(timeout=2)
    attempt, late = under_way(lm), Late()
    assert attempt.send is not None
    attempt.send.late = late
    failed(attempt, KeyboardInterrupt())
    assert late.report is not None
    late.report(answer(20), None)
    assert reaper.finish(5)
    assert len(records(lm)) == 1
    assert spent(lm) == (CENT // 5, 0)


def test_the_tokens_of_a_failure_are_given_back_unless_they_may_be_used() -> None:
    """What the provider refused it did not count; what it may have worked on it did."""
    lm = lm_of()
    attempt = under_way(lm)
    reserved = tokens_taken(lm)
    assert reserved == _reservation(attempt).tokens
    failed(attempt, LMServerError("down", status=500))
    assert tokens_taken(lm) == 0
    failed(under_way(lm), LMServerError("late", status=504))
    assert tokens_taken(lm) == pytest.approx(reserved, abs=5)


def test_settling_raises_nothing_of_its_own() -> None:
    """What a listener does wrong is its own affair."""
    lm = lm_of()

    def broken(_: Any) -> None:
        raise RuntimeError("a listener's bug")

    remove = lm.pipeline.bus.add(broken)
    try:
        failed(under_way(lm), LMServerError("down", status=500))
        succeeded(under_way(lm), answer())
    finally:
        remove()
    assert [record.outcome for record in records(lm)] == ["error", "ok"]


def breaker_of(attempt: Attempt) -> Any:
    assert attempt.route.breaker is not None
    return attempt.route.breaker.snapshot()


def _reservation(attempt: Attempt) -> Any:
    assert attempt.reservation is not None
    return attempt.reservation
