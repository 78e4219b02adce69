"""Scripts whose upstream never answers, and that end all the same: `python -m tests.e2e.silent WAY STORE`.

Imported in child processes too, so it makes nothing at import.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from dspy.lm15 import Request, Response, response_to_events

from dspy_prod import Budget, RateLimit, call_context
from tests.e2e.support import make_lm, request
from tests.pipeline.support import answer

SHARED: dict[str, Any] = {"limit": RateLimit(concurrency=1), "budget": Budget(usd=1.0)}
"""The policies of all who use the store."""


class Silent:
    """An engine object that shows the first word of a stream, and nothing more.

    Args:
        interrupts: Ctrl-C comes to the process with each request.
    """

    supports_function_calling = True
    supports_response_schema = True
    supported_params = frozenset({"max_tokens"})

    def __init__(self, interrupts: bool) -> None:
        self._interrupts = interrupts

    def complete(self, request: Request) -> Response:
        if self._interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()
        raise AssertionError

    def stream(self, request: Request) -> Iterator[Any]:
        yield from list(response_to_events(answer(50)))[:2]
        threading.Event().wait()


def leave(way: str, store: str) -> None:
    """Make a call that its caller leaves, and end."""
    engine: Any = Silent(way == "Ctrl-C")
    make_lm("", api_key=None, api_base=None, engine=engine)  # a store in memory, whose module knows of no end, is first
    lm = make_lm("", api_key=None, api_base=None, engine=engine, store=store, **SHARED)
    with call_context(deadline=0.5 if way == "deadline" else 50):
        if way == "stream":
            for event in lm._engine_spec.stream(request()):
                if event.type == "delta":
                    break
        else:
            with suppress(KeyboardInterrupt if way == "Ctrl-C" else Exception):
                lm("hello")


if __name__ == "__main__":
    leave(*sys.argv[1:])
