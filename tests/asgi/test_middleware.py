"""Each request's calls are made for whom its headers say, as far as they are believed, and for as long as it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from dspy_prod import ConfigError
from dspy_prod.asgi import CallContextMiddleware
from dspy_prod.context.current import EMPTY, CallContext, current
from tests.asgi.support import Answer, exchange

SEEN: list[CallContext] = []


def look() -> str:
    """Note the context in force here."""
    SEEN.append(current())
    return "ok"


async def in_task(request: Any) -> Any:
    return PlainTextResponse(look())


def in_thread(request: Any) -> Any:
    return PlainTextResponse(look())


async def in_stream(request: Any) -> Any:
    async def parts() -> AsyncIterator[str]:
        for _ in range(2):
            await asyncio.sleep(0)
            yield look()

    return StreamingResponse(parts())


async def in_thread_of_stream(request: Any) -> Any:
    def parts() -> Iterator[str]:
        yield look()

    return StreamingResponse(parts())


async def in_background(request: Any) -> Any:
    return PlainTextResponse("ok", background=BackgroundTask(look))


async def in_websocket(socket: Any) -> None:
    await socket.accept()
    await socket.receive_text()
    look()
    await socket.close()


PLACES = {
    "/task": in_task,
    "/thread": in_thread,
    "/stream": in_stream,
    "/thread-of-stream": in_thread_of_stream,
    "/background": in_background,
}


def service(**options: Any) -> Any:
    """An application whose endpoints note the context."""
    routes: list[Any] = [Route(path, endpoint, methods=["POST"]) for path, endpoint in PLACES.items()]
    app = Starlette(routes=[*routes, WebSocketRoute("/socket", in_websocket)])
    app.add_middleware(CallContextMiddleware, **options)
    return app


def ask(app: Any, path: str = "/task", **options: Any) -> tuple[Answer, CallContext]:
    """The answer, and the context in which it was made."""
    SEEN.clear()
    answer = asyncio.run(exchange(app, path, **options))
    assert len(set(SEEN)) <= 1
    return answer, SEEN[0] if SEEN else EMPTY


@pytest.mark.parametrize("path", [*PLACES, "/socket"])
@pytest.mark.parametrize("cancel", [True, False])
def test_the_context_holds_wherever_a_request_is_served(path: str, cancel: bool) -> None:
    """In tasks and threads, in what is streamed, after the answer, and in a websocket; and nowhere afterwards."""
    app = service(headers=["user", "tenant", "session", "priority", "tag:feature"], cancel=cancel)
    said = {"X-User": "ann", "X-Tenant": "acme", "X-Session": "s1", "X-Priority": "low", "X-Tag-feature": "triage"}
    kind = "websocket" if path == "/socket" else "http"
    _, found = ask(app, path, headers=said, kind=kind)
    assert (found.user, found.tenant, found.session, found.priority) == ("ann", "acme", "s1", "low")
    assert found.tags == (("feature", "triage"),)
    assert current() == EMPTY


def test_it_holds_in_an_endpoint_of_fastapi_and_its_dependencies() -> None:
    """Of both kinds, though a `def` one runs in a thread of its own."""
    app = FastAPI()
    app.add_middleware(CallContextMiddleware, headers=["user"])

    def thread() -> str:
        return look()

    async def task() -> str:
        return look()

    @app.post("/task")
    def endpoint(one: str = Depends(thread), other: str = Depends(task)) -> str:
        return look()

    _, found = ask(app, headers={"X-User": "ann"})
    assert found.user == "ann"
    assert len(SEEN) == 3


def test_nobody_is_believed_by_default() -> None:
    """Anybody can send a header; only what shortens a request is taken from outside."""
    said = {"X-User": "root", "X-Tenant": "acme", "X-Session": "s", "X-Priority": "high", "X-Request-Timeout": "5"}
    _, found = ask(service(), headers=said)
    assert 0 < found.deadline - time.monotonic() <= 5
    assert found._replace(deadline=EMPTY.deadline) == EMPTY


def test_a_header_has_the_name_that_is_given() -> None:
    """The gateway's own, instead of the usual one."""
    app = service(headers={"user": "X-Auth-Subject"})
    assert ask(app, headers={"X-User": "eve", "X-Auth-Subject": "ann"})[1].user == "ann"


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({"X-Request-Timeout": "8"}, 8),
        ({"X-Request-Timeout": "0.5"}, 0.5),
        ({"X-Request-Timeout": "1500ms"}, 1.5),
        ({"grpc-timeout": "500m"}, 0.5),
        ({"grpc-timeout": "2M"}, 120),
        ({"grpc-timeout": "9S", "X-Request-Timeout": "3"}, 3),
        ({"X-Request-Timeout": "3600"}, 200),
        ({}, 200),
    ],
)
def test_a_request_ends_when_its_client_gives_up_and_never_later_than_the_service_allows(
    said: dict[str, str], seconds: float
) -> None:
    """The earliest of all that is said holds."""
    began = time.monotonic()
    found = ask(service(deadline=200), headers=said)[1]
    assert began + seconds <= found.deadline <= time.monotonic() + seconds


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"X-Request-Timeout": "soon"}, "X-Request-Timeout"),
        ({"X-Request-Timeout": "0"}, "X-Request-Timeout"),
        ({"X-Request-Timeout": "-1"}, "X-Request-Timeout"),
        ({"X-Request-Timeout": "nan"}, "X-Request-Timeout"),
        ({"X-Request-Timeout": "\u0668"}, "X-Request-Timeout"),
        ({"grpc-timeout": "123456789S"}, "grpc-timeout"),
        ({"X-Priority": "urgent"}, "X-Priority"),
        ({"X-User": "u" * 257}, "X-User"),
        ({"X-User": "a\x00b"}, "X-User"),
    ],
)
def test_a_header_that_cannot_be_meant_is_the_client_s_mistake(said: dict[str, str], name: str) -> None:
    """400, naming the header and what is understood; the endpoint is not asked."""
    answer, _ = ask(service(headers=["user", "priority"]), headers=said)
    assert answer.status == 400
    assert answer.json()["reason"] == "invalid_header"
    assert answer.json()["header"] == name
    assert SEEN == []


