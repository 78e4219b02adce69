"""Where phone numbers are in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dspy_prod.privacy.numbers import DASH, GROUP, SPACE, in_uuid
from dspy_prod.privacy.spans import Span, lower

_TERRITORY: Final = re.compile(rf"\d(?=(?:[{SPACE}{DASH}./()]{{0,3}}\d){{6}})\d*(?:[{SPACE}{DASH}./()]{{1,3}}\d+)*")
"""Where there are digits enough for a phone number; nothing else is looked at."""

_BEGIN: Final = re.compile(r"[+\uff0b(]|\d+")
_GAP: Final = (
    rf"(?:\.|[{SPACE}]{{1,2}}|[{SPACE}]?[{DASH}/][{SPACE}]?"
    rf"|[{SPACE}]?\([{SPACE}]?|\)[{SPACE}]?[{DASH}/]?[{SPACE}]?\(?)"
)
_NO_DATE: Final = rf"(?!(?:19|20)\d\d[{DASH}./]\d\d?[{DASH}./]\d)"
_DAY_MONTH: Final = r"(?:0?[1-9]|[12]\d|3[01])"
_DATES: Final = re.compile(
    rf"{_DAY_MONTH}(?P<dot>[{DASH}./ ]){_DAY_MONTH}(?P=dot)(?:(?:19|20)\d\d|\d\d(?!(?P=dot)\d\d(?!\d)))(?!\d)"
    rf"|(?:19|20)\d\d(?P<dash>[{DASH}./ ])\d\d?(?P=dash)\d\d?(?!\d)"
)
_NOT_PHONES: Final = re.compile(rf"\d{{1,3}}(?:\.\d{{1,3}}){{3}}(?![\d.])|\d\d\.\d\d[ ]?[{DASH}][ ]?\d\d\.\d\d(?!\d)")
"""IPv4 addresses and opening hours."""

_INTERNATIONAL: Final = re.compile(
    rf"(?<![\w+\uff0b])[+\uff0b][ ]?\(?[1-9]\d{{0,14}}(?:{_GAP}\d(?=\D))?(?:{_GAP}{_NO_DATE}\d{{2,12}}){{0,6}}(?!\w)"
)
_NATIONAL: Final = re.compile(
    rf"""
    (?<![\w\#$€£]) (?<!\w[{DASH}]) (?<!\d[.,:/+])
    (?:
        (?P<trunk>(?!(?<=\d{{4}}[ ])\d{{4}}[ ])0\d{{1,5}}(?:{_GAP}{_NO_DATE}\d{{2,9}}){{1,6}})     # 030 1234567
      | \((?!(?:19|20)\d\d\))0?\d{{2,4}}\)[ ]?\d{{3,5}}(?:[{DASH}.\ ]\d{{2,5}}){{1,3}}  # (415) 555-2671
      | \(0\d{{1,5}}\)[ ]?[/{DASH}]?[ ]?\d{{3,9}}(?:[{DASH}.\ ]\d{{2,5}}){{0,3}}   # (030) 1234567
      | (?:1[{DASH}.\ ])?[2-9]\d\d(?P<us>[{DASH}.\ ])\d{{3}}(?P=us)\d{{4}}      # 415-555-2671
      | 1[{DASH}.\ ]\([2-9]\d\d\)[ ]?\d{{3}}[{DASH}.\ ]\d{{4}}               # 1 (415) 555-2671
      | 1[3-9]\d(?P<cn>[{DASH}\ ])\d{{4}}(?P=cn)\d{{4}}                         # 138-0013-8000
      | [6-9]\d{{4}}[{DASH}\ ]\d{{5}}                                           # 98765 43210
      | [6-9]\d\d[ ]\d\d[ ]\d\d[ ]\d\d                                         # 612 34 56 78
    )
    (?![{DASH}]?\w|[./]\d)
    """,
    re.VERBOSE,
)


def phones(text: str) -> list[Span]:
    """Phone numbers: international ones (`+49 30 1234567`), and national ones as they are commonly written.

    A bare run of digits is a phone number only next to a word that says so (`tel`, `phone`, ...): it may as well be
    an order number.
    """
    spans: list[Span] = []
    for territory in _TERRITORY.finditer(text):
        begin, end = territory.span()
        while begin > 0 and territory.start() - begin < 3 and text[begin - 1] in "+\uff0b( ":
            begin -= 1
        spans += _phones_in(text, begin, end)
    return spans + _said(text, spans)


def _phones_in(text: str, at: int, end: int) -> Iterator[Span]:
    while (start := _BEGIN.search(text, at, end)) is not None:
        begin, at = start.span()
        match = _INTERNATIONAL.match(text, begin)
        most, fewest = 15, 8
        if match is None:
            none = _DATES.match(text, begin) or _NOT_PHONES.match(text, begin)
            if none is not None:
                at = none.end()
                continue
            match = _NATIONAL.match(text, begin)
            if match is None:
                continue
            most, fewest = 13, 9 if match["trunk"] else 8
        stop = _enough(text, begin, match.end(), fewest, most)
        if stop is not None and not in_uuid(text, begin):
            yield begin, stop
            at = stop


def _enough(text: str, begin: int, end: int, fewest: int, most: int) -> int | None:
    """Where the number ends, without further numbers behind it; None when it is too short or too long."""
    digits = 0
    stop = begin
    for match in GROUP.finditer(text, begin, end):
        digits += match.end() - match.start()
        if digits > most:
            if not any(map(str.isspace, text[stop : match.start()])):
                return None
            digits -= match.end() - match.start()
            break
        stop = match.end()
    return stop if digits >= fewest else None


_SAID_NUMBER: Final = (
    r"(?:[ _-]?(?:number|nummer|no|nr|num))?\.?(?: (?:is|was|at|ist|lautet))?"
    r"[\"'\\]{0,4}[ ]?[:=#-]{0,2}[ ]?[\"'\\]{0,4}"
    rf"(?P<number>\(?\d{{2,15}}\)?(?:[{SPACE}{DASH}./]{_NO_DATE}\d{{2,9}}){{0,5}})(?!\w|[.,:]\d)"
)
_SAID: Final = {
    needle: re.compile(rf"{guard}{needle}{ending}{_SAID_NUMBER}")
    for needle, guard, ending in (
        ("phone", "", "s?"),
        ("telef", "", "[oó]n[eo]?"),
        ("tel", "(?<![^\\W_])", ""),
        ("mobil", "", "[eo]?(?:[ _-]?phone)?"),
        ("m\u00f3vil", "", ""),
        ("cell", "(?<![^\\W_])", "(?:[ _-]?phone)?"),
        ("fax", "(?<![^\\W_])", ""),
        ("whatsapp", "", ""),
        ("handy", "(?<![^\\W_])", ""),
        ("rufnummer", "", ""),
    )
}
"""Words that say that a phone number follows, as literals to search for with what may stand around them."""


def _said(text: str, found: list[Span]) -> list[Span]:
    """Numbers that the text itself calls a phone number, seven digits or more."""
    lowered = lower(text)
    spans: list[Span] = []
    for needle, pattern in _SAID.items():
        at = lowered.find(needle)
        while at >= 0:
            match = pattern.match(lowered, at)
            at = lowered.find(needle, at + 1)
            if match is None:
                continue
            begin, end = match.span("number")
            stop = (
                None
                if _DATES.match(text, begin) or _NOT_PHONES.match(text, begin)
                else _enough(text, begin, end, 7, 15)
            )
            if stop is not None:
                spans.append((begin, stop))
    return spans
