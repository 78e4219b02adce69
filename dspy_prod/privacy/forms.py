"""A known secret in a text, in whatever form somebody has repeated it."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterable
from functools import lru_cache
from typing import Final
from urllib.parse import quote, quote_plus

HIDDEN: Final = "***"
"""Stands for a secret in a text."""

SHORTEST: Final = 6
"""Characters below which a secret is not blotted out of texts: hiding it would garble those that merely contain it."""

LAYERS: Final = 3
"""An error that quotes an error that quotes JSON."""

_WRITTEN: Final = (json.dumps, lambda text: json.dumps(text, ensure_ascii=False), repr)
_ESCAPED: Final = re.compile(r"%[0-9A-F]{2}")


def blotted(text: str, secrets: Iterable[str]) -> str:
    """The text with `***` in place of each secret, in whatever form somebody has repeated it; the longest first."""
    for form in _longest_first(frozenset(secrets)):
        if form in text:
            text = text.replace(form, HIDDEN)
    return text


@lru_cache(maxsize=16)
def _longest_first(secrets: frozenset[str]) -> tuple[str, ...]:
    found = {form for secret in secrets for form in forms(secret)}
    return tuple(sorted(found, key=lambda form: (-len(form), form)))


@lru_cache(maxsize=4096)
def forms(secret: str) -> frozenset[str]:
    """A secret as it stands, as in a URL, in JSON and Python's `repr` (of one another too), in HTML and in base64."""
    from html import escape  # at the first use: importing the package stays light

    plain, raw = str(secret), secret.encode("utf-8", "surrogatepass")
    quoted = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
    found = {plain, repr(raw)[2:-1], escape(plain)}
    for _ in range(LAYERS):
        found |= {as_written(text)[1:-1] for text in found for as_written in _WRITTEN}
    found |= quoted | {_ESCAPED.sub(lambda hit: hit[0].lower(), text) for text in quoted}
    for before in range(3):  # in base64 a text looks different at each of three places
        coded = b64encode(bytes(before) + raw)[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6].decode()
        found |= {coded, coded.replace("+", "-").replace("/", "_")}
    return frozenset({form for form in found if form == plain or len(form) >= SHORTEST})
