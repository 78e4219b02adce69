"""Characters that steer a screen instead of standing on it, shown for what they are.

A name or an error may hold escape sequences, and marks that turn the direction of writing round, whoever sent them.
"""

from __future__ import annotations

import re
from typing import Final

UNSEEN: Final = (
    r"\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    r"\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff"
)
"""C1, marks of direction, further ends of lines, what takes no room, and halves of characters, for a class in a regular
expression."""

_JOINERS: Final = r"\u200c\u200d"
"""They take no room either, but scripts and emoji are written with them, and with variants (`FE00`): not with ASCII."""

HIDDEN: Final = re.compile(
    rf"[{UNSEEN}]|(?<![^\x00-\x7f{_JOINERS}])[{_JOINERS}\ufe00-\ufe0f]|[{_JOINERS}](?![^\x00-\x7f{_JOINERS}])"
)
"""One character that is to be shown for what it is, also where C0 is looked after."""

_UNSEEN: Final = re.compile(rf"[\x00-\x09\x0b-\x1f]|{HIDDEN.pattern}")


def visible(text: str) -> str:
    """A text with each of these as Python writes it; line feeds stay."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """The same, line feeds included: what stands in a cell begins no row of its own."""
    return visible(text).replace("\n", r"\n")


def carried(text: str) -> str:
    """Text that UTF-8 can carry: half a character becomes what Python writes for it, so two of them stay two."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
