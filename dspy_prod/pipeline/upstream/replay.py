"""A kept answer as the stream it might have been."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import Response, response_to_events

from dspy_prod.compat.lm15 import StreamEvent

_PIECE: Final = re.compile(r"\s*\S{1,24}|\s+")


def replay(response: Response) -> Iterator[StreamEvent]:
    """The events of an answer, its text word by word.

    DSPy's `StreamListener` looks for the marks of a field token by token, and stays silent when an answer comes whole.
    """
    for event in response_to_events(response):
        delta: Any = getattr(event, "delta", None)
        if delta is None or delta.type != "text" or delta.logprobs:
            yield event
            continue
        for piece in _PIECE.findall(delta.text):
            yield replace(event, delta=replace(delta, text=piece))
