"""How failures read, and what they show."""

from __future__ import annotations

from typing import Any

from dspy.lm15 import Message, Response, Usage
from dspy.utils.exceptions import LMCollectionLimitError, LMServerError

from dspy_prod.pipeline.failures import shows_partial

PARTIAL: Any = Response(
    id="x", model="m", message=Message.assistant("as far as it"), finish_reason="stop", usage=Usage()
)


def test_an_error_shows_what_came_before_it_unless_it_does_so_itself() -> None:
    error: Any = LMServerError("broke")
    shows_partial(error, PARTIAL)
    assert error.partial is PARTIAL
    shows_partial(error, "another")  # type: ignore[arg-type]
    assert error.partial is PARTIAL


def test_an_error_whose_class_shows_it_alone_stays_as_it_is() -> None:
    """Its property cannot be set: what was told of the stream was an AttributeError."""
    error = LMCollectionLimitError("too much")
    shows_partial(error, PARTIAL)
    assert error.partial is None
