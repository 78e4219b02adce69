"""Markdown in which every text stands as it is: names, reasons and errors are anybody's, and pages show what they say.

What a gate's error or a name holds must be no tag, link, picture or further column where the report is displayed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from dspy_prod.privacy.visible import visible

LONGEST_DIFF: Final = 20_000
"""Characters of a difference that are shown."""

_MEANING: Final = re.compile(r"[\\`*_\[\]|~$]")
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def literal(text: str) -> str:
    """A text within a line, without any meaning in Markdown or HTML."""
    flat = " ".join(visible(text).split())
    plain = _MEANING.sub(lambda match: f"\\{match[0]}", flat)
    return "".join(_ENTITIES.get(character, character) for character in plain)


def code(text: str) -> str:
    """A name, as code."""
    flat = " ".join(visible(text).split())
    fence = _fence("`", flat)
    return f"{fence}{flat}{fence}" if fence == "`" else f"{fence} {flat} {fence}"


def fenced(text: str) -> str:
    """A difference, as a block."""
    shown = visible(text if len(text) <= LONGEST_DIFF else f"{text[:LONGEST_DIFF]}\n... ({len(text)} characters)")
    fence = _fence("```", shown)
    return f"{fence}diff\n{shown.rstrip(chr(10))}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head, *body = [f"| {' | '.join(map(literal, line))} |" for line in (columns, *rows)]
    return "\n".join([head, f"|{'---|' * len(columns)}", *body])


def _fence(fence: str, text: str) -> str:
    while fence in text:
        fence += "`"
    return fence
