"""Pages that a provider, or a proxy in front of it, sends in place of an answer: an error tells a part of one."""

from __future__ import annotations

from typing import Final

from dspy_prod.privacy.known import blotted_in, known

_CUT: Final = 200
"""Bytes: a page that is no longer is told whole."""


def without_secrets(page: bytes) -> bytes:
    """A page without known secrets, for whoever cuts it: nobody knows half of one.

    It stays whole: one with status 200 is read once more, and half a JSON tells no usage and another error.
    """
    if len(page) <= _CUT:
        return page
    text = page.decode(errors="surrogateescape")
    clean = blotted_in(text, known())
    return page if clean is text else clean.encode(errors="surrogateescape")
