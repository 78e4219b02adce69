"""Answers with HTTP 200 that nobody can use: they are failures of the upstream, not answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from dspy.lm15 import Response, StreamDeltaEvent, StreamEndEvent, StreamStartEvent, TextDelta, Usage

import dspy_prod
from dspy_prod import Cache, Retry, UnusableAnswerError
from dspy_prod.policies.entries import dump, store_key
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.testing import ScriptedEngine, Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, ask, make_lm, outcome, records, request
from tests.pipeline.support import answer

ENGINES = ["lm15", "litellm"]
WAYS = ["sync", "async"]
QUICK = Retry(attempts=3, backoff=0.01)
TOLD = 5_850
"""What eleven tokens of input and seven of output cost, in nano-USD."""


def body(change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """A chat completion, as somebody has changed (it, its choice, its message)."""
    message = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "e2e", "choices": [choice], "usage": usage}
    if change is not None:
        change(whole, choice, message)
    return whole


def told(**message: Any) -> dict[str, Any]:
    return body(lambda _, __, said: said.update(message))


def finished(reason: str | None, **message: Any) -> dict[str, Any]:
    return body(lambda _, choice, said: (choice.update(finish_reason=reason), said.update(message))[0])


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    entry = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "e2e", "choices": [entry]}
    return f"data: {json.dumps(event)}\n\n"


START = chunk({"role": "assistant", "content": ""})
END = chunk({}, "stop")
USAGE = 'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"e2e","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}\n\n'  # noqa: E501
DONE = "data: [DONE]\n\n"

UNUSABLE = {
    "no choices": body(lambda whole, _, __: whole.update(choices=[])),
    "null choices": body(lambda whole, _, __: whole.update(choices=None)),
    "no content": told(content=None),
    "empty": told(content=""),
    "white": told(content=" \n\t"),
    "thoughts alone": told(content=None, reasoning_content="hm"),
    "error": finished("error"),
    "no end": finished(None),
    "no word of an end": body(lambda _, choice, __: choice.pop("finish_reason")),
    "out of resources": finished("insufficient_system_resource"),
    "error in 200": {"error": {"message": "no luck", "code": 502}},
}
USABLE = {
    "cut": finished("length", content=""),
    "filtered in part": finished("content_filter"),
    "refused": told(content=None, refusal="no"),
    "tool": finished(
        "tool_calls",
        content=None,
        tool_calls=[{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    ),
}


def stream(lm: Any, way: str) -> tuple[list[str], Any]:
    """The kinds of the events that were seen, and the error that ended them."""
    seen: list[str] = []

    async def in_task() -> None:
        try:
            async for event in lm._async_engine_spec.stream(request()):
                seen.append(event.type)
        finally:
            await lm.pipeline.aclose()

    def in_thread() -> None:
        seen.extend(event.type for event in lm._engine_spec.stream(request()))

    return seen, outcome(in_thread if way == "sync" else lambda: asyncio.run(in_task()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_answer_with_nothing_in_it_is_a_failure(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, name: str
) -> None:
    """It was "ok": not retried, no fallback, a success for the breaker, and `""` was kept for that input for ever."""
    provider = serve(faults=[Verbatim(UNUSABLE[name])] * 2)
    lm = connect(provider, engine=engine, retry=QUICK, cache=Cache())
    assert ask(lm, way) == ["ok"]
    assert lm.pipeline.primary.breaker.snapshot().failures == 2
    assert [record.outcome for record in records(lm)] == ["error", "error", "ok"]
    fallen = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP], cache=Cache())
    provider.faults = lambda asked: Verbatim(UNUSABLE[name]) if asked.model == "e2e" else None
    assert ask(fallen, way) == ["ok"]
    assert [record.model for record in records(fallen)] == [MODEL] * 3 + [CHEAP]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unusable_answer_is_charged_by_its_usage(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """The provider worked, and told what for."""
    lm = connect(serve(faults=Verbatim(told(content=""))), engine=engine, retry=QUICK)
    error = ask(lm, "sync")
    assert isinstance(error, UnusableAnswerError)
    assert error.flaw == "empty"
    assert error.partial.usage.input_tokens == 11
    assert [(record.cost_nano, record.estimated, record.error) for record in records(lm)] == [
        (TOLD, False, "UnusableAnswerError")
    ] * 3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_of_which_a_filter_left_nothing_is_not_asked_for_again(
    serve: MakeProvider, connect: MakeLM, engine: str
) -> None:
    """The same model would filter it again; another one may not. It is owed all the same."""
    provider = serve(
        faults=lambda asked: Verbatim(finished("content_filter", content="")) if asked.model == "e2e" else None
    )
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, "sync") == ["ok"]
    assert next((record.model, record.cost_nano or 0) for record in records(lm)) == (MODEL, TOLD)
    assert len(provider.calls) == 2
    assert lm.pipeline.primary.breaker.snapshot().failures == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", USABLE)
def test_what_somebody_can_use_is_an_answer(serve: MakeProvider, connect: MakeLM, engine: str, name: str) -> None:
    """Tools without a text, refusals, and what `max_tokens` or a filter left are answers; only tools are kept."""
    provider = serve(faults=Verbatim(USABLE[name]))
    lm = connect(provider, engine=engine, retry=QUICK, cache=Cache())
    assert not isinstance(ask(lm, "sync"), Exception)
    ask(lm, "sync")
    assert len(provider.calls) == (1 if name == "tool" else 2)


REFUSED_AT_ONCE = (
    chunk({"role": "assistant", "refusal": "I won't"}, "stop").strip()[:-1] + ", " + USAGE.partition('"choices":[],')[2]
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "refused",
    [chunk({"role": "assistant", "refusal": "I "}) + chunk({"refusal": "won't"}) + END + USAGE, REFUSED_AT_ONCE],
    ids=["in pieces", "at once"],
)
def test_a_refusal_in_a_stream_is_an_answer_and_is_not_kept(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, refused: str
) -> None:
    """It is one where it comes whole. A stream with nothing else was asked for again, as a failure of the provider, and
    usage that came in one event with it seemed to be told before it.
    """
    refused += DONE
    provider = serve(faults=Verbatim(refused))
    lm = connect(provider, engine=engine, retry=QUICK, cache=Cache())
    assert [stream(lm, way) for _ in range(2)] == [(["start", "end"], None)] * 2
    assert len(provider.calls) == 2
    assert [(record.outcome, record.cost_nano) for record in records(lm)] == [("ok", TOLD)] * 2
    assert lm.pipeline.primary.breaker.snapshot().failures == 0


def responses_events(kind: str) -> str:
    """A stream of the Responses API with one piece of this kind."""
    usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    whole = {"id": "r", "object": "response", "status": "completed", "model": "e2e", "output": [], "usage": usage}
    events = [
        {"type": "response.created", "response": {**whole, "status": "in_progress", "usage": None}},
        {"type": f"response.{kind}.delta", "output_index": 0, "delta": "I won't"},
        {"type": "response.completed", "response": whole},
    ]
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "calls"), [("refusal", 2), ("output_text", 1)])
def test_a_refusal_that_reads_as_text_is_not_kept(
    serve: MakeProvider, connect: MakeLM, way: str, kind: str, calls: int
) -> None:
    """The reader of the Responses API makes text of it, and it was the answer to that input from then on."""
    provider = serve(faults=Verbatim(responses_events(kind)))
    lm = connect(provider, cache=Cache(), model_type="responses")
    for _ in range(2):
        seen, error = stream(lm, way)
        assert (seen[:2], seen[-1], error) == (["start", "delta"], "end", None)
    assert len(provider.calls) == calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "calls"), [("refusal", 2), ("output_text", 1)])
def test_an_answer_that_is_made_of_a_stream_is_as_any_other(
    serve: MakeProvider, connect: MakeLM, way: str, kind: str, calls: int
) -> None:
    """Where a text is to end at `stop`, lm15 streams it by itself: what a stream tells beside it stayed in the answer,
    and a refusal was its text, which was kept.
    """
    provider = serve(faults=Verbatim(responses_events(kind)))
    lm = connect(provider, cache=Cache(), model_type="responses", stop=["END"])
    for _ in range(2):
        assert ask(lm, way) == [{"text": None if kind == "refusal" else "I won't"}]
        message = lm.history[-1]["response"].message
        assert (message.continuation, [part.type for part in message.parts]) == (
            (), ["refusal" if kind == "refusal" else "text"]
        )  # fmt: skip
    assert len(provider.calls) == calls
    assert {record.cost_nano for record in records(lm) if not record.cached} == {TOLD}


@pytest.mark.parametrize(("engine", "reason"), [("lm15", None), ("lm15", ""), ("litellm", "")])
def test_an_answer_that_does_not_say_why_it_ended_is_a_failure(
    serve: MakeProvider, connect: MakeLM, engine: str, reason: str | None
) -> None:
    """A text without its end may be half of one. (LiteLLM says "stop" for `null`, and shows nothing else.)"""
    lm = connect(serve(faults=[Verbatim(finished(reason))]), engine=engine, retry=QUICK)
    assert ask(lm, "sync") == ["ok"]
    assert records(lm)[0].error == "UnusableAnswerError"


@pytest.mark.parametrize("fault", [{"output": []}, {"status": "failed", "output": []}], ids=["empty", "failed"])
def test_a_response_without_output_is_a_failure(serve: MakeProvider, connect: MakeLM, fault: dict[str, Any]) -> None:
    """The same of the Responses API."""
    usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    whole = {"id": "r", "object": "response", "created_at": 1, "status": "completed", "model": "e2e", "usage": usage}
    lm = connect(serve(faults=[Verbatim({**whole, **fault})]), retry=QUICK, model_type="responses")
    assert ask(lm, "sync")
    assert next((record.outcome, record.cost_nano) for record in records(lm)) == ("error", TOLD)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "broken",
    [{"error": {"message": "no luck"}}, DONE, START, START + END + USAGE + DONE],
    ids=["json", "nothing", "cut", "empty"],
)
def test_a_stream_with_nothing_in_it_is_tried_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, broken: Any
) -> None:
    """A JSON error where a stream was asked, a clean end without a word: nothing was shown, so nobody notices."""
    lm = connect(serve(faults=[Verbatim(broken)] * 2), engine=engine, retry=QUICK)
    seen, error = stream(lm, way)
    assert error is None
    assert seen[0] == "start"
    assert seen[-1] == "end"
    assert seen.count("start") == seen.count("end") == 1
    assert [record.outcome for record in records(lm)] == ["error", "error", "ok"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rest", ["", DONE], ids=["cut", "done"])
def test_a_stream_cut_by_a_clean_end_is_no_answer(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, rest: str
) -> None:
    """LiteLLM says "stop" for it, and half a text was kept as the answer."""
    lm = connect(serve(faults=Verbatim(START + chunk({"content": "hel"}) + rest)), engine=engine, cache=Cache())
    seen, error = stream(lm, way)
    assert seen == ["start", "delta"]
    assert error.partial.text == "hel"
    (record,) = records(lm)
    assert (record.outcome, record.estimated) == ("error", True)
    assert lm.pipeline.primary.breaker.snapshot().failures == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rest", [USAGE, USAGE + DONE], ids=["cut", "done"])
@pytest.mark.parametrize("said", [chunk({"content": "hel"}), ""], ids=["half", "nothing"])
def test_a_stream_without_its_end_costs_what_it_told(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, rest: str, said: str
) -> None:
    """LiteLLM raises for it, and all of its bound was charged."""
    lm = connect(serve(faults=Verbatim(START + said + rest)), engine=engine)
    assert isinstance(stream(lm, way)[1], Exception)
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", TOLD, False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_count_that_runs_along_is_no_bill_of_a_stream_without_its_end(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """What was generated after it was free on the native engine."""
    usage = USAGE.partition('"choices":[],')[2].strip()[:-1]
    counted = chunk({"content": "hel"}).replace('"choices"', f'{usage},"choices"')
    lm = connect(serve(faults=Verbatim(START + counted)), engine=engine)
    assert stream(lm, way)[0] == ["start", "delta"]
    (record,) = records(lm)
    assert (record.outcome, record.estimated) == ("error", True)
    assert (record.cost_nano or 0) > TOLD


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rest", [USAGE + DONE, DONE], ids=["told", "untold"])
@pytest.mark.parametrize("reason", ["error", "ERROR", "insufficient_system_resource", "abort"])
def test_a_stream_that_its_provider_broke_off_is_no_answer(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, rest: str, reason: str
) -> None:
    """A provider whose backend failed in the middle says so at the end; the half text was shown as complete, and kept.

    With the usage in an event of its own, as OpenAI sends it, the native engine forgot the reason altogether.
    """
    provider = serve(faults=[Verbatim(START + chunk({"content": "hel"}) + chunk({}, reason) + rest)])
    lm = connect(provider, engine=engine, cache=Cache())
    seen, error = stream(lm, way)
    assert seen == ["start", "delta"]
    assert error.partial.text == "hel"
    (record,) = records(lm)
    assert record.outcome == "error"
    if engine == "lm15":  # LiteLLM gives up before it has read the usage
        assert record.estimated is (rest == DONE)
        assert record.estimated or record.cost_nano == TOLD
    assert lm.pipeline.primary.breaker.snapshot().failures == 1
    assert stream(lm, way)[0][-1] == "end", "it was not kept"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_broken_off_before_anything_was_seen_is_tried_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """Nobody notices."""
    lm = connect(serve(faults=[Verbatim(START + chunk({}, "error") + USAGE + DONE)]), engine=engine, retry=QUICK)
    seen, error = stream(lm, way)
    assert (seen[0], seen[-1], error) == ("start", "end", None)
    assert [record.outcome for record in records(lm)] == ["error", "ok"]


class Broken(ScriptedEngine):
    """An engine whose stream goes on after its end."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.after = after

    def stream(self, request: Any) -> Any:
        yield StreamStartEvent(id="1", model="e2e")
        yield StreamDeltaEvent(TextDelta("hello"))
        yield StreamEndEvent(finish_reason="stop", usage=Usage(input_tokens=11, output_tokens=7))
        if isinstance(self.after, Exception):
            raise self.after
        yield self.after


