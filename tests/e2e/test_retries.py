"""What is tried again, when, and how often; and what goes to another model instead."""

from __future__ import annotations

import threading
from typing import Any, Literal

import pytest
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTransportError,
)

from dspy_prod import Retry, call_context
from dspy_prod.testing import MalformedJson, Provider, Reset, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, answers, ask, assert_equals_bill, charged, records, together, until
from tests.stopwatch import Stopwatch

Way = Literal["sync", "async"]
WAYS: list[Way] = ["sync", "async"]
ENGINES = ["lm15", "litellm"]
QUICK = Retry(attempts=3, backoff=0.01)
TOO_LONG = Status(400, error_code="context_length_exceeded")


def models(provider: Provider) -> list[str]:
    return [call.model for call in provider.calls]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [Status(500), Status(502), Status(503), Reset("before")], ids=lambda f: f.name)
def test_a_transient_failure_is_tried_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way, fault: Any
) -> None:
    """Two failures are survived by three attempts; the caller notices nothing."""
    provider = serve(faults=[fault, fault])
    lm = connect(provider, engine=engine, retry=QUICK)
    assert ask(lm, way) == ["ok"]
    assert [(record.attempt, record.outcome) for record in records(lm)] == [(1, "error"), (2, "error"), (3, "ok")]
    assert charged(lm) >= provider.bill.nano


@pytest.mark.parametrize("way", WAYS)
def test_when_all_attempts_fail_the_last_error_is_raised(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """Upstream errors keep DSPy's own classes and the provider's status."""
    provider = serve(faults=[Status(503), Reset("before"), Status(500)])
    lm = connect(provider, retry=QUICK)
    error = ask(lm, way)
    assert isinstance(error, LMServerError)
    assert error.status == 500
    assert len(provider.calls) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("status", "kind"), [(401, LMAuthError), (400, LMInvalidRequestError)])
def test_a_caller_s_mistake_is_not_tried_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way, status: int, kind: type[Exception]
) -> None:
    """A wrong key or request stays wrong: one attempt, no charge."""
    provider = serve(faults=Status(status))
    lm = connect(provider, engine=engine, retry=QUICK)
    assert isinstance(ask(lm, way), kind)
    assert len(provider.calls) == 1
    assert charged(lm) == 0


