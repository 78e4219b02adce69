"""A model's refusal in a stream is a part of its own, also beside a text, and in what came of one that broke."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from dspy.lm15 import Config, Message, RefusalPart, Response, TextPart, Usage

from dspy_prod.compat.asides import Asides, refusal
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
    "in a piece": (["R:I cannot. ", "R:So STOP it"], "", "I cannot. So "),
    "in the only piece": (["R:I cannot. So STOP it"], "", "I cannot. So "),
    "at a piece": (["R:I cannot. ", "R:STOP it"], "", "I cannot. "),
    "between pieces": (["R:I cannot. ST", "R:OP it"], "", "I cannot. "),
    "behind a text": (["T:Sure. ", "R:I ", "R:won't STOP"], "Sure. ", "I won't "),
    "behind the same words": (["T:I see. ", "R:I ", "R:won't STOP"], "I see. ", "I won't "),
    "before a text": (["R:I ", "R:won't", "T:Sure. STOP"], "Sure. ", "I won't"),
    "between texts": (["R:I ", "T:Sure. ", "R:won't", "T:Yes. STOP"], "Sure. Yes. ", "I won't"),
    "between texts, in a piece": (["R:I ", "T:Sure. ", "R:won't STOP it"], "Sure. ", "I won't "),
    "its words in a text": (["T:I can. ", "R:I ", "T:said ", "R:won't"], "I can. said ", "I won't"),
    "its words in the text behind": (["R:No", "T:. I say No"], ". I say No", "No"),
    "all of it, behind its beginning": (["T:Grade: S", "R:STOP"], "Grade: S", "STOP"),
    "all of it, at the beginning": (["R:STOP it"], "", "STOP it"),
    "its end alone": (["T:I can. ", "R:I ", "R:ST", "R:OP"], "I can. ", "I "),
    "parts that take turns": (["T:a", "R:b", "T1:c", "R1:d", "T:e", "R:f", "T1:STOP"], "aec", "bdf"),
}
"""The pieces of a refusal and of a text that come, what is left of the text at STOP, and of the refusal.

Where nothing of the refusal is left, it is told as it came: that the model has refused still holds.
"""


def turns(pieces: list[str]) -> str:
    """The events for pieces of a text and of a refusal, of the message with the number that is told."""
    came = []
    for each in pieces:
        which, delta = each.split(":", 1)
        kind, message = ("refusal" if which[0] == "R" else "output_text"), int(which[1:] or 0)
        came.append(piece(kind, delta).replace('"output_index": 0', f'"output_index": {message}'))
    return "".join(came)


def written(parts: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """(the text of an answer, its other parts)."""
    text = "".join(part.text for part in parts if part.type == "text")
    return text, [part for part in parts if part.type != "text"]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("name", CUT)
def test_a_refusal_that_is_cut_at_stop_is_no_text(serve: MakeProvider, connect: MakeLM, name: str, way: str) -> None:
    """It passed for the answer, and was kept, where lm15 had cut it or it came in turns with a text."""
    pieces, text, refused = CUT[name]
    lm = connect(serve(faults=Verbatim(BEGIN + turns(pieces) + COMPLETED)), model_type="responses", stop=["STOP"])
    ask(lm, way)
    parts = lm.history[-1]["response"].message.parts
    assert written(parts) == (text, [RefusalPart(text=refused)])
    assert TextPart("") not in parts
    assert not any(part.continuation for part in parts)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("name", CUT)
def test_a_stream_that_is_cut_at_stop_gives_the_same_answer(
    serve: MakeProvider, connect: MakeLM, parts: list[Any], name: str, way: str
) -> None:
    """The words of a refusal were looked for in the text of a whole one, and others were cut out of it."""
    pieces, text, refused = CUT[name]
    lm = connect(serve(faults=Verbatim(BEGIN + turns(pieces) + COMPLETED)), model_type="responses", stop=["STOP"])
    events: list[Any] = []
    asked = replace(request(), config=Config(max_tokens=100, stop=("STOP",)))

    async def in_task() -> None:
        events.extend([event async for event in lm._async_engine_spec.stream(asked)])
        await lm.pipeline.aclose()

    if way == "sync":
        events.extend(lm._engine_spec.stream(asked))
    else:
        asyncio.run(in_task())
    assert [written(each) for each in parts] == [(text, [RefusalPart(text=refused)])]
    shown = [event.delta for event in events if event.type == "delta"]
    assert {delta.type for delta in shown} <= {"text"}
    assert {delta.part_index for delta in shown} <= {0, 1}  # as it came


@pytest.mark.parametrize("way", ["sync", "async"])
def test_nor_of_what_came_of_an_answer_that_is_cut_at_stop_and_broke(
    serve: MakeProvider, connect: MakeLM, way: str
) -> None:
    """It was text of the partial answer, beside what only tells that it was none."""
    came = turns(["T:Sure. ", "R:I ", "R:won't", "T:Yes"])
    lm = connect(serve(faults=Verbatim(BEGIN + came)), model_type="responses", stop=["STOP"], retry=False)
    message = ask(lm, way).partial.message
    assert written(message.parts) == ("Sure. ", [RefusalPart(text="I won't")])  # the rest may begin with STOP
    assert message.continuation == ()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_long_refusal_does_not_outlast_the_deadline(serve: MakeProvider, connect: MakeLM, way: str) -> None:
    """Where it stood was looked for in a time that grew with its square: half a minute for these 2 MB."""
    half = ["R:" + "no " * 3_333 + "x"] * 100
    came = turns([*half, "T:Sure.", *half])
    lm = connect(serve(faults=Verbatim(BEGIN + came + COMPLETED)), model_type="responses", stop=["STOP"], retry=False)
    begun = time.monotonic()
    ask(lm, way)
    assert time.monotonic() - begun < 10
    text, (refused,) = written(lm.history[-1]["response"].message.parts)
    assert (text, len(refused.text)) == ("Sure.", 2_000_000)


def test_a_refusal_in_many_pieces_is_put_together_at_the_end() -> None:
    """Each piece was added to a copy of those before: a minute for these."""
    asides, event = Asides(), refusal("0123456789" * 4)
    begun = time.monotonic()
    assert all(asides.takes(event) for _ in range(200_000))
    assert time.monotonic() - begun < 10
    said = Response(id="r", model="m", message=Message.assistant("Sure."), finish_reason="stop", usage=Usage())
    whole = asides.whole(said)
    assert len(whole.message.parts[-1].text) == 8_000_000  # type: ignore[union-attr]


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
