"""Who shares a call under way: those who would be sent the same, by the same, as patiently and as far.

Each test has two callers of one question and one cache, of which the second comes while the first is under way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, Price, RateLimit, Retry, Run, call_context
from dspy_prod.context.scoring import raising
from dspy_prod.testing import Provider, ScriptedEngine, Status
from tests.compose.support import A_CENT, MODEL, SPARE, Caller, Gate, down, following, idle, over, until

_numbers = itertools.count()
WAYS = pytest.mark.parametrize("way", ["call", "acall"])


def asking(lm: Any, way: str = "call", question: Any = "q") -> Callable[[], Any]:
    """The call, on a thread or in an event loop of its own."""
    return (lambda: lm(question)) if way == "call" else (lambda: asyncio.run(lm.acall(question)))


# -- what is sent ----------------------------------------------------------------------------------------------------
@WAYS
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_tokens": 77}, {"max_tokens": 99}),
        ({"temperature": 0.0}, {"temperature": 1.0}),
        ({"extra_body": {"style": "pirate"}}, {"extra_body": {"style": "formal"}}),
        ({"model_type": "chat"}, {"model_type": "text"}),
    ],
    ids=["max_tokens", "temperature", "extra", "type"],
)
def test_a_fallback_that_is_told_something_else_answers_another_request(
    way: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Given two LMs whose primary is down, when their fallbacks have other settings, then each gets its own answer."""

    def said(call: Any) -> str:
        names = ("max_completion_tokens", "temperature", "style", "prompt")
        return " ".join(f"{name}={call.body.get(name)}" for name in names)

    with Provider(faults=lambda _: Status(401)) as down, Provider(answer=said) as spare:
        store = f"memory://alike-{next(_numbers)}"

        def lm(**own: Any) -> dspy_prod.LM:
            last = dspy_prod.LM(SPARE, api_base=spare.url, api_key="k", store=store, **own)
            return dspy_prod.LM(MODEL, api_base=down.url, api_key="k", store=store, fallbacks=[last])

        lms = [lm(**one), lm(**other)]
        spare.hold()
        callers = [Caller(asking(lms[0], way))]
        spare.wait_until(lambda it: it.in_flight == 1)
        callers.append(Caller(asking(lms[1], way)))
        until(lambda: spare.in_flight == 2 or following(lms[0]))
        spare.release()
        answers = [caller.outcome() for caller in callers]
        assert all(isinstance(answer, list) for answer in answers)
        assert answers[0] != answers[1]
        for each in lms:
            each.close()


def test_a_fallback_of_an_embedder_that_is_told_something_else_is_asked_for_each() -> None:
    model = "openai/text-embedding-3-small"
    with Provider(faults=lambda _: Status(401)) as down, Provider() as spare:
        store = f"memory://alike-{next(_numbers)}"

        def embedder(user: str) -> Any:
            last = dspy_prod.Embedder(model, api_base=spare.url, api_key="k", store=store, user=user)
            return dspy_prod.Embedder(model, api_base=down.url, api_key="k", store=store, fallbacks=[last])

        embedders = [embedder("one"), embedder("two")]
        spare.hold()
        callers = [Caller(asking(embedders[0], question="q"))]
        spare.wait_until(lambda it: it.in_flight == 1)
        callers.append(Caller(asking(embedders[1], question="q")))
        until(lambda: spare.in_flight == 2 or following(embedders[0]))
        spare.release()
        assert all(len(caller.outcome()) for caller in callers)
        assert sorted(call.body["user"] for call in spare.calls) == ["one", "two"]
        for each in embedders:
            each.close()


def test_calls_that_another_engine_would_send_are_not_shared() -> None:
    """Given two LMs of one engine whose asynchronous counterparts are others, then each is asked by its own."""
    both, gate = ScriptedEngine("sync"), Gate("one")
    first, second = ScriptedEngine(gate), ScriptedEngine("two")
    store = f"memory://alike-{next(_numbers)}"
    lms = [over(both, cache=True, store=store).copy(async_engine=each.asynchronous) for each in (first, second)]
    leader = Caller(asking(lms[0], "acall"))
    assert gate.arrived.wait(30)
    other = Caller(asking(lms[1], "acall"))
    until(lambda: second.calls or following(lms[0]))
    gate.open()
    assert [leader.outcome(), other.outcome()] == [["one"], ["two"]]


