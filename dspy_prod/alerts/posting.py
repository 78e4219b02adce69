"""One POST, with an end: however slow the server is, and at whatever it is slow."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.request
from typing import Any, Final, NamedTuple

from dspy_prod.runtime.threads import begin

_MOST_WAIT: Final = 300.0


class Outcome(NamedTuple):
    """What became of a POST.

    Attributes:
        sent: the server has taken it.
        again: it makes sense to try again.
        why: in a word or two, without the URL; empty when it was sent.
        after: seconds that the server asked to wait.
    """

    sent: bool
    again: bool = False
    why: str = ""
    after: float = 0.0


def post(url: str, body: bytes, timeout: float) -> Outcome:
    """POST some JSON. Proxies are those of the environment; redirects are not followed: the URL is a secret.

    Args:
        timeout: seconds for all of it, looking up the address included.
    """
    posting = _Posting(url, body, timeout)
    if begin("dspy_prod-alert", posting.run) is None:
        posting.run()  # as the program ends there are none; each step has its timeout, if not all of them together
    if not posting.done.wait(timeout):
        posting.give_up()
        return Outcome(False, True, _late(timeout))
    return posting.outcome


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class _Posting:
    """On a thread of its own, so that whoever waits for it can stop waiting."""

    def __init__(self, url: str, body: bytes, timeout: float) -> None:
        self._url, self._body, self._timeout = url, body, timeout
        self.done = threading.Event()
        self.outcome = Outcome(False, True, "given up")
        self._connections: list[http.client.HTTPConnection] = []

    def run(self) -> None:
        try:
            self.outcome = self._send()
        except urllib.error.HTTPError as error:
            error.close()
            after = _seconds(error.headers.get("Retry-After"))
            self.outcome = Outcome(False, error.code in (408, 425, 429) or error.code >= 500, str(error.code), after)
        except Exception as error:  # its text may hold the URL
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            why = _late(self._timeout) if isinstance(reason, TimeoutError) else type(reason).__name__
            self.outcome = Outcome(False, True, why)
        finally:
            self.done.set()

    def _send(self) -> Outcome:
        keep = self._connections.append

        class Plain(urllib.request.HTTPHandler):
            def http_open(self, request: Any) -> Any:
                return self.do_open(_kept(http.client.HTTPConnection, keep), request)

        class Secure(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                return self.do_open(_kept(http.client.HTTPSConnection, keep), request)

        request = urllib.request.Request(self._url, self._body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.build_opener(_Stay, Plain, Secure).open(request, timeout=self._timeout):
            return Outcome(True)

    def give_up(self) -> None:
        """Let the thread end: a server that sends a byte a second would keep it for ever."""
        for connection in self._connections:
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


def _kept(kind: Any, keep: Any) -> Any:
    """A class of connections, each of which is kept to be closed by another thread."""

    def make(*args: Any, **options: Any) -> Any:
        connection = kind(*args, **options)
        keep(connection)
        return connection

    return make


def _late(timeout: float) -> str:
    return f"no answer within {timeout:g} s"


def _seconds(text: str | None) -> float:
    try:
        return min(_MOST_WAIT, max(0.0, float(text or 0)))
    except ValueError:  # a date
        return 0.0
