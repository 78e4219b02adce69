"""How long a route is waited for while another one is left, and how long when none is."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.utils.exceptions import LMError, LMServerError

import dspy_prod
from dspy_prod import RateLimit, RateLimitedError, Retry, call_context
from dspy_prod.testing import Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, ask, outcome, records, request

ENGINES = ["lm15", "litellm"]
WAYS = ["sync", "async", "stream"]
DEFAULTS = Retry()


def call(lm: Any, way: str) -> Any:
    if way == "stream":
        return outcome(lambda: ["".join(e.delta.text for e in lm._engine_spec.stream(request()) if e.type == "delta")])
    return ask(lm, way)


@pytest.fixture
def pauses() -> Any:
    """Seconds of the pauses before retries."""
    found: list[float] = []

    def listen(event: Any) -> None:
        if event.name == "retry":
            found.append(event.data["pause"])

    stop = dspy_prod.add_listener(listen)
    yield found
    stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fault",
    [Status(429), Status(429, retry_after=20), Status(503, retry_after=30), Status(500), Status(402)],
    ids=["429", "429 in 20 s", "503 in 30 s", "500", "402"],
)
def test_a_healthy_fallback_is_asked_soon(
    serve: MakeProvider, connect: MakeLM, pauses: list[float], engine: str, way: str, fault: Any
) -> None:
    """With all defaults a fallback answered after 28 to 152 seconds."""
    provider = serve(faults=lambda asked: fault if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=DEFAULTS, fallbacks=[CHEAP])
    assert call(lm, way) == ["ok"]
    assert sum(pauses) <= DEFAULTS.patience
    last = records(lm)[-1]
    assert (last.route, last.outcome) == (CHEAP, "ok")
    assert last.waited <= DEFAULTS.patience + 0.5


def test_a_paused_key_is_not_waited_for_by_the_next_call(serve: MakeProvider, connect: MakeLM) -> None:
    """What is known to take longer than that is not even begun."""
    provider = serve(faults=lambda asked: Status(429, retry_after=20) if asked.model == "e2e" else None)
    lm = connect(provider, retry=DEFAULTS, fallbacks=[CHEAP])
    assert [lm(f"question {number}") for number in range(3)] == [["ok"]] * 3
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e-cheap", "e2e-cheap", "e2e-cheap"]
    assert max(record.waited for record in records(lm)) < 1.0


def test_a_full_limit_of_our_own_is_not_waited_for(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """Nor is one that we were told of beforehand: the second call stood ten seconds in line, with an idle fallback."""
    provider = serve()
    lm = connect(provider, retry=DEFAULTS, limit=RateLimit(rpm=6, burst=1), fallbacks=[CHEAP], store=store_url)
    assert [lm(f"question {number}") for number in range(2)] == [["ok"]] * 2
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e-cheap"]


def test_a_max_wait_of_ones_own_is_kept_to(serve: MakeProvider, connect: MakeLM) -> None:
    """Who says how long a call may wait for a slow local model means it, whatever else could answer."""
    provider = serve()
    limit = RateLimit(rpm=60, burst=1, max_wait=30)
    lm = connect(provider, retry=Retry(patience=0.0), limit=limit, fallbacks=[CHEAP])
    assert [lm(f"question {number}") for number in range(2)] == [["ok"]] * 2
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e"]


def test_a_route_that_was_left_early_is_tried_again_when_the_others_fail(serve: MakeProvider, connect: MakeLM) -> None:
    """Impatience must not cost an answer: the fallback is dead, and the first route would have answered."""
    provider = serve(
        faults=lambda asked: Status(401) if asked.model != "e2e" else Status(429, retry_after=3) if asked.index == 0
        else None
    )  # fmt: skip
    lm = connect(provider, retry=DEFAULTS, fallbacks=[CHEAP])
    assert lm("a question") == ["ok"]
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e-cheap", "e2e"]
    first, _, third = (asked.received_at for asked in provider.calls)
    assert third - first >= 3.0


def test_nothing_waits_beyond_the_deadline(serve: MakeProvider, connect: MakeLM) -> None:
    """Neither for the first route nor for its second turn."""
    provider = serve(faults=lambda asked: Status(429, retry_after=30) if asked.model == "e2e" else Status(401))
    lm = connect(provider, retry=DEFAULTS, fallbacks=[CHEAP])
    with call_context(deadline=5.0), pytest.raises(LMError):
        lm("a question")
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e-cheap"]


@pytest.mark.parametrize("fault", [Status(503), Status(429), Status(503, retry_after=1)], ids=["503", "429", "1 s"])
def test_max_wait_does_not_forbid_retries(serve: MakeProvider, connect: MakeLM, fault: Any) -> None:
    """With `max_wait=0` one attempt of three was made: it is about admission."""
    provider = serve(faults=[fault, fault])
    lm = connect(provider, retry=Retry(backoff=0.01), limit=RateLimit(rpm=600, burst=600, max_wait=0))
    assert lm("a question") == ["ok"]
    assert len(provider.calls) == 3


def test_max_wait_still_bounds_the_first_admission(serve: MakeProvider, connect: MakeLM) -> None:
    """A call that cannot go now is refused now."""
    lm = connect(serve(), limit=RateLimit(rpm=1, max_wait=0))
    lm("a question")
    with pytest.raises(RateLimitedError):
        lm("another question")


def test_without_another_route_the_error_stays_as_it_was(serve: MakeProvider, connect: MakeLM) -> None:
    """Nothing is added to what the only route said."""
    lm = connect(serve(faults=Status(500, "the server is down")), retry=Retry(attempts=1))
    error = outcome(lambda: lm("a question"))
    assert isinstance(error, LMServerError)
    assert "No route answered" not in str(error)