def test_lms_made_alike_share_a_call_under_way_whatever_they_are_told() -> None:
    with Provider() as provider:

        def lm() -> dspy_prod.LM:
            own: dict[str, Any] = {"api_base": provider.url, "api_key": "k", "store": "memory://alike"}
            last = dspy_prod.LM(SPARE, max_tokens=77, stop=["x"], extra_body={"style": ["pirate"]}, **own)
            return dspy_prod.LM(MODEL, extra_headers={"a": "b"}, fallbacks=[last, "openai/third"], **own)

        one, other = lm(), lm()
        assert one.pipeline.flights is other.pipeline.flights
        one.close()
        other.close()


# -- whether it may be sent ------------------------------------------------------------------------------------------
def within(call: Callable[[], Any], **context: Any) -> Callable[[], Any]:
    """The call, in this context."""

    def asked() -> Any:
        with call_context(**context):
            return call()

    return asked


def spare(engine: ScriptedEngine, **own: Any) -> dspy_prod.LM:
    """A fallback without policies, and without a price."""
    off: dict[str, Any] = {"cache": False, "retry": False, "breaker": False, "max_tokens": 100}
    return dspy_prod.LM(
        SPARE, engine=engine, async_engine=engine.asynchronous, store=f"memory://alike-{next(_numbers)}", **off, **own
    )


@WAYS
@pytest.mark.parametrize("end", ["answers", "fails"])
@pytest.mark.parametrize(
    ("own", "others"),
    [
        ({"limit": RateLimit(tpm=10)}, {}),
        ({"limit": RateLimit(concurrency=1, max_wait=0)}, {"limit": RateLimit(concurrency=1, max_wait=30)}),
        ({"breaker": CircuitBreaker()}, {}),
        ({"breaker": CircuitBreaker()}, {"breaker": CircuitBreaker(failure_threshold=7)}),
    ],
    ids=["never_fits", "max_wait", "circuit", "another_circuit"],
)
def test_what_a_leader_s_own_limit_or_circuit_kept_from_it_is_asked_by_others(
    way: str, end: str, own: dict[str, Any], others: dict[str, Any]
) -> None:
    """Given a leader that its own limit or circuit sends to the fallback, then the other LM still asks the primary."""
    gate, busy = Gate("fallback" if end == "answers" else down()), Gate("busy")
    primary = ScriptedEngine(lambda request: busy(request) if "busy" in str(request.messages) else "primary")
    store = f"memory://alike-{next(_numbers)}"
    last = spare(ScriptedEngine([gate, "late"]))
    lms = [over(primary, cache=True, store=store, fallbacks=[last], **policies) for policies in (own, others)]
    if "breaker" in own:
        lms[0].pipeline.primary.breaker.force_open("test")
    sits = Caller(asking(lms[0], question="busy")) if "max_wait" in str(own) and "concurrency=1" in str(own) else None
    if sits is not None:
        assert busy.arrived.wait(30)
    leader = Caller(asking(lms[0], way))
    assert gate.arrived.wait(30)
    other = Caller(asking(lms[1], way))
    until(lambda: following(lms[0]) or not other.is_alive() or lms[1].pipeline.store.waiting())
    busy.open()
    gate.open()
    assert other.outcome() == ["primary"]
    assert leader.outcome() == ["fallback"] if end == "answers" else isinstance(leader.outcome(), Exception)
    assert sits is None or sits.outcome() == ["busy"]


