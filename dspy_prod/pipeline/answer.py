"""One stream's answer as it grows."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from dspy.lm15 import Response, StreamAssemblyError

from dspy_prod.compat.asides import Asides
from dspy_prod.compat.lm15 import StreamAccumulator, StreamEvent
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Send
from dspy_prod.pipeline.upstream.finish import first_of


class Answer:
    """One stream's answer as it grows, and the hands it is given into: how long they keep it, whether they let it fall.

    Attributes:
        response: the whole answer, once it has ended.
        end: its last event.
        left: the consumer left while it had an event in its hands.
        outside: the error that the consumer was handling as it asked for what comes next.
    """

    __slots__ = (
        "_accumulator", "_asides", "_call", "_since", "_start", "_strict", "end", "left", "outside", "response",
    )  # fmt: skip

    def __init__(self, effect: Send, call: Call) -> None:
        self._accumulator = StreamAccumulator(effect.request)
        self._call = call
        self._asides = Asides()
        self._strict = isinstance(effect.route.upstream.spec, str)
        self._since = 0.0
        self._start: tuple[StreamEvent, ...] = ()
        self.end: StreamEvent | None = None
        self.left = False
        self.outside = sys.exc_info()[1]
        self.response: Response | None = None

    def take(self, event: StreamEvent) -> tuple[StreamEvent, ...]:
        """Add an event; those to show now. The start waits for the first delta: until then all may be tried again."""
        if self._asides.takes(event):
            return ()
        if event.type == "end":
            event = self._asides.ended(event)
        beside = self._asides.shown(event)
        if beside is None:
            self._accumulator.push(event)
        else:
            event = beside
        if event.type == "start":
            self._start = (event,)
            return ()
        if event.type == "end":
            self.end = event
            return ()
        self._call.visible = True
        start, self._start = self._start, ()
        return (*start, event)

    def finish(self) -> None:
        """Put the answer together.

        Raises:
            StreamAssemblyError: its end does not say why it ended, as DSPy's own engines always do.
        """
        if self._strict and self.end is not None and self.end.finish_reason is None:
            raise StreamAssemblyError("The provider's stream ended without saying why")
        self.response = self._asides.whole(self._accumulator.response())

    def broke(self, effect: Send) -> None:
        """The stream failed: leave with the effect what came of it."""
        with suppress(Exception):  # a part may be beyond repair, such as a tool call without a name
            effect.partial = self._asides.whole(self._accumulator.response())
        effect.ended = effect.partial is not None and self.end is not None and not _runs_along(self.end)

    @property
    def unseen(self) -> tuple[StreamEvent, ...]:
        """Events still to be shown once the answer is accepted."""
        assert self.end is not None
        return (*self._start, self.end)

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._call.paused += time.monotonic() - self._since
        self.left = kind is GeneratorExit
        self.outside = sys.exc_info()[1]


def _runs_along(end: StreamEvent) -> bool:
    """Whether the usage of a stream without an end came within a part of the answer, as a count that may have grown."""
    return end.finish_reason is None and first_of((end.provider_data or {}).get("choices")) is not None
