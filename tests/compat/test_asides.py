"""Which usage that a provider tells in a stream is its last word, should the stream break before its end."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.lm15 import StreamDeltaEvent, StreamEndEvent, TextDelta, Usage

from dspy_prod.compat.asides import Asides, counted

USAGE = Usage(input_tokens=3, output_tokens=1)
CHOICE = {"index": 0, "delta": {"content": "one"}}


def heard(*events: Any) -> Asides:
    """What a stream knows that has told so far."""
    asides = Asides()
    for event in events:
        for each in counted(event) if event.type == "end" else [event]:
            asides.takes(each)
    return asides


@pytest.mark.parametrize(
    ("reason", "data", "known"),
    [
        ("stop", {"choices": [CHOICE], "usage": {}}, True),
        (None, {"choices": [], "usage": {}}, True),
        (None, {"choices": [CHOICE], "usage": {}}, False),
        ("stop", {"type": "message_delta", "usage": {}}, True),
        (None, {"type": "message_delta", "usage": {}}, False),
        ("stop", {"candidates": [{"finishReason": "STOP"}], "usageMetadata": {}}, True),
        ("stop", {"candidates": [{}], "usageMetadata": {}}, False),
        ("stop", {"usageMetadata": {}}, False),
        ("stop", {"object": "response", "status": "completed", "usage": {}}, True),
    ],
)
def test_a_count_is_the_last_if_it_was_told_with_the_reason_or_behind_it(
    reason: Any, data: dict[str, Any], known: bool
) -> None:
    """Some providers tell a running count with each piece; of Gemini's events a reason is made up."""
    last = heard(StreamEndEvent(reason, USAGE, data)).last()
    assert (None if last is None else last.usage) == (USAGE if known else None)


def test_a_count_before_more_of_the_answer_is_not_the_last() -> None:
    """And none was told where none came."""
    end = StreamEndEvent("stop", USAGE, {"choices": []})
    assert heard(end, StreamDeltaEvent(TextDelta(text="more", part_index=0))).last() is None
    assert heard().last() is None
