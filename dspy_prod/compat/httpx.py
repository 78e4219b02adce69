"""httpx, by which LiteLLM and clients beneath it send: what carries a key and a prompt stays at the server it is for.

And of what comes back no more is read than `bounds` says: httpx, and LiteLLM, would read and decompress for ever.

They follow redirects, and httpx drops only the header `Authorization` on the way to another server: keys in other
headers (Anthropic's, Google's, Azure's), and with 307 and 308 the prompt, went wherever a provider, or whoever
answered for it, said.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from math import inf
from typing import Any, Literal

_STAYS: ContextVar[Stay | None] = ContextVar("dspy_prod_stays", default=None)
"""The attempt for which something is sent here; None for requests that are not ours."""
_INSTALLING = threading.Lock()
_installed = False

Came = Literal["whole", "begun"]


class Stay:
    """One attempt, as httpx sees it: what was answered, whatever the client above makes of it.

    Args:
        until: when nobody waits for it any more (monotonic).

    Attributes:
        answer: httpx's last answer; None when nothing was answered.
        odd: a counter of tokens in it was no whole number, see `httpx_reading`.
    """

    __slots__ = ("answer", "odd", "until")

    def __init__(self, until: float = inf) -> None:
        self.until = until
        self.answer: Any = None
        self.odd = False

    @property
    def came(self) -> Came | None:
        """How much came of an answer that its status calls a success; None of any other."""
        if self.answer is None or not 200 <= self.answer.status_code < 300:
            return None
        return "whole" if hasattr(self.answer, "_content") else "begun"

    @property
    def body(self) -> bytes:
        """The body of such an answer; empty where it did not come whole, or is read as a stream."""
        return bytes(self.answer.content) if self.came == "whole" else b""

    @property
    def path(self) -> str:
        """What was asked: the path of the address."""
        return "" if self.answer is None else str(self.answer.request.url.path)

    def mark(self, error: Exception) -> None:
        """Have the error say as `came` what it was raised for: LiteLLM makes up a status for it."""
        with suppress(AttributeError):
            error.came = self.came  # type: ignore[attr-defined]


@contextmanager
def staying(stay: Stay | None = None) -> Iterator[None]:
    """Have no request that is sent here, but those that only fetch something, follow a redirect to another server.

    Such an answer is what it is, an error of status 3xx. Of any answer no more is read than `bounds` says, and nothing
    for long after nobody waits for it. Whatever else the process sends is as it was.
    """
    if not _installed:
        _install()
    token = _STAYS.set(Stay() if stay is None else stay)
    try:
        yield
    finally:
        _STAYS.reset(token)


def _install() -> None:
    global _installed
    import httpx

    from dspy_prod.compat.httpx_reading import bound

    with _INSTALLING:
        if _installed:
            return
        found: Any = httpx.Response.has_redirect_location

        def has_redirect_location(self: httpx.Response) -> bool:
            """Whether httpx may follow this answer somewhere. It asks of every answer before it reads any of it."""
            stay = _STAYS.get()
            if stay is None:
                return bool(found.fget(self))
            stay.answer = self
            bound(self, stay)
            return bool(found.fget(self)) and not _leaves(self)

        httpx.Response.has_redirect_location = property(has_redirect_location)  # type: ignore[assignment,method-assign]
        _installed = True


def _leaves(response: Any) -> bool:
    request = response.request
    if request.method in ("GET", "HEAD"):
        return False
    try:
        there = request.url.join(response.headers["location"])
    except Exception:  # no address that httpx understands
        return True
    here = request.url
    return bool((there.scheme, there.host, there.port) != (here.scheme, here.host, here.port))
