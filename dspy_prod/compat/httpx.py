"""httpx, by which LiteLLM and clients beneath it send: what carries a key and a prompt stays at the server it is for.

And of what comes back no more is read than `bounds` says: httpx, and LiteLLM, would read and decompress for ever.

They follow redirects, and httpx drops only the header `Authorization` on the way to another server: keys in other
headers (Anthropic's, Google's, Azure's), and with 307 and 308 the prompt, went wherever a provider, or whoever
answered for it, said.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

from dspy_prod.compat.foreign import names
from dspy_prod.compat.stay import Stay

_STAYS: ContextVar[Stay | None] = ContextVar("dspy_prod_stays", default=None)
"""The attempt for which something is sent here; None for requests that are not ours."""
_ASKING: ContextVar[Stay | None] = ContextVar("dspy_prod_asking", default=None)
"""The attempt whose question to a model is sent here."""
_INSTALLING = threading.Lock()
_installed = False
_telling_kinds: frozenset[type] = frozenset()
"""Transports that tell when a request goes out."""
_GOES: Final = ".send_request_headers.started"


@contextmanager
def staying(stay: Stay | None = None) -> Iterator[None]:
    """Have no request that is sent here, but those that only fetch something, follow a redirect to another server.

    Such an answer is what it is, an error of status 3xx. Of any answer no more is read than `bounds` says, and nothing
    for long after nobody waits for it. Whatever else the process sends is as it was, also what goes on in the context
    of an attempt that is over.

    Args:
        stay: the attempt; the function that has the `with` statement is the one that sends for it.
    """
    if not _installed:
        _install()
    stay = Stay() if stay is None else stay
    stay.within = sys._getframe(2).f_code  # between is contextlib's
    token = _STAYS.set(stay)
    try:
        yield
    finally:
        _STAYS.reset(token)


def _install() -> None:
    global _installed, _telling_kinds
    import aiohttp
    import httpx

    from dspy_prod.compat.httpx_reading import bound

    with _INSTALLING:
        if _installed:
            return
        found: Any = httpx.Response.has_redirect_location

        def has_redirect_location(self: httpx.Response) -> bool:
            """Whether httpx may follow this answer somewhere. It asks of every answer before it reads any of it."""
            stay = _STAYS.get()
            if stay is None or stay.over:
                return bool(found.fget(self))
            own = stay.hears(self)
            bound(self, stay if own else Stay(stay.until))
            return bool(found.fget(self)) and not _leaves(self)

        httpx.Response.has_redirect_location = property(has_redirect_location)  # type: ignore[assignment,method-assign]
        httpx.Client.send = _telling(httpx.Client.send)  # type: ignore[method-assign]
        httpx.AsyncClient.send = _atelling(httpx.AsyncClient.send)  # type: ignore[method-assign]
        aiohttp.ClientRequest.send = _telling_aiohttp(aiohttp.ClientRequest.send)  # type: ignore[method-assign]
        [ours] = names("litellm.llms.custom_httpx.aiohttp_transport", "LiteLLMAiohttpTransport")
        if hasattr(httpx.Client, "_transport_for_url"):
            _telling_kinds = frozenset({httpx.HTTPTransport, httpx.AsyncHTTPTransport, ours})
        _installed = True


def _telling(send: Any) -> Any:
    """A client's method that sends, which tells the attempt first."""

    @wraps(send)
    def sending(self: Any, request: Any, **options: Any) -> Any:
        stay = _STAYS.get()
        if stay is not None and stay.sends(request, _tells(self, request)):
            request.extensions = {**request.extensions, "trace": _traced(stay, request.extensions.get("trace"))}
        passed = [request]
        del request  # no frame of ours holds what a request holds, its key above all
        return send(self, passed.pop(), **options)

    return sending


def _atelling(send: Any) -> Any:
    """The same for tasks."""

    @wraps(send)
    async def sending(self: Any, request: Any, **options: Any) -> Any:
        stay = _STAYS.get()
        if stay is not None and stay.sends(request, _tells(self, request)):
            request.extensions = {**request.extensions, "trace": _atraced(stay, request.extensions.get("trace"))}
        else:
            stay = None
        passed = [request]
        del request
        token = _ASKING.set(stay)
        try:
            return await send(self, passed.pop(), **options)
        finally:
            with suppress(ValueError):  # closed by the garbage collector, in somebody else's context
                _ASKING.reset(token)

    return sending


def _tells(client: Any, request: Any) -> bool:
    """Whether the transport that a request goes by tells when it does: httpx's own, or LiteLLM's on aiohttp."""
    return bool(_telling_kinds) and type(client._transport_for_url(request.url)) in _telling_kinds


def _traced(stay: Stay, other: Any) -> Any:
    """What httpcore calls at each step of a request, see its "trace" extension."""

    def trace(name: str, info: Any) -> None:
        if _goes(name, info):
            stay.goes()
        if other is not None:
            other(name, info)

    return trace


def _atraced(stay: Stay, other: Any) -> Any:
    """The same for tasks."""

    async def trace(name: str, info: Any) -> None:
        if _goes(name, info):
            stay.goes()
        if other is not None:
            await other(name, info)

    return trace


def _goes(name: str, info: Any) -> bool:
    """Whether a step is that a request goes out, and not what asks a proxy for a way to where it goes."""
    return name.endswith(_GOES) and info["request"].method != b"CONNECT"


def _telling_aiohttp(send: Any) -> Any:
    """aiohttp's method that sends a request, once there is a connection for it."""

    @wraps(send)
    async def sending(self: Any, connection: Any) -> Any:
        stay = _ASKING.get()
        if stay is not None and self.method != "CONNECT":
            stay.goes()
        return await send(self, connection)

    return sending


def _leaves(response: Any) -> bool:
    """Whether an answer leads what was posted to another server; what only fetches something may go."""
    request = response.request
    first = response.history[0].request if response.history else request  # a 303 makes a GET of it, headers and all
    if first.method in ("GET", "HEAD"):
        return False
    try:
        there = request.url.join(response.headers["location"])
    except Exception:  # no address that httpx understands
        return True
    here = request.url
    return bool((there.scheme, there.host, there.port) != (here.scheme, here.host, here.port))
