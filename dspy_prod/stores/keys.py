"""Keys of accounts and limiters: several names in one text, so that no two lots of names make the same text.

Users choose names, and a name may hold whatever stands between the parts of a key: one budget would then be spent by
another's calls.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

BETWEEN: Final = "|"
"""Stands between the parts."""

NOBODY: Final = "anonymous"
"""Stands for a part that nobody has said. Somebody of that name is written otherwise."""

_WRITTEN_OTHERWISE: Final = re.compile("[%|\ud800-\udfff]")


def joined(*parts: str | None) -> str:
    """The parts as one text; `apart` takes it to pieces again."""
    return BETWEEN.join(map(_written, parts))


def apart(key: str) -> tuple[str | None, ...]:
    """The parts of a key."""
    return tuple([None if part == NOBODY else unquote(part, errors="surrogatepass") for part in key.split(BETWEEN)])


def _written(part: str | None) -> str:
    if part is None:
        return NOBODY
    if part == NOBODY:
        return "%61" + part[1:]
    return _WRITTEN_OTHERWISE.sub(lambda match: quote(match[0], safe="", errors="surrogatepass"), part)
