"""What a rehearsal makes up: texts and values that nobody has said, always the same ones for the same question."""

from __future__ import annotations

import hashlib
from math import sqrt
from typing import Any, Final

UNKNOWN: Final = 400
"""Characters of an answer that nobody has seen."""


def share(*parts: Any) -> float:
    """A number from 0 to 1 that looks drawn, and is always the same for the same parts."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def varied(text: str, salt: str) -> str:
    """A text of the same length that nobody has said before: one of its words is another one."""
    start = text.find("```")
    inside = text.find("\n", start) + 1 if start >= 0 else 0
    spots = [index for index in range(inside, len(text)) if text[index].isalpha() and text[index].islower()]
    runs = [i for i in spots if text[i : i + 6].isalpha() and text[i : i + 6].islower() and len(text) >= i + 6]
    if not runs:
        return text
    at = runs[int(share(salt, "at") * len(runs))]
    letters = "".join(chr(97 + int(share(salt, number) * 26)) for number in range(6))
    return text[:at] + letters + text[at + 6 :]


def made_up(annotation: Any, salt: str) -> Any:
    """A value of a type."""
    from pydantic import TypeAdapter

    if annotation is str:
        return words(UNKNOWN, salt)
    options = getattr(annotation, "__args__", ())
    for value in (*options, 1, 0.5, True, [], {}, "text"):
        try:
            return TypeAdapter(annotation).validate_python(value)
        except Exception:  # of another type: the next one
            continue
    return None


def words(length: int, salt: str) -> str:
    made = [str(int(share(salt, number) * 10**6)) for number in range(length // 8 + 1)]
    return ("Look at " + " ".join(made))[:length]


def cut(text: str, max_tokens: Any) -> str:
    return text if not isinstance(max_tokens, int) else text[: int(max_tokens * 4 * sqrt(2))]
