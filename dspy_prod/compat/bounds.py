"""How much is read of what a provider sends, whatever it sends: one table, for both engines.

| bound | of what | beyond it |
|---|---|---|
| `ANSWER` | the body of a whole answer, decompressed | the attempt has failed |
| `STREAM` | the body of a streamed answer, decompressed | the attempt has failed |
| `EXPANDED` | what one read, of 64 KiB at most, may decompress to | the attempt has failed |
| `ERROR` | the body of an HTTP error or a redirect | the rest is not read; the status says what it means |
| `AHEAD` | events that wait between a worker thread and the reader of a stream | the worker waits for room |
| `LATE` | time that an attempt which nobody waits for may still read | its connection is closed |

An attempt that failed so was sent and is owed: the same route is not paid twice for it, another is asked.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Final

ANSWER: Final = 32 << 20
"""Bytes: pictures and recordings in base64 fit; read as JSON they take a few times as much memory."""

STREAM: Final = 64 << 20
"""Bytes: 200,000 tokens of 300 bytes each, as OpenAI's chat API wraps them."""

EXPANDED: Final = 4 << 20
"""Bytes: 64 times what was read. Text hardly compresses so well; a bomb does 1,000 times."""

ERROR: Final = 256 << 10
"""Bytes: the longest error texts echo a part of the prompt."""

AHEAD: Final = 64
"""Events."""

LATE: Final = 30.0
"""Seconds, in which a usage that arrives late still corrects the charge."""


class BodyTooLongError(Exception):
    """A provider sent more than is read.

    Attributes:
        response: what tells the status of the answer, as the errors of HTTP clients do.
    """

    def __init__(self, status: int) -> None:
        super().__init__(too_long(status))
        self.response = SimpleNamespace(status_code=status, headers={}, text="")


def too_long(status: int) -> str:
    """What an error says of a body above its bound: nothing of what is in it."""
    return f"The provider's answer (HTTP {status}) is larger than any that is read; the connection was closed"


def bound_of(status: int, content_type: str) -> int:
    """Bytes that are read of a body."""
    if status >= 300:
        return ERROR
    return STREAM if "stream" in content_type or "ndjson" in content_type else ANSWER


def slice_of(coding: str) -> int:
    """Bytes that are decompressed at once, so that little can come of them before it is counted."""
    return 1024 if coding in ("gzip", "deflate") else 32
