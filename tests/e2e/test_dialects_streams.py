"""Broken streams in the dialects that LiteLLM translates are judged as the native engine judges them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from dspy_prod import CircuitBreaker
from dspy_prod.testing.dialects import dumps
from tests.e2e.support import ask, outcome, records, request
from tests.e2e.test_dialects import ANTHROPIC, COUNTS, TOLD, Server, end, lm_at, server
from tests.e2e.test_unusable import DONE, END, START, USAGE, WAYS, chunk

__all__ = ["server"]

AT_END = {"input_tokens": 11, "output_tokens": 7}


def streamed(lm: Any, way: str) -> tuple[list[str], Any]:
    """The kinds of the events that were seen, and the error that ended them."""
    asked = request(model=lm.model, max_tokens=50)
    seen: list[str] = []

    async def in_task() -> None:
        try:
            async for event in lm._async_engine_spec.stream(asked):
                seen.append(event.type)
        finally:
            await lm.pipeline.aclose()

    def in_thread() -> None:
        for event in lm._engine_spec.stream(asked):
            seen.append(event.type)

    return seen, outcome(in_thread if way == "sync" else lambda: asyncio.run(in_task()))


PIECE = {"candidates": [{"content": {"parts": [{"text": "hello"}], "role": "model"}, "index": 0}]}
ERRORS: list[Any] = [
    {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}},
    {"error": {"code": 429, "message": "busy", "status": "RESOURCE_EXHAUSTED"}},
    {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_a_stream_that_ends_with_an_error_is_owed(server: Server, engine: str, way: str) -> None:
    """LiteLLM says of it what it says of a request that was refused, and three deltas cost nothing."""
    server.kind = "text/event-stream"
    for error in ERRORS:
        server.body = b"".join(b"data: " + dumps(each) + b"\r\n\r\n" for each in [PIECE, PIECE, PIECE, error])
        lm = lm_at(server.url, "gemini", engine)
        seen, said = streamed(lm, way)
        assert seen[:2] == ["start", "delta"]
        assert isinstance(said, Exception)
        [record] = records(lm)
        assert (record.outcome, record.estimated) == ("error", True)
        assert (record.cost_nano or 0) > TOLD
        lm.close()


def piece(reason: str | None = None, counts: Any = COUNTS) -> str:
    """An event of Google's."""
    said = {"content": {"parts": [{"text": "hello"}], "role": "model"}, "index": 0}
    candidate = said if reason is None else {**said, "finishReason": reason}
    return json.dumps({"candidates": [candidate], **({} if counts is None else {"usageMetadata": counts})})