@pytest.mark.parametrize(
    "after", [RuntimeError("the connection broke"), StreamEndEvent(finish_reason="stop")], ids=["breaks", "ends twice"]
)
def test_a_stream_that_breaks_after_its_end_costs_what_it_told(after: Any) -> None:
    """It was charged its bound, unconfirmed, and the answer that had come whole was lost."""
    engine: Any = Broken(after)
    lm = make_lm("http://unused", engine=engine, async_engine=engine.asynchronous, api_key=None, api_base=None)
    seen, error = stream(lm, "sync")
    assert seen == ["start", "delta"]
    assert error.partial.text == "hello"
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", TOLD, False)
    assert (record.input_tokens, record.output_tokens) == (11, 7)


@pytest.mark.parametrize("place", ["memory", "sqlite"])
def test_an_empty_answer_kept_by_an_earlier_version_is_a_miss(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, place: str
) -> None:
    """That input never worked again."""
    provider = serve(answer="ok")
    lm = connect(provider, cache=Cache(), **({"store": sqlite_url} if place == "sqlite" else {}))
    lm("a question")
    cache = lm.pipeline.cache
    (key,) = cache._entries
    cache.clear()
    empty: Response = answer(text="")
    cache.put(key, empty, None)
    value = dump(empty, None)
    assert value is not None
    lm.pipeline.store.cache_put(
        store_key(key), CachedAnswer(value, float("inf"), float("inf")), max_entries=9, max_bytes=10_000
    )
    assert lm.pipeline.store.flush(10)
    assert lm("a question") == ["ok"]
    assert len(provider.calls) == 2


def test_an_unusable_answer_is_not_shared(serve: MakeProvider, connect: MakeLM) -> None:
    """Neither kept nor given to others who ask the same: they get the error, or ask for themselves."""
    provider = serve(faults=Verbatim(told(content="")))
    lm = connect(provider, cache=Cache())
    assert isinstance(outcome(lambda: lm("a question")), UnusableAnswerError)
    provider.faults = None
    assert lm("a question") == ["ok"]
    assert dspy_prod.UnusableAnswerError is UnusableAnswerError
