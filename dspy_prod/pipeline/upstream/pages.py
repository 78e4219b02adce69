"""Pages that a provider, or a proxy in front of it, sends in place of an answer: an error tells a part of one."""

from __future__ import annotations

from typing import Final

from dspy_prod.compat import bounds
from dspy_prod.privacy.known import blotted_in, known

_CUT: Final = 200
"""Bytes: a page that is no longer is told whole."""


def without_secrets(page: bytes) -> bytes:
    """A page without known secrets, for whoever cuts it: nobody knows half of one.

    Of a page that is longer than any error's, only the beginning: more of it is not told.
    """
    if len(page) <= _CUT:
        return page
    text = page[: bounds.ERROR].decode(errors="surrogateescape")
    clean = blotted_in(text, known())
    return page if clean is text else clean.encode(errors="surrogateescape")
