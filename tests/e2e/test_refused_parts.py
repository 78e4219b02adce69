"""A model's refusal in a stream is a part of its own, also beside a text, and in what came of one that broke."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from dspy.lm15 import RefusalPart, TextPart

from dspy_prod.pipeline import answer as answers
from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask, outcome, request
from tests.e2e.test_unusable import DONE, END, USAGE, WAYS, chunk

REFUSED = RefusalPart(text="I won't")
WHOLE = {
    "id": "r", "object": "response", "status": "completed", "model": "e2e", "output": [],
    "usage": {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18},
}  # fmt: skip


def event(**said: Any) -> str:
    return f"event: {said['type']}\ndata: {json.dumps(said)}\n\n"


def piece(kind: str, delta: str) -> str:
    """A piece of the Responses API's, of the one message of an answer."""
    content = 0 if kind == "output_text" else 1
    return event(type=f"response.{kind}.delta", output_index=0, content_index=content, delta=delta)


BEGIN = event(type="response.created", response={**WHOLE, "status": "in_progress", "usage": None})
COMPLETED = event(type="response.completed", response=WHOLE)
TEXT = piece("output_text", "Sure. ")
REFUSAL = piece("refusal", "I ") + piece("refusal", "won't")
OF_CHAT = chunk({"role": "assistant", "refusal": "I "}) + chunk({"refusal": "won't"})
BESIDE = (TextPart("Sure. "), REFUSED)
ALIKE = piece("output_text", "I won't") + REFUSAL
OVER = END + USAGE + DONE
STREAMS = {
    "responses": ("responses", BEGIN + REFUSAL, COMPLETED, (REFUSED,), "I won't"),
    "responses, beside a text": ("responses", BEGIN + TEXT + REFUSAL, COMPLETED, BESIDE, "Sure. I won't"),
    "responses, before a text": ("responses", BEGIN + REFUSAL + TEXT, COMPLETED, BESIDE, "I won'tSure. "),
    "responses, the same text": ("responses", BEGIN + ALIKE, COMPLETED, (TextPart("I won't"), REFUSED), "I won't" * 2),
    "chat": ("chat", OF_CHAT, OVER, (REFUSED,), ""),
    "chat, beside a text": ("chat", chunk({"content": "Sure. "}) + OF_CHAT, OVER, BESIDE, "Sure. "),
}
"""What API, the stream as far as it goes, its end, the parts of the answer, and the text that is shown."""


def read(lm: Any, way: str) -> tuple[str, Any]:
    """The text that was shown, and the error that ended it."""
    shown: list[str] = []

    def show(event: Any) -> None:
        shown.append(event.delta.text if event.type == "delta" and event.delta.type == "text" else "")

    async def in_task() -> None:
        try:
            async for event in lm._async_engine_spec.stream(request()):
                show(event)
        finally:
            await lm.pipeline.aclose()

    def here() -> None:
        for event in lm._engine_spec.stream(request()):
            show(event)

    error = outcome(here if way == "sync" else lambda: asyncio.run(in_task()))
    return "".join(shown), error


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parts of each answer that a stream has given."""
    found: list[Any] = []
    inherited: Any = answers.Answer.finish

    def finish(self: Any) -> None:
        inherited(self)
        found.append(self.response.message.parts)

    monkeypatch.setattr(answers.Answer, "finish", finish)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STREAMS)
def test_a_refusal_is_no_text_of_the_answer(
    serve: MakeProvider, connect: MakeLM, parts: list[Any], name: str, way: str
) -> None:
    """Beside a text in the same message it was text, and a part of its own too. What is shown is as it came."""
    api, stream, end, meant, text = STREAMS[name]
    lm = connect(serve(faults=Verbatim(stream + end)), model_type=api)
    assert read(lm, way) == (text, None)
    assert parts == [meant]


CUT = {
    "whole": (["R:I ", "R:won't"], "", "I won't"),
    "in a piece": (["R:I cannot. ", "R:So STOP it"], "", "I cannot. So STOP it"),
    "in the only piece": (["R:I cannot. So STOP it"], "", "I cannot. So STOP it"),
    "at a piece": (["R:I cannot. ", "R:STOP it"], "", "I cannot. STOP it"),
    "between pieces": (["R:I cannot. ST", "R:OP it"], "", "I cannot. ST"),
    "behind a text": (["T:Sure. ", "R:I ", "R:won't STOP"], "Sure. ", "I won't STOP"),
    "behind the same words": (["T:I see. ", "R:I ", "R:won't STOP"], "I see. ", "I won't STOP"),
    "before a text": (["R:I ", "R:won't", "T:Sure. STOP"], "Sure. ", "I won't"),
    "between texts": (["R:I ", "T:Sure. ", "R:won't", "T:Yes. STOP"], "Sure. Yes. ", "I won't"),
    "between texts, in a piece": (["R:I ", "T:Sure. ", "R:won't STOP it"], "Sure. ", "I won't STOP it"),
}
"""The pieces of a refusal and of a text that come, what is left of the text at STOP, and of the refusal."""


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("name", CUT)
def test_a_refusal_that_is_cut_at_stop_is_no_text(serve: MakeProvider, connect: MakeLM, name: str, way: str) -> None:
    """It passed for the answer, and was kept, where lm15 had cut it or it came in turns with a text."""
    pieces, text, refused = CUT[name]
    came = "".join(piece("refusal" if each[0] == "R" else "output_text", each[2:]) for each in pieces)
    lm = connect(serve(faults=Verbatim(BEGIN + came + COMPLETED)), model_type="responses", stop=["STOP"])
    ask(lm, way)
    parts = lm.history[-1]["response"].message.parts
    assert parts == (*((TextPart(text),) if text else ()), RefusalPart(text=refused))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in STREAMS if name != "chat"])
def test_nor_of_what_came_of_a_stream_that_broke(serve: MakeProvider, connect: MakeLM, name: str, way: str) -> None:
    """It was text there: who shows what came so far showed a refusal as the answer."""
    api, stream, _, meant, text = STREAMS[name]
    lm = connect(serve(faults=Verbatim(stream)), model_type=api)
    shown, error = read(lm, way)
    assert shown == text
    assert error.partial.message.parts == meant


@pytest.mark.parametrize("data", ['{"type": "response.refusal.delta", "delta', '["response.refusal.delta"]'])
def test_an_event_that_cannot_be_read_is_the_reader_s_to_say(serve: MakeProvider, connect: MakeLM, data: str) -> None:
    """As one of any other name."""
    said = []
    for named in (data, data.replace("refusal", "another")):
        provider = serve(faults=Verbatim(f"{BEGIN}{TEXT}data: {named}\n\n{COMPLETED}"))
        said.append(read(connect(provider, model_type="responses"), "sync")[1])
    assert type(said[0]) is type(said[1])
