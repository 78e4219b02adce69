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
from dspy_prod.testing import Provider, ScriptedEngine, Status
from tests.compose.support import MODEL, SPARE, Caller, Gate, following, over, until

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