def test_a_believed_header_must_stand_there_once() -> None:
    """A proxy that adds its own beside the client's would leave it to chance who is asking."""

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        scope["headers"] += [(b"x-user", b"eve")]
        await app(scope, receive, send)

    app = service(headers=["user"])
    answer, _ = ask(twice, headers={"X-User": "ann"})
    assert answer.status == 400
    assert "more than once" in answer.json()["detail"]


@pytest.mark.parametrize("awaited", [True, False])
def test_who_asks_may_be_found_out_by_a_function(awaited: bool) -> None:
    """What it says wins over headers; nothing is said by None."""

    def identify(scope: Any) -> Any:
        return None if scope["path"] == "/thread" else {"user": "ann", "tags": {"path": scope["path"]}}

    async def aidentify(scope: Any) -> Any:
        return identify(scope)

    app = service(headers=["user"], identify=aidentify if awaited else identify)
    found = ask(app, headers={"X-User": "eve"})[1]
    assert (found.user, found.tags) == ("ann", (("path", "/task"),))
    assert ask(app, "/thread", headers={"X-User": "eve"})[1].user == "eve"


def test_a_websocket_is_not_ended_by_the_deadline_of_a_request() -> None:
    """It was that of the connection: after thirty seconds every call in it was refused. What a message needs, the
    endpoint says, or a function that looked at the connection."""
    said = {"X-Request-Timeout": "5", "X-User": "ann"}
    _, found = ask(service(headers=["user"], deadline=1), "/socket", headers=said, kind="websocket")
    assert (found.deadline, found.user) == (float("inf"), "ann")
    _, found = ask(service(deadline=1, identify=lambda scope: {"deadline": 60}), "/socket", kind="websocket")
    assert 50 < found.deadline - time.monotonic() <= 60
    _, found = ask(service(deadline=1), headers=said)
    assert found.deadline - time.monotonic() <= 1


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_who_is_unknown_is_turned_away(kind: str) -> None:
    """With the status that the function says; a websocket is closed before it is accepted."""

    def identify(scope: Any) -> Any:
        raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Bearer"})

    answer, _ = ask(service(identify=identify), "/socket" if kind == "websocket" else "/task", kind=kind)
    assert SEEN == []
    if kind == "http":
        assert (answer.status, answer.json()["detail"]) == (401, "Who are you?")
        assert answer.headers["www-authenticate"] == "Bearer"
    else:
        assert [message["type"] for message in answer.messages] == ["websocket.close"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": "user"}, ["headers", "list"]),
        ({"headers": ["owner"]}, ["'owner'", "'tenant'"]),
        ({"headers": {"user": "X-Üser"}}, ["'user'", "name of a header"]),
        ({"headers": {"user": "X User"}}, ["'user'", "name of a header"]),
        ({"headers": ["tag:my feature"]}, ["'tag:my feature'", "name of a header"]),
        ({"headers": [5]}, ["5 is said by no header"]),
        ({"headers": [["user"]]}, ["['user'] is said by no header", "use 'user'"]),
        ({"headers": [{"user": "X-User"}]}, ["{'user': 'X-User'} is said by no header"]),
        ({"headers": 5}, ["headers=5", "list"]),
        ({"cancel": "no"}, ["cancel", "True or False"]),
        ({"deadline": "5"}, ["deadline='5'", "positive"]),
        ({"identify": "ann"}, ["identify", "function"]),
        ({"deadline": 0}, ["deadline", "positive"]),
        ({"deadline": True}, ["deadline", "positive"]),
    ],
)
def test_what_cannot_be_meant_is_told_at_construction(options: Any, words: list[str]) -> None:
    """The message names the argument and the remedy."""
    with pytest.raises(ConfigError) as caught:
        CallContextMiddleware(None, **options)
    for word in words:
        assert word in str(caught.value)


def test_an_error_of_the_application_passes_as_it_is() -> None:
    """No group is wrapped around it by what watches the client."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("its own")

    with pytest.raises(LookupError, match="its own"):
        asyncio.run(exchange(CallContextMiddleware(broken), "/"))


def test_a_lifespan_is_passed_on() -> None:
    """The middleware has nothing to do with it."""
    kinds: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kinds.append(scope["type"])

    asyncio.run(CallContextMiddleware(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert kinds == ["lifespan"]
