"""Keeps a test from reaching a real provider: LM calls are stopped before they are sent, sockets before they connect.

It is in force in the whole process while a test runs, in every thread. What it stops it also remembers, so that a test
that swallows the error fails all the same.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

REMEDY: Final = (
    "Use the fixtures `lm` or `provider` (api_base=provider.url), give the LM an engine of your own, or, if it is "
    "meant, mark the test with @pytest.mark.real_provider"
)

_QUIETLY: Final = frozenset({"raw.githubusercontent.com"})
"""Where DSPy and LiteLLM look for newer metadata of models. They get by without it, so no test fails for that."""

_AT_HOME: Final = frozenset({"ollama", "ollama_chat", "lm_studio", "llamafile"})
"""Providers that are on this machine unless an address says otherwise; their sockets are looked at."""


class Guard:
    """What must not happen, and what was tried.

    Args:
        raises: makes the error that stops a call, from its message.
        allowed: hosts beside loopback that may be reached.
    """

    def __init__(self, raises: Callable[[str], BaseException], allowed: Iterable[str] = ()) -> None:
        self.tried: list[str] = []
        self._raises = raises
        self._allowed = {host.lower() for host in allowed}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Guard:
        self._replace(socket, "getaddrinfo", self._resolving)
        self._replace(socket.socket, "connect", self._connecting)
        self._replace(socket.socket, "connect_ex", self._connecting)
        if "dspy" in sys.modules:  # else no LM was made yet, and the first one is held at its socket
            self._replace(import_module("dspy_prod.pipeline.flow"), "plan", self._planning)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, holder: Any, name: str, make: Callable[[Any], Any]) -> None:
        own = name in vars(holder)
        before = getattr(holder, name)
        setattr(holder, name, make(before))

        def undo() -> None:
            if own:
                setattr(holder, name, before)
            else:
                delattr(holder, name)

        self._undo.append(undo)

    def _stop(self, what: str) -> NoReturn:
        message = f"This test would call a real provider: {what}. {REMEDY}"
        self.tried.append(message)
        raise self._raises(message)

    # -- the seams ---------------------------------------------------------------------------------------------------
    def _planning(self, plan: Callable[..., Any]) -> Callable[..., Any]:
        """Every attempt of a guarded LM or embedder is planned before anything is reserved for it."""

        def guarded(call: Any, route: Any, *more: Any) -> Any:
            upstream = route.upstream
            if isinstance(upstream.spec, str):  # an engine of the test's own reaches what it likes
                where = server(upstream.clients, route.model)
                if where not in _AT_HOME and not self._may(_host(where)):
                    self._stop(f"{route.model} at {where}")
            return plan(call, route, *more)

        return guarded

    def _resolving(self, getaddrinfo: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(host: Any, *more: Any, **options: Any) -> Any:
            name = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else host
            if name and not _is_address(name) and not self._may(name) and name != socket.gethostname():
                self._refuse(name, f"a connection to {name}")
            return getaddrinfo(host, *more, **options)

        return guarded

    def _connecting(self, connect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(sock: Any, address: Any) -> Any:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and not self._may(str(address[0])):
                self._refuse(str(address[0]), f"a connection to {address[0]}:{address[1]}")
            return connect(sock, address)

        return guarded

    def _refuse(self, host: str, what: str) -> None:
        if host.lower() in _QUIETLY:
            raise OSError(f"{what} is not made while a test runs")
        self._stop(what)

    def _may(self, host: str) -> bool:
        host = host.strip("[]").partition("%")[0].lower()
        if host in ("", "localhost", "ip6-localhost") or host.endswith(".localhost") or host in self._allowed:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or address.is_unspecified


def server(clients: Any, model: str) -> str:
    """The address of a route, or its provider where none is told, as the library itself names it."""
    found: str = import_module("dspy_prod.pipeline.upstream.destination").server(clients, model)
    return found


def _host(place: str) -> str:
    return urlsplit(place if "://" in place else f"//{place}").hostname or place


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
