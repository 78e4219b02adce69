"""Characters that steer a screen instead of standing on it, shown for what they are.

A name or an error may hold escape sequences, and marks that turn the direction of writing round, whoever sent them.
"""

from __future__ import annotations

import re
from typing import Final

UNSEEN: Final = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""C1, marks of direction, further ends of lines and halves of characters, for a class in a regular expression."""

_UNSEEN: Final = re.compile(rf"[\x00-\x09\x0b-\x1f{UNSEEN}]")


def visible(text: str) -> str:
    """A text with each of these as Python writes it; line feeds stay."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def carried(text: str) -> str:
    """Text that UTF-8 can carry: half a character becomes what Python writes for it, so two of them stay two."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
