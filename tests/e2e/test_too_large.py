"""Answers that are huge, have no end, or grow when decompressed: no more is read than the table of bounds says."""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, DeadlineExceededError, call_context
from dspy_prod.compat import bounds
from dspy_prod.pipeline.upstream.deadline import bounded_stream
from tests.e2e.support import CHEAP, outcome, records, request, until, upstream
from tests.e2e.test_deadline import ENGINES, LATEST, LIFE, WAYS, Way, call
from tests.e2e.test_unusable import START, chunk
from tests.listening import Listening, Silent

Write = Callable[[bytes], None]
SOME = 1 << 16


class Server(Listening):
    """Answers with a status, headers, and whatever a function writes until nobody reads it any more."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: Callable[[Write], None] = lambda write: None
        self.requests = 0
        self.written = 0
        self.left = threading.Event()
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.requests += 1
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                assert asked
                try:
                    outer.body(self._write)
                except OSError:
                    outer.left.set()
                self.close_connection = True

            def _write(self, data: bytes) -> None:
                self.wfile.write(data)
                self.wfile.flush()
                outer.written += len(data)

        super().__init__(Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def connect(connect: Callable[..., Any]) -> Callable[..., Any]:
    """As everywhere, under a budget."""
    return lambda server, **options: connect(server, **{"budget": Budget(usd=1, name="all"), **options})


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test reaches at once."""
    for name, value in {"ANSWER": SOME, "STREAM": SOME, "ERROR": SOME, "EXPANDED": SOME}.items():
        monkeypatch.setattr(bounds, name, value)


def ever(data: bytes) -> Callable[[Write], None]:
    """Writes something until nobody reads it."""

    def write_all(write: Write) -> None:
        while True:
            write(data)

    return write_all


def ask(lm: Any, way: Way) -> Any:
    """What became of a call."""

    async def in_task() -> Any:
        try:
            if way == "async":
                return await lm.acall("a question")
            return [event async for event in lm._async_engine_spec.stream(request(model=lm.model))]
        finally:
            await lm.pipeline.aclose()

    if way == "sync":
        return outcome(lambda: lm("a question"))
    if way == "sync stream":
        return outcome(lambda: list(lm._engine_spec.stream(request(model=lm.model))))
    return outcome(lambda: asyncio.run(in_task()))


def served(server: Server, way: Way, status: int = 200) -> None:
    """Answer in the way of an endless answer, or of an endless error."""
    server.status = status
    if status == 200 and "stream" in way:
        server.headers = {"content-type": "text/event-stream"}
        server.body = ever((START + "".join(chunk({"content": f"{n} "}) for n in range(20))).encode())
    else:
        server.headers = {"content-type": "application/json"}
        server.body = ever(b" " * 4096)


def compressed(layers: int) -> bytes:
    """Nothing much, of which a lot comes."""
    data = b" " * (8 << 20)
    for _ in range(layers):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        data = packer.compress(data) + packer.flush()
    return data


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_without_an_end_is_a_failed_attempt(
    server: Server, connect: Callable[..., Any], engine: str, way: Way
) -> None:
    """It was read until the memory was full: 400 MB for one of 200 MB. Now it is owed, once."""
    served(server, way)
    lm = connect(server, engine=engine, retry=dspy_prod.Retry(attempts=3, backoff=0.01))
    error = ask(lm, way)
    assert "larger than any that is read" in str(error)
    assert server.left.wait(10)
    assert server.requests == 1
    [record] = upstream(lm)
    assert (record.outcome, record.estimated) == ("error", True)
    assert record.cost_nano
    assert "test" not in str(record.error)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("engine", ENGINES)
def test_another_route_is_asked_for_what_is_too_large(
    server: Server, connect: Callable[..., Any], engine: str, way: Way
) -> None:
    """One model that runs on for ever says nothing about another."""
    served(server, way)
    lm = connect(server, engine=engine, fallbacks=[CHEAP])
    assert isinstance(ask(lm, way), Exception)
    assert [record.model for record in upstream(lm)] == ["openai/e2e", CHEAP]


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [400, 503])
@pytest.mark.parametrize("engine", ENGINES)
def test_of_an_error_the_beginning_is_read(
    server: Server, connect: Callable[..., Any], engine: str, status: int, way: Way
) -> None:
    """An error page of 100 MB was read whole. Its status says what it means, and nothing is owed."""
    served(server, way, status)
    lm = connect(server, engine=engine)
    error = ask(lm, way)
    assert getattr(error, "status", None) == status
    assert server.left.wait(10)
    assert server.requests == 1
    [record] = upstream(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", 0, False)


GEMINI = "gemini/gemini-2.5-flash"
EVENT = 'data: {"candidates":[{"content":{"parts":[{"text":"%d "}],"role":"model"},"index":0}]}\r\n\r\n'


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("way", ["sync stream", "async stream"])
@pytest.mark.parametrize("status", [200, 400])
def test_a_stream_that_is_sent_late_is_bounded_too(
    server: Server, connect: Callable[..., Any], status: int, way: Way
) -> None:
    """LiteLLM sends Gemini's not before its first chunk is asked for: 1.5 GB of a 400 were read in four seconds."""
    served(server, way, status)
    if status == 200:
        server.body = ever("".join(EVENT % number for number in range(20)).encode())
    lm = connect(server, model=GEMINI, prices={GEMINI: (1, 1)}, engine="litellm")
    error = ask(lm, way)
    assert ("larger than any that is read" in str(error)) is (status == 200)
    assert status == 200 or getattr(error, "status", None) == status
    assert server.left.wait(10)
    assert server.requests == 1
    [record] = upstream(lm)
    assert (record.outcome, record.estimated, bool(record.cost_nano)) == ("error", status == 200, status == 200)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["head", "line"])