def message(stop: str | None = "end_turn", told: Any = AT_END, *between: str) -> list[str]:
    """The events of Anthropic's."""
    start = {**ANTHROPIC, "content": [], "stop_reason": None, "usage": {"input_tokens": 11, "output_tokens": 1}}
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}}
    return [
        json.dumps({"type": "message_start", "message": start}),
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        json.dumps(text),
        *between,
        '{"type":"content_block_stop","index":0}',
        json.dumps({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": told}),
        '{"type":"message_stop"}',
    ]


def failed(kind: str) -> str:
    return json.dumps({"type": "error", "error": {"type": kind, "message": "no"}})


STREAMS: dict[str, list[list[str]]] = {
    "gemini": [
        [piece(), piece("STOP")], [piece(counts=None), piece("STOP", None)], [piece(), piece()], [], ["{}"],
        [piece(), '{"candidates":null}', piece("STOP")], *[[json.dumps(error)] for error in ERRORS],
        [piece(), piece("STOP", {**COUNTS, "candidatesTokenCount": 7.5})],
    ],
    "anthropic": [
        message(), message(told={}), message(None, {}), message()[:4], [], message("end_turn", AT_END, "null"),
        message("end_turn", AT_END, "[1]"), message("end_turn", AT_END, '{"a":'), [failed("overloaded_error")],
        [failed("invalid_request_error")], [failed("rate_limit_error")],
        message("end_turn", AT_END, failed("overloaded_error")), message(None), message()[:1],
    ],
}  # fmt: skip


def written(events: list[str]) -> bytes:
    """As they are sent: Anthropic names its events."""
    named = [re.match(r'\{"type": ?"(\w+)"', each) for each in events]
    return "".join(
        [
            f"event: {name[1]}\ndata: {each}\n\n" if name else f"data: {each}\n\n"
            for name, each in zip(named, events, strict=True)
        ]
    ).encode()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dialect", STREAMS)
def test_a_broken_stream_ends_alike_on_both_engines(server: Server, dialect: str, way: str) -> None:
    """One that was cut passed for complete, for LiteLLM says "stop", and what it had told so far was the charge."""
    server.kind = "text/event-stream"
    for events in STREAMS[dialect]:
        server.body = written(events)
        ends = []
        for engine in ("lm15", "litellm"):
            lm = lm_at(server.url, dialect, engine)
            seen, said = streamed(lm, way)
            booked = [(record.outcome, record.cost_nano) for record in records(lm)]
            ends.append((seen[:2], seen[-1:] == ["end"], isinstance(said, Exception), booked))
            lm.close()
        assert ends[0] == ends[1], events
        assert all(cost >= TOLD for _, cost in ends[0][3]), events


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_whole_number_is_no_count_in_a_stream(server: Server, way: str) -> None:
    """LiteLLM took `true` for one token of Anthropic's, and 11.5 for eleven."""
    server.kind = "text/event-stream"
    for name in AT_END:
        for counter in (True, 11.5, "7"):
            server.body = written(message("end_turn", {**AT_END, name: counter}))
            lm = lm_at(server.url, "anthropic")
            streamed(lm, way)
            [record] = records(lm)
            assert record.estimated, (name, counter)
            assert (record.cost_nano or 0) > TOLD
            lm.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("dialect", ["gemini", "anthropic", "groq"])
def test_what_is_called_a_counter_elsewhere_in_a_stream_says_nothing_against_its_usage(
    server: Server, dialect: str, engine: str, way: str
) -> None:
    """The bound was charged of a stream that LiteLLM read, though the usage had been told where it belongs."""
    server.kind = "text/event-stream"
    whole = {
        "gemini": [piece(), piece("STOP")],
        "anthropic": message(),
        "groq": lines(START + chunk({"content": "hello"}) + END + USAGE + DONE),
    }[dialect]
    for stray in ('"prompt_tokens":true', '"output_tokens":"7"', '"promptTokenCount":1.5', '"input_tokens":-1'):
        for place in (0, 1):
            events = [*whole]
            events[place] = "{" + stray + "," + events[place][1:]
            server.body = written(events)
            lm = lm_at(server.url, dialect, engine)
            seen, said = streamed(lm, way)
            assert (seen[-1], said) == ("end", None), events
            [record] = records(lm)
            assert (record.cost_nano, record.estimated) == (TOLD, False), events
            lm.close()


OUTPUT = {"output_tokens": 7}
BEGUN: dict[str, Any] = {"input_tokens": 11, "cache_read_input_tokens": 1_000, "cache_creation_input_tokens": 500}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_the_beginning_of_a_stream_counts_the_input_where_its_end_does_not(
    server: Server, engine: str, way: str
) -> None:
    """As in the basic example of Anthropic's: the native engine charged the bound, or what came from the cache as free.

    An end that counts the input again has the last word, and a count that is none is not believed.
    """
    whole = {**ANTHROPIC, "usage": {**BEGUN, "output_tokens": 7}}
    server.body, server.kind = dumps(whole), "application/json"
    exact = lm_at(server.url, "anthropic", "lm15")
    assert ask(exact, way) == ["hello"]
    [told] = records(exact)
    exact.close()
    server.kind = "text/event-stream"
    for begun, at_end in [
        (BEGUN, OUTPUT), (BEGUN, AT_END), ({"input_tokens": 1}, {**BEGUN, **OUTPUT}),
        ({**BEGUN, "input_tokens": True}, OUTPUT), ({**BEGUN, "input_tokens": 11.5}, OUTPUT),
    ]:  # fmt: skip
        start = {**ANTHROPIC, "content": [], "stop_reason": None, "usage": {**begun, "output_tokens": 1}}
        server.body = written([json.dumps({"type": "message_start", "message": start}), *message(told=at_end)[1:]])
        lm = lm_at(server.url, "anthropic", engine)
        assert streamed(lm, way)[0] == ["start", "delta", "end"]
        [record] = records(lm)
        assert record.outcome == "ok"
        if type(begun["input_tokens"]) is int:
            assert (record.cost_nano, record.estimated) == (told.cost_nano, False), (begun, at_end)
        else:
            assert record.estimated
        lm.close()


def lines(text: str) -> list[str]:
    """The events of OpenAI's, as they are put together elsewhere."""
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


HELLO = chunk({"content": "hello"})
OVER = json.dumps({"candidates": [{"finishReason": "STOP", "index": 0}]})
COUNTED = json.dumps({"usageMetadata": COUNTS})
NOT_COUNTED = 'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"e2e","choices":[],"usage":{}}\n\n'
UNTOLD = json.dumps({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": None}})
LAST: dict[str, list[list[str]]] = {
    "gemini": [[piece("STOP", None), piece()], [piece("STOP"), OVER], [piece(), OVER], [piece("STOP", None), COUNTED]],
    "anthropic": [[*message()[:-1], UNTOLD, message()[-1]]],
    "groq": [
        lines(START + HELLO + END + USAGE + NOT_COUNTED + DONE),
        lines(START + HELLO + USAGE + END + DONE),
    ],
}
MORE: dict[str, list[list[str]]] = {
    "gemini": [
        [COUNTED, piece("STOP", None)],
        [piece(), piece("STOP", None)],
        [piece("STOP"), piece(counts=None)],
        [piece("STOP", None), piece(None, {**COUNTS, "candidatesTokenCount": True})],
    ],
    "anthropic": [[*message()[:-1], message()[2], message()[-1]]],
    "groq": [lines(START + USAGE + HELLO + END + DONE), lines(START + HELLO + END + USAGE + HELLO + DONE)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("dialect", LAST)
def test_the_usage_that_was_told_last_holds_unless_more_came_behind_it(
    server: Server, dialect: str, engine: str, way: str
) -> None:
    """Natively, Gemini's beside a text behind the end was lost, one without counts took back what had been told, and
    a count that stood before the text was all that was charged.
    """
    server.kind = "text/event-stream"
    for told, streams in ((True, LAST[dialect]), (False, MORE[dialect])):
        for events in streams:
            server.body = written(events)
            lm = lm_at(server.url, dialect, engine)
            seen, said = streamed(lm, way)
            assert (seen[0], seen[-1], said) == ("start", "end", None), events
            [record] = records(lm)
            assert (record.outcome, record.estimated) == ("ok", not told), events
            assert (record.cost_nano == TOLD) if told else (record.cost_nano or 0) > TOLD, events
            lm.close()


@pytest.mark.parametrize("way", WAYS)
def test_behind_the_word_that_all_is_told_nothing_costs_more(server: Server, way: str) -> None:
    """The native engine reads on there, and shows what it finds; usage that is told there only is better than none."""
    server.kind = "text/event-stream"
    for events in (START + HELLO + END + USAGE + DONE + HELLO, START + HELLO + END + DONE + USAGE):
        server.body = written(lines(events))
        lm = lm_at(server.url, "groq", "lm15")
        assert streamed(lm, way)[1] is None
        [record] = records(lm)
        assert (record.outcome, record.cost_nano, record.estimated) == ("ok", TOLD, False), events
        lm.close()


FILTERED: list[list[str]] = [
    [piece(), piece("SAFETY")], [piece(counts={"promptTokenCount": 11}), piece("RECITATION")],
    [json.dumps({"candidates": [{"finishReason": "SAFETY", "index": 0}], "usageMetadata": COUNTS})],
    [json.dumps({"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": COUNTS})],
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_filter_blocks_costs_the_usage_that_is_told_with_it(server: Server, way: str) -> None:
    """The native engine left the usage in the very event that it raises for, and the bound was charged."""
    for events in FILTERED:
        ends = []
        for kind in ("text/event-stream", "application/json"):
            server.kind = kind
            server.body = written(events) if "stream" in kind else events[-1].encode()
            lm = lm_at(server.url, "gemini", "lm15")
            said = streamed(lm, way)[1] if "stream" in kind else ask(lm, way)
            assert "locked: " in str(said)
            ends.append(end(lm, said))
            lm.close()
        assert ends[0] == ends[1] == (ends[0][0], ("error", TOLD, False)), events


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_a_prompt_that_is_blocked_is_not_asked_again(server: Server, engine: str, way: str) -> None:
    """Such a stream says nothing else: it passed for one that broke off, and was paid as often as it was tried."""
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 11}}
    server.kind = "text/event-stream"
    server.body = written([json.dumps(blocked)])
    lm = lm_at(server.url, "gemini", engine, breaker=CircuitBreaker())
    seen, said = streamed(lm, way)
    assert seen == []
    assert isinstance(said, Exception)
    [record] = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", 11_000, False)
    assert lm.pipeline.primary.breaker.snapshot().failures == 0
    lm.close()
