"""What one call hears of a text is another's only where it is about that text, and it is recorded as what it was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from dspy.utils.exceptions import LMError, LMInvalidRequestError, LMServerError, LMTimeoutError

import dspy_prod
from dspy_prod import Cache, Retry, call_context
from dspy_prod.context.scoring import raising
from dspy_prod.pipeline import embedding
from dspy_prod.testing import FakeClock
from tests.compose.support import Caller
from tests.e2e.support import until
from tests.embedding.conftest import MakeEmbedder


class Upstream:
    """A function that waits before it answers a text, and fails for some.

    Attributes:
        asked: the texts of each batch. errors: what it raises, by text. once: each of them once. gates: what it waits
            for, by text.
    """

    def __init__(self, **errors: LMError) -> None:
        self.asked: list[list[str]] = []
        self.errors = errors
        self.once = False
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, texts: list[str]) -> Any:
        self.asked.append(list(texts))
        for text in texts:
            gate = self.gates.get(text)
            assert gate is None or gate.wait(30)
        for text in texts:
            if text in self.errors:
                raise self.errors.pop(text) if self.once else self.errors[text]
        return [[float(len(text)), 1.0] for text in texts]

    def hold(self, *texts: str) -> None:
        for text in texts:
            self.gates[text] = threading.Event()

    def open(self, *texts: str) -> None:
        for text in texts:
            self.gates.pop(text).set()


def within(call: Callable[[], Any], **context: Any) -> Callable[[], Any]:
    def asking() -> Any:
        with call_context(**context):
            return call()

    return asking


def outcomes(embedder: Any, user: str) -> list[str]:
    return [record.outcome for record in embedder.ledger.records(user=user)][::-1]


# -- errors ----------------------------------------------------------------------------------------------------------
REFUSED = LMInvalidRequestError("input[1] is refused: 'bad'", status=400)
SLOW = LMTimeoutError("too slow", status=504)
DOWN = LMServerError("down", status=503)


@pytest.mark.parametrize(("error", "shared"), [(REFUSED, False), (SLOW, False), (DOWN, True)])
def test_a_batch_that_fails_for_a_text_fails_who_asks_for_that_one(
    make: MakeEmbedder, error: LMError, shared: bool
) -> None:
    """Whoever asked for another text of it was told that a stranger's was refused. An upstream that is down is down for
    all of them."""
    upstream = Upstream(bad=error)
    embedder = make(upstream, breaker=False)
    upstream.hold("good")
    leader = Caller(lambda: embedder(["good", "bad"]))
    until(lambda: upstream.asked)
    followers = [Caller(lambda text=text: embedder([text])) for text in ("good", "bad")]  # type: ignore[misc]
    until(lambda: embedder.pipeline.flights.following() == 2)
    upstream.open("good")
    assert isinstance(leader.outcome(), type(error))
    good, bad = [follower.outcome() for follower in followers]
    assert isinstance(bad, type(error))
    assert isinstance(good, type(error)) if shared else good.tolist() == [[4.0, 1.0]]
    assert sorted(upstream.asked[1:]) == ([] if shared else [["bad"], ["good"]])
    assert len(embedder.pipeline.flights) == 0


def test_a_text_that_is_refused_alone_is_refused_for_all_who_ask(make: MakeEmbedder) -> None:
    upstream = Upstream(bad=REFUSED)
    embedder = make(upstream)
    upstream.hold("bad")
    callers = [Caller(lambda: embedder("bad"))]
    until(lambda: upstream.asked)
    callers += [Caller(lambda: embedder("bad")) for _ in range(3)]
    until(lambda: embedder.pipeline.flights.following() == 3)
    upstream.open("bad")
    errors = [caller.outcome() for caller in callers]
    assert [type(error) for error in errors] == [LMInvalidRequestError] * 4
    assert len({id(error) for error in errors}) == 4
    assert upstream.asked == [["bad"]]


def test_a_retry_that_a_leader_had_no_time_for_is_made_by_who_has(make: MakeEmbedder) -> None:
    busy = LMServerError("busy", status=503, retry_after=2.0)
    upstream = Upstream(a=busy)
    embedder = make(upstream, retry=Retry(), breaker=False)
    upstream.hold("a")
    leader = Caller(within(lambda: embedder("a"), deadline=1.9))
    until(lambda: upstream.asked)
    follower = Caller(lambda: embedder("a"))
    until(lambda: embedder.pipeline.flights.following() == 1)
    upstream.once = True
    upstream.open("a")
    assert isinstance(leader.outcome(), LMServerError)
    assert follower.outcome().tolist() == [1.0, 1.0]
    assert upstream.asked == [["a"], ["a"]]


@pytest.mark.parametrize("way", ["call", "acall"])
def test_a_stale_vector_given_for_lack_of_time_is_for_those_who_have_no_more(make: MakeEmbedder, way: str) -> None:
    """Who has time for the retry gets a new one; its texts stand in a batch with others, which nobody follows."""
    clock = FakeClock()
    upstream = Upstream()
    kept = Cache(ttl=10, ttl_jitter=0, stale_if_error=1000)
    embedder = make(upstream, clock=clock, caching=kept, retry=Retry(), breaker=False)
    ask = (lambda: embedder(["a", "bb"])) if way == "call" else (lambda: asyncio.run(embedder.acall(["a", "bb"])))
    ask()
    clock.advance(11)
    upstream.errors, upstream.once = {"a": LMServerError("busy", status=503, retry_after=2.0)}, True
    upstream.hold("a")
    callers = [Caller(within(ask, deadline=1.9, user="hurried"))]
    until(lambda: len(upstream.asked) == 2)
    one = (lambda: embedder("a")) if way == "call" else (lambda: asyncio.run(embedder.acall("a")))
    callers += [Caller(within(one, deadline=1.8, user="as hurried")), Caller(within(one, user="patient"))]
    until(lambda: embedder.pipeline.flights.following() == 2)
    upstream.open("a")
    assert callers[0].outcome().tolist() == [[1.0, 1.0], [2.0, 1.0]]
    assert [caller.outcome().tolist() for caller in callers[1:]] == [[1.0, 1.0]] * 2
    assert upstream.asked[2:] == [["a"]]
    assert outcomes(embedder, "hurried") == ["error", "stale"]
    assert outcomes(embedder, "as hurried") == ["stale"]
    assert outcomes(embedder, "patient") == ["ok"]
    assert len(embedder.pipeline.flights) == 0


def test_what_is_scored_does_not_follow_what_leaves_a_busy_route_early(make: MakeEmbedder) -> None:
    upstream = Upstream()
    embedder = make(upstream)
    upstream.hold("a")

    def scored() -> Any:
        with raising():
            return embedder("a")

    callers = [Caller(lambda: embedder("a"))]
    until(lambda: len(upstream.asked) == 1)
    callers.append(Caller(scored))
    until(lambda: len(upstream.asked) == 2 or embedder.pipeline.flights.following())
    assert upstream.asked == [["a"], ["a"]]
    callers.append(Caller(scored))
    until(lambda: embedder.pipeline.flights.following() == 1)
    upstream.open("a")
    assert [caller.outcome().tolist() for caller in callers] == [[1.0, 1.0]] * 3
    assert len(upstream.asked) == 2
    assert len(embedder.pipeline.flights) == 0


# -- what came meanwhile ---------------------------------------------------------------------------------------------
def test_a_vector_that_comes_between_the_look_and_the_flight_is_a_hit(
    make: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left neither a record nor a hit."""
    upstream = Upstream()
    embedder = make(upstream)
    check = embedding._check_caps

    def landing(*of: Any) -> None:
        monkeypatch.undo()
        within(lambda: embedder(["x", "y"]), user="first")()
        check(*of)

    monkeypatch.setattr(embedding, "_check_caps", landing)
    within(lambda: embedder(["x", "y"]), user="second")()
    assert upstream.asked == [["x", "y"]]
    assert outcomes(embedder, "second") == ["cached"]
    assert embedder.pipeline.cache.stats().hits == 2