def test_a_part_above_the_bounds_of_the_native_engine_is_not_sent_for_again(
    server: Server, connect: Callable[..., Any], part: str, way: Way
) -> None:
    """It counted as a connection that broke: the same was asked for, and owed, three times."""
    served(server, "sync stream")
    server.body = ever(b"data: " + b"x" * 100_000 + b"\n\n")
    if part == "head":
        server.headers = {f"x-{number}": "x" * 1_000 for number in range(100)}
    elif "stream" not in way:
        server.headers["transfer-encoding"] = "chunked"
        server.body = ever(b"0" * 4096)
    lm = connect(server, engine="lm15", retry=dspy_prod.Retry(attempts=3, backoff=0.01))
    assert "limit" in str(ask(lm, way))
    [record] = upstream(lm)
    assert (record.outcome, record.estimated) == ("error", True)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bomb_does_not_go_off(
    server: Server, connect: Callable[..., Any], engine: str, way: Way, status: int, layers: int
) -> None:
    """A few kilobytes became gigabytes in one step, before anybody could count them."""
    served(server, way, status)
    server.headers["content-encoding"] = ", ".join(["gzip"] * layers)
    server.body = lambda write: write(compressed(layers))
    lm = connect(server, engine=engine)
    error = ask(lm, way)
    assert "larger than any that is read" in str(error)
    [record] = upstream(lm)
    assert (record.outcome, record.estimated) == ("error", status == 200)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_compressed_answer_is_an_answer(server: Server, connect: Callable[..., Any], engine: str, way: Way) -> None:
    """What is compressed as text is, in one layer or two, is read as before."""
    text = chunk({"role": "assistant", "content": "hello"}) + chunk({}, "stop") + "data: [DONE]\n\n"
    if "stream" not in way:
        text = '{"id":"x","object":"chat.completion","created":1,"model":"e2e","choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}'  # noqa: E501
    served(server, way)
    server.headers["content-encoding"] = "gzip, deflate"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = zlib.compress(packer.compress(text.encode()) + packer.flush())
    server.body = lambda write: write(data)
    lm = connect(server, engine=engine)
    assert "hello" in str(ask(lm, way))
    [record] = records(lm)
    assert record.outcome == "ok"


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("sync stream", "words"),
        ("async stream", "words"),
        ("async stream", "nothing"),
        pytest.param("sync stream", "nothing", marks=pytest.mark.slow),  # LiteLLM looks up again after `bounds.LATE`
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_deadline_ends_a_stream_that_always_has_more(
    server: Server, connect: Callable[..., Any], engine: str, way: Way, said: str
) -> None:
    """There was always a next event, so nobody looked at the clock: after 15 s one of 4 s was still running.

    Where an event has no word in it, LiteLLM goes on to the next, through all that a read has brought.
    """
    served(server, way)
    if said == "nothing":
        server.body = ever((chunk({}) * 50).encode())
    lm = connect(server, engine=engine)
    ask(connect(server, engine=engine, api_base="http://127.0.0.1:1"), way)  # imports what it needs
    _, wall, seconds = call(lm, way, deadline=LIFE)
    print(f"{engine}, {way}: {wall:.3f} s")
    assert seconds <= LIFE - 1.0 + LATEST
    assert server.left.wait(45)
    until(lambda: upstream(lm), what="the end of the attempt that was given up")
    [record] = upstream(lm)
    assert (record.outcome, record.estimated) == ("timeout", True)


def test_a_worker_is_not_far_ahead_of_its_reader() -> None:
    """What a reader had not yet taken was kept for it without a limit, and kept coming after its deadline."""
    made: list[int] = []
    stopped = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            while True:
                made.append(len(made))
                yield made[-1]
        finally:
            stopped.set()

    items = bounded_stream(numbers, time.monotonic() + 60)
    for expected in range(1_000):
        assert next(items) == expected
        assert len(made) <= expected + bounds.AHEAD + 2
    items.close()  # type: ignore[attr-defined]
    assert stopped.wait(10)


def test_an_abandoned_attempt_does_not_read_for_ever(
    server: Server, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker read on as long as a byte came now and then, and its money stayed held."""
    monkeypatch.setattr(bounds, "LATE", 0.2)
    served(server, "sync")
    gone = threading.Event()

    def trickle(write: Write) -> None:
        while not gone.wait(0.02):
            write(b" ")

    server.body = trickle
    ask(connect(server, engine="litellm", api_base="http://127.0.0.1:1"), "sync")  # imports what it needs
    lm = connect(server, engine="litellm")
    with call_context(deadline=LIFE):
        assert isinstance(ask(lm, "sync"), DeadlineExceededError)
    assert server.left.wait(10)
    gone.set()
