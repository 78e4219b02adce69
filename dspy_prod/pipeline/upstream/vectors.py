"""Texts that ask for vectors, and the vectors that answer them, in the canonical words of a call.

So what admits, sends, settles and records a call does the same for a batch of texts: only what carries it and what
bounds it are others (`embedding.py` beside this, `pipeline.embedding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from dspy.lm15 import DataPart, Message, Request, Response, Usage

WIDTH: Final = 4
"""Bytes of one number: float32, little endian, in memory and in a store."""


@dataclass(frozen=True, slots=True, repr=False)
class Vectors(Response):
    """An answer that was not generated: a vector for each text.

    Attributes:
        rows: each vector as float32, little endian, in the order of the texts.
    """

    rows: tuple[bytes, ...] = ()


def texts_asked(model: str, texts: Sequence[str]) -> Request:
    """The request for the vectors of some texts, at least one."""
    return Request(model=model, messages=tuple([Message.user(text) for text in texts]))


def texts_of(request: Request) -> list[str]:
    """The texts that such a request asks about."""
    return [message.parts[0].text for message in request.messages]


def vectors(model: str, rows: Iterable[bytes], usage: Usage) -> Vectors:
    """The answer with these rows."""
    rows = tuple(rows)
    shape = {"vectors": len(rows), "dimension": len(rows[0]) // WIDTH if rows else 0}
    said = Message.assistant([DataPart(value=shape)])
    return Vectors(id=None, model=model, message=said, finish_reason="stop", usage=usage, rows=rows)