def test_who_is_passed_a_text_looks_whether_it_came_meanwhile(make: MakeEmbedder) -> None:
    upstream = Upstream()
    embedder = make(upstream)
    upstream.hold("x")
    leader = Caller(within(lambda: embedder("x"), deadline=1.0))
    until(lambda: upstream.asked)
    follower = Caller(within(lambda: embedder("x"), user="follows"))
    until(lambda: embedder.pipeline.flights.following() == 1)
    gate = upstream.gates.pop("x")
    within(lambda: embedder("x"), cache="refresh")()
    assert isinstance(leader.outcome(), dspy_prod.DeadlineExceededError)
    assert follower.outcome().tolist() == [1.0, 1.0]
    assert upstream.asked == [["x"], ["x"]]
    assert outcomes(embedder, "follows") == ["cached"]
    gate.set()


# -- records ---------------------------------------------------------------------------------------------------------
def test_what_a_follower_got_before_an_error_is_recorded(make: MakeEmbedder) -> None:
    upstream = Upstream(b=REFUSED)
    embedder = make(upstream)
    upstream.hold("a", "b")
    leaders = [Caller(lambda text=text: embedder(text)) for text in ("a", "b")]  # type: ignore[misc]
    until(lambda: len(upstream.asked) == 2)
    follower = Caller(within(lambda: embedder(["b", "a"]), user="follows"))
    until(lambda: embedder.pipeline.flights.following() == 2)
    upstream.open("a")
    leaders[0].outcome()
    upstream.open("b")
    assert isinstance(follower.outcome(), LMInvalidRequestError)
    assert outcomes(embedder, "follows") == ["cached"]


def test_a_follower_of_a_stale_vector_is_recorded_so(make: MakeEmbedder) -> None:
    upstream, clock = Upstream(), FakeClock()
    embedder = make(upstream, caching=Cache(ttl=10, ttl_jitter=0, stale_if_error=60), clock=clock)
    embedder("a")
    clock.advance(11)
    upstream.errors["a"] = DOWN
    upstream.hold("a")
    leader = Caller(lambda: embedder("a"))
    until(lambda: len(upstream.asked) == 2)
    follower = Caller(within(lambda: embedder("a"), user="follows"))
    until(lambda: embedder.pipeline.flights.following() == 1)
    upstream.open("a")
    assert leader.outcome().tolist() == follower.outcome().tolist() == [1.0, 1.0]
    assert outcomes(embedder, "follows") == ["stale"]


def test_a_follower_that_gives_up_is_recorded_with_its_wait(make: MakeEmbedder) -> None:
    upstream = Upstream()
    embedder = make(upstream)
    upstream.hold("a")
    leader = Caller(lambda: embedder("a"))
    until(lambda: upstream.asked)
    with pytest.raises(dspy_prod.DeadlineExceededError):
        within(lambda: embedder("a"), deadline=0.3, user="late")()
    upstream.open("a")
    leader.outcome()
    [record] = embedder.ledger.records(user="late")
    assert record.outcome == "refused"
    assert 0.25 < record.waited < 5
