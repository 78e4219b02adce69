"""Places in a text, and replacing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Span = tuple[int, int]
"""Begin and end of what was found in a text."""

Finder = Callable[[str], list[Span]]
"""Finds what is to be hidden. Its time grows with the text's length, whatever the text is."""


def lower(text: str) -> str:
    """The text in lower case with every character in its place: only İ (U+0130) would become two."""
    return text.replace("\u0130", "I").lower()


def merged(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, with overlapping ones made one."""
    ordered: list[Span] = []
    for begin, end in sorted(spans):
        if ordered and begin < ordered[-1][1]:
            if end > ordered[-1][1]:
                ordered[-1] = (ordered[-1][0], end)
        elif begin < end:
            ordered.append((begin, end))
    return ordered


def replaced(text: str, spans: Iterable[Span], token: str) -> str:
    """The text with a token in each of the spans, which are in order and do not overlap."""
    parts: list[str] = []
    past = 0
    for begin, end in spans:
        parts += (text[past:begin], token)
        past = end
    return "".join(parts) + text[past:]


def widened(spans: Iterable[Span], text: str, tokens: re.Pattern[str]) -> list[Span]:
    """Spans that do not cut a token in two: those within one are dropped, those that reach into one take it whole."""
    kept: list[Span] = []
    held = [match.span() for match in tokens.finditer(text)]
    at = 0
    for begin, end in merged(spans):
        while at < len(held) and held[at][1] <= begin:
            at += 1
        low, high, within, next_at = begin, end, False, at
        while next_at < len(held) and held[next_at][0] < end:
            first, last = held[next_at]
            within = within or (first <= begin and end <= last)
            low, high = min(low, first), max(high, last)
            next_at += 1
        if not within:
            kept.append((low, high))
    return merged(kept)
