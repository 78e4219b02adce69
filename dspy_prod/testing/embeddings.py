"""POST /v1/embeddings: vectors that depend on nothing but the text, near each other where texts share words."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections import Counter
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.testing.faults import Status

if TYPE_CHECKING:
    from dspy_prod.testing.answers import Reply
    from dspy_prod.testing.bill import Usage
    from dspy_prod.testing.calls import CallView

DIMENSION: Final = 16
"""Numbers of a vector, unless the request says `dimensions`."""
MOST_TEXTS: Final = 2048
MOST_TOKENS: Final = 300_000
"""What one request may hold; more is refused with status 400, as OpenAI does."""

_WORD: Final = re.compile(r"\w+")


def vector(text: str, dimension: int = DIMENSION) -> list[float]:
    """The vector of a text, of length 1: the sum of one for each of its words, and a little of the text's own."""
    total = [0.0] * dimension
    for word, count in Counter(_WORD.findall(text.lower())).items():
        for place, value in enumerate(_noise(word, dimension)):
            total[place] += count * value
    for place, value in enumerate(_noise(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), dimension)):
        total[place] += value / 1000
    length = sqrt(sum(value * value for value in total))
    return [value / length for value in total]


@lru_cache(maxsize=4096)
def _noise(seed: str, dimension: int) -> tuple[float, ...]:
    data = b""
    while len(data) < 4 * dimension:
        data += hashlib.sha256(f"{len(data)}:{seed}".encode("utf-8", "surrogatepass")).digest()
    return tuple([number / 2**31 - 1.0 for (number,) in struct.iter_unpack("<I", data[: 4 * dimension])])


def too_much(call: CallView, tokens: int) -> Status | None:
    """The refusal of a request that holds more than one may."""
    count = len(call.messages)
    if count > MOST_TEXTS or not count:
        return Status(400, f"'input' must hold 1 to {MOST_TEXTS} texts, and holds {count}.")
    if tokens > MOST_TOKENS:
        return Status(400, f"Requested {tokens} tokens, max {MOST_TOKENS} tokens per request.")
    return None


class Embeddings:
    """See the module's docstring."""

    def body(self, reply: Reply, usage: Usage | None) -> dict[str, Any]:
        asked = reply.call.body
        dimension = asked.get("dimensions")
        dimension = dimension if isinstance(dimension, int) and dimension > 0 else DIMENSION
        data = []
        for index, message in enumerate(reply.call.messages):
            found: Any = vector(str(message["content"]), dimension)
            if asked.get("encoding_format") == "base64":
                found = base64.b64encode(struct.pack(f"<{dimension}f", *found)).decode()
            data.append({"object": "embedding", "index": index, "embedding": found})
        body = {"object": "list", "data": data, "model": reply.call.model}
        told = None if usage is None else {"prompt_tokens": usage.input_tokens, "total_tokens": usage.input_tokens}
        return body if told is None else {**body, "usage": told}
