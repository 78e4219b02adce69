"""What LiteLLM asks beside the model (for a picture, a token, what a model can do) is not taken for its answer."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FunctionType
from typing import Any

import httpx
import litellm
import pytest
from dspy.lm15 import Config, ImagePart, Message, Request, TextPart

import dspy_prod
from dspy_prod import Budget, Price
from dspy_prod.compat.httpx import staying
from dspy_prod.compat.litellm import _Hooked
from dspy_prod.compat.stay import Stay
from tests.e2e.support import fresh_memory, outcome, records, until
from tests.e2e.test_unusable import QUICK, WAYS
from tests.listening import Listening, Silent

PICTURE = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MODELS = ["anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-flash"]
"""For these LiteLLM fetches the pictures of a prompt itself."""
EVERY_WAY = [*WAYS, "sync stream", "async stream"]
TOLD = 25_000
"""What eleven tokens of input and seven of output cost, in nano-USD."""


class Server(Listening):
    """Has a picture, says what models can do, and answers as Ollama does.

    Attributes:
        asked: the paths that were asked by POST.
        breaks: each question to a model ends with a connection that is reset.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.breaks = False
        outer = self

        class Handler(Silent):
            def do_GET(self) -> None:
                self.reply(200, "image/png", PICTURE)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append(self.path)
                if self.path.endswith("/api/show"):
                    told = {"prompt_eval_count": 7.5, "done_reason": "load", "model_info": {"any.context_length": 4096}}
                    self.reply(200, "application/json", json.dumps(told).encode())
                elif outer.breaks:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                else:
                    said = {"message": {"role": "assistant", "content": "hello"}, "response": "hello"}
                    counts = {"prompt_eval_count": 11, "eval_count": 7}
                    body = {"model": "any", "created_at": "", "done": True, "done_reason": "stop", **said, **counts}
                    self.reply(200, "application/json", json.dumps(body).encode())

            def reply(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        super().__init__(Handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(litellm, "user_url_validation", False)  # pictures of this machine too
    server = Server()
    yield server
    server.stop()


def lm_at(url: str, model: str) -> Any:
    return dspy_prod.LM(
        model, api_base=url, api_key="a-key", engine="litellm", cache=False, retry=QUICK, breaker=False,
        store=fresh_memory(), max_tokens=50, budget=Budget(usd=100),
        prices={model: Price(input=1, output=2, max_input_tokens=100_000)},
    )  # fmt: skip


def ask(lm: Any, way: str, picture: str | None = None) -> Any:
    """One call, streamed or not, about a picture or without one."""
    parts = [TextPart("a question"), *([] if picture is None else [ImagePart(media_type="image/png", url=picture)])]
    said: list[dict[str, Any]] = [{"type": "text", "text": "a question"}]
    if picture is not None:
        said.append({"type": "image_url", "image_url": {"url": picture}})
    messages = [{"role": "user", "content": said}]
    typed = Request(lm.model, (Message.user(parts),), config=Config(max_tokens=50))

    async def in_task() -> Any:
        try:
            if way == "async":
                return await lm.acall(messages=messages)
            return [event async for event in lm._async_engine_spec.stream(typed)]
        finally:
            await lm.pipeline.aclose()

    if "async" in way:
        return outcome(lambda: asyncio.run(in_task()))
    return outcome(lambda: lm(messages=messages) if way == "sync" else list(lm._engine_spec.stream(typed)))


def unused() -> int:
    """A port where nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_reached_is_not_owed_for_a_picture(server: Server, model: str, way: str) -> None:
    """It was one attempt at its bound: an answer had come with 200, and LiteLLM could not read it."""
    lm = lm_at(f"http://127.0.0.1:{unused()}", model)
    said = ask(lm, way, f"{server.url}/a.png")
    assert "cannot be read" not in str(said)
    assert [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)] == [("error", 0, False)] * 3
    lm.close()


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("model", MODELS)
def test_a_connection_that_breaks_is_tried_again_with_a_picture_as_without(
    server: Server, model: str, way: str
) -> None:
    """With a picture it was not: what had been answered to a question about it had come whole, so it seemed."""
    server.breaks = True
    ended = []
    for picture in (None, f"{server.url}/a.png"):
        lm = lm_at(server.url, model)
        ask(lm, way, picture)
        ended.append([(each.outcome, each.error, each.estimated) for each in records(lm)])
        lm.close()
    assert ended[0] == ended[1]
    assert len(ended[0]) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["ollama/any", "ollama_chat/any"])
def test_what_a_model_can_do_is_asked_in_vain(
    server: Server, model: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiteLLM asks it before and after, also to log a call, in a thread of its own that has the attempt's context.

    A usage that was told was lost when that came first.
    """
    inherited: Any = _Hooked._response

    def late(self: Any, raw: Any, sent: Any) -> Any:
        until(lambda: server.asked[-1] == "/api/show", what="the question that LiteLLM has when it logs a call")
        return inherited(self, raw, sent)

    lm = lm_at(server.url, model)
    if way == "sync":
        monkeypatch.setattr(_Hooked, "_response", late)
    assert ask(lm, way) == ["hello"]
    assert [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)] == [("ok", TOLD, False)]
    lm.close()


@pytest.mark.parametrize("way", EVERY_WAY)
def test_no_answer_outlives_its_call(server: Server, way: str) -> None:
    """LiteLLM's queue of logs kept the attempt's context, and that the answer: forty of them after a burst."""
    lm = lm_at(server.url, "ollama_chat/any")
    ask(lm, way)
    gc.collect()
    kept = [each.answer for each in gc.get_objects() if isinstance(each, Stay) and each.answer is not None]
    assert [answer for answer in kept if str(answer.url).startswith(server.url)] == []
    lm.close()


# -- one attempt -----------------------------------------------------------------------------------------------------
def handled(asked: httpx.Request) -> httpx.Response:
    if asked.url.path == "/dead":
        raise httpx.ConnectError("refused")
    return httpx.Response(302 if asked.url.path == "/moved" else 200, headers={"location": "http://other/"}, text="ok")


CLIENT = httpx.Client(transport=httpx.MockTransport(handled), base_url="http://any")
FORM = {"grant_type": "client_credentials"}


def post(path: str) -> None:
    with suppress(httpx.ConnectError):
        CLIENT.post(path, json={})


def success_handler() -> None:  # LiteLLM's name for what logs
    post("/log")


def get_model_info() -> None:
    post("/api/show")


def of_litellm(function: Any) -> Any:
    """The same function, in a module of LiteLLM's."""
    return FunctionType(function.__code__, {**function.__globals__, "__name__": "litellm.utils"})


SENT: dict[str, tuple[list[Callable[[], object]], str | None]] = {
    "a picture": ([lambda: CLIENT.get("/picture")], None),
    "a token": ([lambda: CLIENT.post("/token", data=FORM)], None),
    "what it can do": ([of_litellm(get_model_info)], None),
    "a picture and a model that is not reached": ([lambda: CLIENT.get("/picture"), lambda: post("/dead")], None),
    "a model's cache and a model that is not reached": ([lambda: post("/cache"), lambda: post("/dead")], None),
    "a picture and a model": ([lambda: CLIENT.get("/picture"), lambda: post("/model")], "/model"),
    "a model and its log": (
        [lambda: post("/model"), of_litellm(success_handler), of_litellm(get_model_info)],
        "/model",
    ),
    "a model, by functions of the same names": ([get_model_info, success_handler], "/log"),
    "a model that tells where its answer is": ([lambda: post("/model"), lambda: CLIENT.get("/answer")], "/answer"),
}


@pytest.mark.parametrize(("sent", "path"), SENT.values(), ids=SENT)
def test_only_the_answer_to_what_asked_a_model_is_the_attempt_s(
    sent: list[Callable[[], object]], path: str | None
) -> None:
    """Whatever LiteLLM sends before it and after it."""
    with Stay() as stay, staying(stay):
        for send in sent:
            send()
        assert (stay.came, stay.path) == ((None, "") if path is None else ("whole", path))
    assert stay.answer is None


def test_a_model_that_a_logger_of_litellm_asks_is_an_attempt_of_its_own() -> None:
    """Who called the function that sends says nothing of what that sends; what LiteLLM logs of this attempt does."""

    def success_handler(logger: Callable[[], object]) -> object:
        return logger()

    def logger() -> str:
        with Stay() as stay, staying(stay):
            post("/judge")
            of_litellm(success_handler)(lambda: post("/log"))
            return stay.path

    assert of_litellm(success_handler)(logger) == "/judge"


def test_what_goes_on_after_the_attempt_is_not_of_it() -> None:
    """A task that LiteLLM made in it, which writes logs for as long as the process lives, has its context."""
    with Stay(until=0.0) as stay:
        pass
    with staying(stay):
        assert CLIENT.post("/moved", follow_redirects=True).url.host == "other"
    assert stay.answer is None


def test_an_attempt_that_was_cancelled_is_bounded_while_it_sends() -> None:
    """LiteLLM sends in a thread for a task, and that goes on."""
    with suppress(asyncio.CancelledError), Stay() as stay:
        raise asyncio.CancelledError
    with staying(stay):
        assert CLIENT.post("/moved", follow_redirects=True).status_code == 302


def test_tasks_are_told_apart_too() -> None:
    """The same of clients for tasks."""

    async def in_task() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handled), base_url="http://any") as client:
            with staying(stay):
                await client.post("/cache", json={})
                assert stay.path == "/cache"
                with suppress(httpx.ConnectError):
                    await client.post("/dead", json={})

    stay = Stay()
    asyncio.run(in_task())
    assert stay.came is None
