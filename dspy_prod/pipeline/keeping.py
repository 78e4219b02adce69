"""A call within a `Run` that keeps its answers: what was answered before is given again, what is new is written down.

The order is: the log of the run, the cache, another identical call, upstream.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Final

from dspy.lm15 import Response

from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Wait
from dspy_prod.policies.entries import cacheable

PATIENCE: Final = 10.0
"""Seconds to wait until an answer is durable. It is paid: a store that is slower does not lose it for its caller."""


def replayed(steps: Generator[Any, Any, Response], call: Call) -> Generator[Any, Any, Response]:
    """The kept answer, or that of the flow `steps`."""
    log, key = call.log, call.log_key
    assert log is not None
    assert key is not None
    entry = log.find(key, call.key is not None and call.context.cache == "use", call.request)
    if entry is not None:
        return call.hit(entry, "replayed")
    response = yield from steps
    if not call.log_kept:  # it is from a cache, or shared: where a cache would give it again, once is enough
        yield from keeping(call, response, again=not cacheable(response))
    return response


def keeping(call: Call, response: Response, again: bool = True) -> Generator[Wait, Any, None]:
    """Wait until an answer is written down, however the run goes on."""
    log, key = call.log, call.log_key
    if log is None or key is None:
        return
    future = log.keep(key, response, again, call.list_nano)
    call.log_kept = True
    if future is not None:
        yield Wait(_Keeping(future), call.pipeline.clock.monotonic() + PATIENCE, stops=False)
        log.kept(key, future)


class _Keeping:
    """Decided when an answer is durable, or will never be."""

    __slots__ = ("future",)

    def __init__(self, future: Future[int]) -> None:
        self.future = future

    def attach(self, wake: Callable[[], None]) -> bool:
        """See `effects.Decidable`."""
        if self.future.done():
            return False
        self.future.add_done_callback(lambda _: wake())
        return True