@WAYS
@pytest.mark.parametrize("whose", ["run", "tokens", "budget", "prices"])
def test_a_fallback_that_a_leader_s_budget_or_run_could_not_bound_is_its_followers_to_ask(way: str, whose: str) -> None:
    """Given a leader whose money is counted and a fallback without a price, when the primary fails, then who follows
    uncounted gets the fallback's answer, and who is counted too hears the same."""
    gate = Gate(down())
    primary, second = ScriptedEngine([gate, down(), "none"]), ScriptedEngine("fallback")
    store = f"memory://alike-{next(_numbers)}"
    policies: dict[str, Any] = {"cache": True, "store": store, "prices": {MODEL: A_CENT}}
    last = (
        spare(second)
        if whose != "tokens"
        else dspy_prod.LM(
            SPARE, engine=second, async_engine=second.asynchronous, store=store, retry=False, breaker=False, cache=False
        )
    )
    if whose == "tokens":
        policies["max_tokens"] = None
        policies["prices"] = {MODEL: Price(input=0.0, output=1.0, max_output_tokens=100)}
    budget = Budget(usd=5)
    lm = over(primary, fallbacks=[last], **policies, **({"budget": budget} if whose in ("budget", "prices") else {}))
    other = lm
    if whose == "budget":
        other = lm.copy(budget=None)
    elif whose == "prices":
        other = lm.copy(prices={MODEL: A_CENT, SPARE: A_CENT})
    assert other.pipeline.flights is lm.pipeline.flights
    caps = {"run": {"usd": 5.0}, "tokens": {"tokens": 1000}}.get(whose)

    def counted() -> Callable[[], Any]:
        own = {} if caps is None else {"run": Run(**caps, store=f"memory://alike-{next(_numbers)}")}
        return within(asking(lm, way), **own)

    leader = Caller(counted())
    assert gate.arrived.wait(30)
    callers = [Caller(asking(other, way)), Caller(counted())]
    until(lambda: following(lm) == 2)
    gate.open()
    for caller in (leader, callers[1]):
        assert "cannot be bounded" in str(caller.outcome())
    assert callers[0].outcome() == ["fallback"]
    assert (primary.calls, second.calls) == (2, 1)
    assert idle(lm)


@WAYS
@pytest.mark.parametrize(
    "contexts",
    [
        [{"user": f"user {number}"} for number in range(5)],
        [{"priority": priority} for priority in ("low", "normal", "high", "high", "normal")],
    ],
    ids=["users", "priorities"],
)
def test_what_left_a_busy_route_answers_all_who_follow_it_at_once(way: str, contexts: list[dict[str, Any]]) -> None:
    """Given a leader that left a busy route, when callers follow that stand elsewhere in its line, then its fallback
    answers them all: one after another they would meet their deadlines."""
    gate, busy = Gate("fallback"), Gate("busy")
    lm = over(
        ScriptedEngine([busy, "primary"]), cache=True, retry=Retry(patience=0.0),
        limit=RateLimit(concurrency=1, fair_by="user"), fallbacks=[spare(ScriptedEngine([gate, "again"]))],
    )  # fmt: skip
    sits = Caller(asking(lm, question="busy"))
    assert busy.arrived.wait(30)
    leader = Caller(within(asking(lm, way), **contexts[0]))
    assert gate.arrived.wait(30)
    followers = [Caller(within(asking(lm, way), **each)) for each in contexts[1:]]
    until(lambda: following(lm) == len(followers))
    gate.open()
    assert [each.outcome() for each in (leader, *followers)] == [["fallback"]] * len(contexts)
    busy.open()
    assert sits.outcome() == ["busy"]
    assert idle(lm)


@WAYS
def test_what_is_scored_does_not_follow_what_left_a_busy_route(way: str) -> None:
    """Given a busy primary, when a call that is not scored has left it, then a scored one waits for it, as it would
    alone."""
    gate, busy = Gate("fallback"), Gate("busy")
    lm = over(
        ScriptedEngine([busy, "primary"]), cache=True, retry=Retry(patience=0.0), limit=RateLimit(concurrency=1),
        fallbacks=[spare(ScriptedEngine([gate, "again"]))],
    )  # fmt: skip

    def scored() -> Any:
        with raising():
            return asking(lm, way)()

    sits = Caller(asking(lm, question="busy"))
    assert busy.arrived.wait(30)
    leader = Caller(asking(lm, way))
    assert gate.arrived.wait(30)
    other = Caller(scored)
    until(lambda: following(lm) == 1 or lm.pipeline.store.waiting() == 1)
    gate.open()
    assert leader.outcome() == ["fallback"]
    busy.open()
    assert sits.outcome() == ["busy"]
    assert other.outcome() == ["primary"]
    assert idle(lm)
