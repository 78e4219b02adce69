"""A client that leaves takes its call with it, and what that held is charged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from dspy_prod import Budget
from dspy_prod.asgi import CallContextMiddleware
from dspy_prod.asgi.serving import serving
from dspy_prod.testing import Provider
from tests.asgi.support import exchange, until
from tests.e2e.support import PRICES, account, make_lm, upstream


@pytest.fixture
def provider() -> Iterator[Provider]:
    """One that takes its time."""
    with Provider(prices=PRICES, latency=20.0) as provider:
        yield provider


def application(endpoint: Any, *, websocket: bool = False) -> Any:
    route: Any = WebSocketRoute("/", endpoint) if websocket else Route("/", endpoint, methods=["POST"])
    app = Starlette(routes=[route])
    app.add_middleware(CallContextMiddleware)
    return app


def assert_charged_as_unconfirmed(lm: Any) -> None:
    (record,) = upstream(lm)
    assert record.outcome == "cancelled"
    assert record.estimated
    assert account(lm) == (record.cost_nano, 0, record.cost_nano)
    assert record.cost_nano


@pytest.mark.parametrize("way", ["whole", "streamed", "websocket"])
def test_the_call_in_flight_is_cancelled(provider: Provider, way: str) -> None:
    """Whether the client waits for an answer, its first part, or a message; nobody waits for the provider then."""
    lm = make_lm(provider.url, budget=Budget(usd=1.0))

    async def endpoint(request: Any) -> Any:
        async def parts() -> Any:
            yield (await lm.acall("q"))[0]

        return StreamingResponse(parts()) if way == "streamed" else PlainTextResponse((await lm.acall("q"))[0])

    async def socket(connection: Any) -> None:
        await connection.accept()
        while True:
            await connection.send_text((await lm.acall(await connection.receive_text()))[0])

    async def main() -> None:
        app = application(socket if way == "websocket" else endpoint, websocket=way == "websocket")
        kind = "websocket" if way == "websocket" else "http"
        answer = await exchange(app, "/", kind=kind, pieces=(b"q",), leave=lambda: until(lambda: provider.in_flight))
        assert b"ok" not in answer.body
        await lm.aclose()

    asyncio.run(main())
    assert_charged_as_unconfirmed(lm)


def test_what_runs_in_a_thread_is_awaited_and_charged_exactly() -> None:
    """Nothing can interrupt a `def` endpoint; its threads do not pile up behind clients that are gone."""
    answers = threading.Event()
    with Provider(prices=PRICES, latency=0.3) as provider:
        lm = make_lm(provider.url, budget=Budget(usd=1.0))

        def endpoint(request: Any) -> Any:
            text = lm("q")[0]
            answers.set()
            return PlainTextResponse(text)

        app = application(endpoint)
        asyncio.run(exchange(app, "/", leave=lambda: until(lambda: provider.in_flight)))
        assert answers.is_set()
        (record,) = upstream(lm)
        assert (record.outcome, record.estimated, record.cost_nano) == ("ok", False, provider.bill.nano)
        lm.close()


def test_what_follows_the_answer_is_not_disturbed() -> None:
    """Everybody leaves once the answer is there; a background task runs to its end all the same."""
    done: list[str] = []

    async def task() -> None:
        await asyncio.sleep(0.05)
        done.append("all of it")

    async def endpoint(request: Any) -> Any:
        return PlainTextResponse("ok", background=BackgroundTask(task))

    answer = asyncio.run(exchange(application(endpoint), "/"))
    assert (answer.body, done) == (b"ok", ["all of it"])


def test_who_listens_ends_by_itself() -> None:
    """A websocket that waits for its client's next message is told, and cleans up as it likes."""
    ends: list[str] = []

    async def socket(connection: Any) -> None:
        await connection.accept()
        message = await connection.receive()
        await asyncio.sleep(0.01)
        ends.append(message["type"])

    async def leave() -> None:
        await asyncio.sleep(0.02)

    asyncio.run(exchange(application(socket, websocket=True), "/", kind="websocket", pieces=(), leave=leave))
    assert ends == ["websocket.disconnect"]


def test_an_upload_is_as_slow_as_its_reader() -> None:
    """At most one piece is read ahead, and all of them arrive in order."""
    taken: list[int] = []
    ahead: list[int] = []

    async def endpoint(request: Request) -> Any:
        body = b""
        number = 0
        async for piece in request.stream():
            await asyncio.sleep(0.002)
            ahead.append(len(taken) - number - 1)
            number += 1
            body += piece
        return PlainTextResponse(body)

    pieces = tuple(b"%d," % number for number in range(10))
    answer = asyncio.run(exchange(application(endpoint), "/", pieces=pieces, taken=taken))
    assert answer.body == b"".join(pieces)
    assert max(ahead) == 1


@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.parametrize("draining", [True, False])
def test_who_is_cut_off_at_the_end_is_told_to_come_back(cancel: bool, draining: bool) -> None:
    """A server that ends cancels what takes too long, and would answer with a 500 that looks like a defect."""
    inside = asyncio.Event()

    async def endpoint(request: Any) -> Any:
        inside.set()
        await asyncio.sleep(30)

    async def served(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(app(scope, receive, send))
        await inside.wait()
        serving(app).draining = draining
        task.cancel()
        await task

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(CallContextMiddleware, cancel=cancel)
    if not draining:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(exchange(served, "/"))
        return
    answer = asyncio.run(exchange(served, "/"))
    assert (answer.status, answer.json()["reason"]) == (503, "shutting_down")
    assert answer.headers["retry-after"] == "1"


def test_it_can_be_left_out() -> None:
    """With `cancel=False` the application runs to its end, whoever listens."""
    done: list[str] = []

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.02)
        done.append("end")

    async def leave() -> None:
        return None

    asyncio.run(exchange(CallContextMiddleware(endpoint, cancel=False), "/", leave=leave))
    assert done == ["end"]
    done.clear()
    asyncio.run(exchange(CallContextMiddleware(endpoint), "/", leave=leave))
    assert done == []
