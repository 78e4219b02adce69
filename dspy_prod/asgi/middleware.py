"""`CallContextMiddleware`: for whom, how urgently and until when the calls of each request are made."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any, Final

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketClose

from dspy_prod import ConfigError, call_context
from dspy_prod.asgi.headers import HeaderError, Headers
from dspy_prod.asgi.leaving import Listening, Receive, Send
from dspy_prod.asgi.serving import serving

Scope = MutableMapping[str, Any]
Identify = Callable[[Scope], "Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None"]

_log = logging.getLogger("dspy_prod")

POLICY_VIOLATION: Final = 1008
"""What a websocket is closed with whose request is refused before it is served."""


class CallContextMiddleware:
    """Puts a `call_context` around each request and websocket, until its last byte is sent; ends what nobody awaits.

    It holds in `async def` and `def` endpoints, dependencies, streamed bodies, background tasks and websockets. When
    the client leaves, what is done for it is cancelled: a call in flight ends at once, and what it held is charged as
    unconfirmed, for the provider may bill it. A `def` endpoint runs in a thread, which nothing can interrupt: its call
    runs to its end, which `deadline` bounds, and is charged exactly.

    Args:
        app: the application. Add it with `app.add_middleware(CallContextMiddleware, ...)`.
        headers: which headers are believed: fields of `call_context`, with their usual headers (`user` X-User, `tenant`
            X-Tenant, `session` X-Session, `priority` X-Priority, `trace_id` X-Request-Id, `"tag:<key>"` X-Tag-<key>),
            or a mapping of each to its header. None by default, for anybody can send them: name those that your
            gateway sets, and strips from what comes from outside. `X-Request-Timeout` (`8`, `0.5`, `500ms`) and
            `grpc-timeout` (`8S`, `500m`) are always believed, since they only shorten; the earlier one holds.
        identify: a function of the ASGI scope, or a coroutine function, that returns further arguments of
            `call_context`, such as the user behind a verified token. They win over headers. A
            `starlette.exceptions.HTTPException` that it raises is the answer.
        deadline: seconds for every request; a header can only say less. A websocket has none, for it would be that of
            the whole connection: give each message one, `with call_context(deadline=8)`.
        cancel: whether a client that leaves cancels what is done for it.

    Raises:
        ConfigError: an impossible argument; the message names it.

    Example:
        ```python
        app.add_middleware(CallContextMiddleware, headers={"user": "X-Auth-User"}, deadline=30)
        ```
    """

    def __init__(
        self,
        app: Any,
        *,
        headers: Mapping[str, str] | Iterable[str] = (),
        identify: Identify | None = None,
        deadline: float | None = None,
        cancel: bool = True,
    ) -> None:
        if identify is not None and not callable(identify):
            raise ConfigError(f"identify={identify!r}: give a function of the ASGI scope")
        if deadline is not None and (
            isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not 0 < deadline < float("inf")
        ):
            raise ConfigError(f"deadline={deadline!r}: give a positive number of seconds, or None")
        if not isinstance(cancel, bool):
            raise ConfigError(f"cancel={cancel!r}: give True or False")
        self.app = app
        self._headers = Headers(headers)
        self._identify = identify
        self._deadline = deadline
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or websocket; anything else, such as the lifespan, is passed on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            said = self._headers.read(scope)
            if scope["type"] == "websocket":
                said.pop("deadline", None)  # it would be the whole connection's
            if self._identify is not None:
                told = self._identify(scope)
                said |= (await told if inspect.isawaitable(told) else told) or {}
        except HeaderError as error:
            answer: dict[str, Any] = {"reason": "invalid_header", "detail": str(error), "header": error.header}
            await _refuse(scope, receive, send, JSONResponse(answer, 400))
            return
        except HTTPException as error:
            refused = JSONResponse({"reason": "refused", "detail": error.detail}, error.status_code, error.headers)
            await _refuse(scope, receive, send, refused)
            return
        if self._deadline is not None and scope["type"] == "http":
            said["deadline"] = min(said.get("deadline") or self._deadline, self._deadline)
        app = scope.get("app")
        listening = Listening(receive, send)
        with nullcontext() if app is None else serving(app).one():
            try:
                with call_context(**said) if said else nullcontext():
                    if self._cancel:
                        await self._attend(scope, listening)
                    else:
                        await self.app(scope, receive, listening.send)
            except asyncio.CancelledError:
                # The server ends, and waits no longer. It would answer with a 500, which is not what happened.
                if app is None or not serving(app).draining or listening.begun or scope["type"] != "http":
                    raise
                answer = {"reason": "shutting_down", "detail": "The service is being restarted.", "retry_after": 1}
                headers = {"Retry-After": "1", "Connection": "close"}
                await JSONResponse(answer, 503, headers)(scope, receive, listening.send)

    async def _attend(self, scope: Scope, listening: Listening) -> None:
        """Serve a request for as long as somebody waits for the answer."""
        failure: Exception | None = None
        # A scope, and not the task's own `cancel`: it waits for an endpoint's thread, as Starlette's own ends do.
        with anyio.CancelScope() as served:
            watching = asyncio.create_task(listening.watch(served.cancel))
            try:
                await self.app(scope, listening.receive, listening.send)
            except Exception as error:
                failure = error
            finally:
                watching.cancel()
        if failure is None or (listening.gone and isinstance(failure, ClientDisconnect)):
            return
        if not served.cancel_called:
            raise failure
        _log.info("A request whose client had left ended with %s", type(failure).__name__, exc_info=failure)


async def _refuse(scope: Scope, receive: Receive, send: Send, response: JSONResponse) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose(POLICY_VIOLATION)(scope, receive, send)
    else:
        await response(scope, receive, send)