@pytest.mark.parametrize("way", WAYS)
def test_an_invalid_request_does_not_fall_back(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """Another model would refuse it too, and the caller has to know."""
    provider = serve(faults=Status(400))
    lm = connect(provider, retry=QUICK, fallbacks=[CHEAP])
    assert isinstance(ask(lm, way), LMInvalidRequestError)
    assert models(provider) == ["e2e"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_too_long_for_one_model_goes_to_the_next(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way
) -> None:
    """Context length is not retried, but a fallback may have room."""
    provider = serve(faults=lambda call: TOO_LONG if call.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, way) == ["ok"]
    assert models(provider) == ["e2e", "e2e-cheap"]
    assert [(record.route, record.error) for record in records(lm)] == [
        ("primary", "ContextWindowExceededError"),
        (CHEAP, None),
    ]
    assert_equals_bill(lm, provider)


def test_a_prompt_too_long_for_every_model_says_so(serve: MakeProvider, connect: MakeLM) -> None:
    """Without a route that has room the caller sees why."""
    provider = serve(faults=TOO_LONG)
    lm = connect(provider, retry=QUICK, fallbacks=[CHEAP])
    with pytest.raises(ContextWindowExceededError):
        lm("a question")
    assert models(provider) == ["e2e", "e2e-cheap"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_answer_is_not_paid_twice(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """What was generated and then garbled is owed; the same model is not asked again, another one is."""
    provider = serve(faults=[MalformedJson()])
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, "sync") == ["ok"]
    assert models(provider) == ["e2e", "e2e-cheap"]
    assert charged(lm) >= provider.bill.nano


@pytest.mark.parametrize(
    ("engine", "way", "status"), [("lm15", "sync", 429), ("lm15", "async", 503), ("litellm", "sync", 503)]
)
def test_retry_after_is_honoured(serve: MakeProvider, connect: MakeLM, engine: str, way: Way, status: int) -> None:
    """The provider's Retry-After wins over the backoff, and is not exceeded by much."""
    provider = serve(faults=[Status(status, retry_after=1)])
    lm = connect(provider, engine=engine, retry=QUICK)
    assert ask(lm, way) == ["ok"]
    first, second = (call.received_at for call in provider.calls)
    assert 1.0 <= second - first < 1.5


def test_a_crowd_waits_together_after_a_429(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A Retry-After pauses the key for everybody: nobody who comes later runs into it meanwhile."""
    provider = serve()
    lm = connect(provider, retry=QUICK, store=store_url)
    provider.faults = [Status(429, retry_after=1)]
    first = threading.Thread(target=lm, args=("refused at first",))
    first.start()
    provider.wait_until(lambda p: len(p.calls) == 1 and p.calls[0].status == 429, timeout=30)
    until(lambda: lm.pipeline.primary.state.throttled)
    assert len(answers(together("threads", lm, 8, calls=2))) == 16
    first.join(10)
    refused, *others = provider.calls
    assert len(others) == 17
    assert min(call.received_at for call in others) - refused.received_at >= 1.0


def test_an_unconfigured_limit_is_found_and_used(serve: MakeProvider, connect: MakeLM) -> None:
    """Without any setting, an upstream that allows a hundred a second is used at near that speed, and none are lost.

    Whoever is under way when the limit is met is refused, all 32 at once, and again until the first second has told how
    fast it may be. How many rounds that takes depends on how soon a refusal is heard of: 10 to 40 refusals on an idle
    machine, 105 were seen on one so busy that everything took twice as long. Three rounds of all are too many, by the
    time that the machine gave.
    """
    provider = serve(per_second=100, latency=(0.0, 0.05))
    lm = connect(provider, retry=Retry(attempts=20, backoff=0.1, budget=None))
    with Stopwatch() as took:
        assert len(answers(together("threads", lm, 32, calls=8))) == 256
    assert took.seconds < 8.0
    assert sum(call.status == 429 for call in provider.calls) < 3 * 32 * took.wall / took.seconds


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(serve: MakeProvider, connect: MakeLM) -> None:
    """A pause that the deadline has no room for ends the call with the provider's own error."""
    provider = serve(faults=[Status(429, retry_after=30)])
    lm = connect(provider, retry=QUICK)
    with call_context(deadline=5.0), pytest.raises(LMRateLimitError) as error:
        lm("a question")
    assert error.value.retry_after == pytest.approx(30, abs=1)
    assert len(provider.calls) == 1


def test_a_retry_budget_stops_a_storm(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """In an outage ten tokens allow five retries for everybody together, however many attempts each may make."""
    provider = serve(faults=Status(500))
    lm = connect(provider, retry=Retry(attempts=10, backoff=0.01, budget=10.0), breaker=False, store=store_url)
    outcomes = together("threads", lm, 16, calls=2)
    assert all(isinstance(each, LMServerError) for each in outcomes)
    assert len(provider.calls) == 32 + 5
    provider.faults = None
    together("threads", lm, 4, calls=2)
    provider.faults = [Status(500)]
    assert lm("tried again, for successes have filled the budget") == ["ok"]


@pytest.mark.parametrize("way", WAYS)
def test_a_dead_address_is_tried_again_and_costs_nothing(connect: MakeLM, way: Way) -> None:
    """A connection that was refused three times was never a call."""
    provider = Provider()
    with provider:
        lm = connect(provider, retry=QUICK)
    assert isinstance(ask(lm, way), LMTransportError)
    assert charged(lm) == 0
    assert [record.attempt for record in records(lm)] == [1, 2, 3]
