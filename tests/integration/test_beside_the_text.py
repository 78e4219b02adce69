"""What LiteLLM passes beside the text of a stream, and answers that cannot be read though they came."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod.testing import Verbatim
from tests.differential import mirror
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask, fresh_memory, records
from tests.e2e.test_unusable import DONE, END, ENGINES, START, USAGE, WAYS, body, chunk, stream

MODEL = "anthropic/claude-sonnet-4-20250514"
ANSWER = ("[[ ## answer ## ]]\n", "blue", "\n\n[[ ## completed ## ]]")


def thinking(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A stream of Anthropic's with a block of thought, and one that it has made unreadable."""
    usage = {"input_tokens": 11, "output_tokens": 1}
    message = {"id": "m", "type": "message", "role": "assistant", "model": "c", "content": [], "stop_reason": None}
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        (
            {"type": "thinking", "thinking": "", "signature": ""},
            [
                {"type": "thinking_delta", "thinking": "let me "},
                {"type": "thinking_delta", "thinking": "think"},
                {"type": "signature_delta", "signature": "SIG"},
            ],
        ),
        ({"type": "redacted_thinking", "data": "XXX"}, []),
        ({"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in ANSWER]),
    ]
    yield {"type": "message_start", "message": {**message, "usage": usage}}
    for index, (block, deltas) in enumerate(blocks):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}
    yield {"type": "message_stop"}


def shown(lm: Any) -> tuple[list[str], str, Any]:
    """(the pieces of a streamed field, the field, what the history holds)."""
    listener = dspy.streaming.StreamListener("answer")
    program: Any = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])

    async def main() -> tuple[list[str], str]:
        pieces, final = [], ""
        async for value in program(question="?"):
            if isinstance(value, dspy.Prediction):
                final = value.answer
            else:
                pieces.append(value.chunk)
        return pieces, final

    with dspy.context(lm=lm):
        pieces, final = asyncio.run(main())
    return pieces, final, lm.history[-1]["outputs"]


def test_thoughts_stream_through_litellm_as_with_the_plain_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such stream was refused as something that no engine carries, and booked as never sent."""
    monkeypatch.setattr(mirror, "_anthropic_events", thinking)
    provider = mirror.Mirror()
    common: dict[str, Any] = {
        "api_key": "k", "api_base": provider.url, "engine": "litellm", "cache": False, "max_tokens": 4000,
        "temperature": 1.0, "reasoning_effort": "low",
    }  # fmt: skip
    try:
        ours = dspy_prod.LM(MODEL, **common, retry=False, store=fresh_memory(), namespace="thoughts")
        expected = shown(dspy.LM(MODEL, **common))
        assert shown(ours) == expected
        assert expected[2] == [{"text": "".join(ANSWER), "reasoning_content": "let me think"}]
        (record,) = ours.ledger.records()
        assert (record.outcome, record.input_tokens, record.output_tokens) == ("ok", 11, 7)
        ours.close()
    finally:
        provider.stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "beside",
    [{"annotations": [{"type": "url_citation"}]}, {"images": [{"url": "data:,"}]}, {"novel": {"a": 1}}],
    ids=lambda value: next(iter(value)),
)
def test_what_no_event_says_does_not_end_a_stream(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, beside: dict[str, Any]
) -> None:
    """Of a whole answer it stays beside the text, on either engine."""
    provider = serve(faults=[Verbatim(START + chunk({"content": "hello", **beside}) + END + USAGE + DONE)])
    lm = connect(provider, engine=engine)
    assert stream(lm, way) == (["start", "delta", "end"], None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_cannot_be_read_was_sent_and_is_owed(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """Two choices where one was asked: both are billed, as told; the ledger said that nothing had been sent."""
    two = body(lambda whole, choice, _: whole.update(choices=[choice, {**choice, "index": 1}]))
    lm = connect(serve(faults=Verbatim(two)), engine=engine, retry=dspy_prod.Retry(attempts=3, backoff=0.01))
    assert "choices" in str(ask(lm, way))
    (record,) = records(lm)
    assert (record.outcome, record.estimated, bool(record.cost_nano)) == ("error", False, True)
