"""What the tests of the pipeline's parts share: one call of a scripted LM, before it is made."""

from __future__ import annotations

from typing import Any

from dspy.lm15 import Config, Message, Request, Response, TextPart, Usage

import dspy_prod
from dspy_prod.context.current import current
from dspy_prod.pipeline.call import Call


def call_of(lm: dspy_prod.LM, streaming: bool = False, **config: Any) -> Call:
    """A call under the conditions that are in force here."""
    request = Request(model=lm.model, messages=(Message.user("hi"),), config=Config(**{"max_tokens": 100, **config}))
    return Call(lm.pipeline, request, current(), None, None, streaming, [])


def answer(output_tokens: int | None = 50, text: str = "ok") -> Response:
    """An answer that used ten tokens of input, and so many of output; None: its provider told no usage."""
    told = Usage() if output_tokens is None else Usage(input_tokens=10, output_tokens=output_tokens)
    message = Message.assistant([TextPart(text)])
    return Response(id=None, model="m", message=message, finish_reason="stop", usage=told)
