"""Where payment cards, IBANs and phone numbers are in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dspy_prod.privacy.spans import Span, lower

_SPACE: Final = " \\t\u00a0\u2007\u2009\u202f"
_DASH: Final = "\\-\u2010-\u2015\u2212"

# -- payment cards ---------------------------------------------------------------------------------------------------
_RUN: Final = re.compile(rf"\d(?=(?:[{_SPACE}{_DASH}]{{0,3}}\d){{12}})\d*(?:[{_SPACE}{_DASH}]{{1,3}}\d+)*")
"""Thirteen digits or more, with what may stand between them."""

_GROUP: Final = re.compile(r"\d+")
_DATE: Final = re.compile(rf"(?:19|20)\d\d[{_DASH}](?:0[1-9]|1[0-2])[{_DASH}](?:0[1-9]|[12]\d|3[01])(?!\d)")
_YEAR: Final = re.compile(r"(?:19|20)\d\d")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?![0-9a-zA-Z])")
_PRINTED: Final = ((4, 4, 4, 4, 3), (4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (8, 8))
"""How cards are written in groups; a card between other numbers is found only in one of these forms."""

_SCHEMES: Final = {13: ("4",), 14: ("30", "36", "38", "39"), 15: ("34", "37"), 16: ("",)}
"""The beginnings with which a card scheme uses a length; a longer card begins as most do."""

_HEX: Final = frozenset("0123456789abcdefABCDEF")
_DIGEST: Final = 32
"""Characters from which a word of hexadecimal digits counts as a digest."""


def cards(text: str) -> list[Span]:
    """Payment card numbers: 13 to 19 digits with spaces or dashes whose check digit is right (Luhn, ISO/IEC 7812).

    One in sixteen digits is taken whatever it begins with; other lengths only where a card scheme uses them, because
    by chance alone one number in ten passes the check.
    """
    return [span for run in _RUN.finditer(text) for span in _cards_in(text, run.start(), run.end())]


def _cards_in(text: str, begin: int, end: int) -> Iterator[Span]:
    groups = [match.span() for match in _GROUP.finditer(text, begin, end)]
    sizes = [stop - start for start, stop in groups]
    if sum(sizes) <= 19 and not _DATE.search(text, begin, end) and _is_card(text, groups):
        yield begin, end
        return
    number = 0
    while number < len(groups):
        taken = 1
        for shape in ((sizes[number],), *_PRINTED):
            here = groups[number : number + len(shape)]
            if tuple(sizes[number : number + len(shape)]) == shape and _is_card(text, here):
                taken = len(shape)
                yield here[0][0], here[-1][1]
                break
        number += taken


def _is_card(text: str, groups: list[Span]) -> bool:
    length = sum(stop - start for start, stop in groups)
    if not 13 <= length <= 19:
        return False
    digits = [int(char) for start, stop in groups for char in text[start:stop]]
    beginnings = _SCHEMES.get(length, ("4", "5", "6"))
    if not f"{digits[0]}{digits[1]}".startswith(beginnings) or not luhn(digits):
        return False
    begin, end = groups[0][0], groups[-1][1]
    if begin >= 2 and text[begin - 1] == "." and text[begin - 2].isdecimal():
        return False  # the digits after a decimal point
    if len(groups) == 4 and all(_YEAR.fullmatch(text, *group) for group in groups):
        return False
    return not (len(groups) == 1 and _in_digest(text, begin, end)) and not _in_uuid(text, begin)


def luhn(digits: list[int]) -> bool:
    """Whether the last digit is the check digit of the others."""
    odd, even = digits[-1::-2], digits[-2::-2]
    return (sum(odd) + sum(2 * digit - 9 * (digit > 4) for digit in even)) % 10 == 0


def _in_digest(text: str, begin: int, end: int) -> bool:
    """Whether the digits are part of a long hexadecimal word such as a SHA-256."""
    low, high = begin, end
    while low > 0 and begin - low < 128 and text[low - 1] in _HEX:
        low -= 1
    while high < len(text) and high - end < 128 and text[high] in _HEX:
        high += 1
    return high - low >= _DIGEST


def _in_uuid(text: str, begin: int) -> bool:
    """Whether one of a UUID's groups begins here."""
    return any(_UUID.match(text, max(0, begin - back)) for back in (0, 9, 14, 19, 24))


# -- IBAN ------------------------------------------------------------------------------------------------------------
_IBAN_DIGITS: Final = re.compile(r"[0-9]{2}(?<=[A-Za-z][A-Za-z][0-9][0-9])(?<![A-Za-z0-9][A-Za-z][A-Za-z][0-9][0-9])")
"""The check digits: searching for digits first is much faster than searching for letters."""

_IBAN: Final = re.compile(rf"[A-Za-z]{{2}}[0-9]{{2}}(?:[{_SPACE}{_DASH}]?[A-Za-z0-9]){{11,30}}")
_IBAN_LENGTHS: Final = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
        "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
        "YE30",
    )
}
"""Length by country, from the SWIFT IBAN registry."""


def ibans(text: str) -> list[Span]:
    """International bank account numbers, with or without spaces, of the right length and checksum (ISO 13616)."""
    spans: list[Span] = []
    past = 0
    for digits in _IBAN_DIGITS.finditer(text):
        begin = digits.start() - 2
        match = _IBAN.match(text, begin) if begin >= past else None
        end = None if match is None else _iban_end(match[0])
        if end is not None:
            past = begin + end
            spans.append((begin, past))
    return spans


def _iban_end(candidate: str) -> int | None:
    length = _IBAN_LENGTHS.get(candidate[:2].upper())
    if length is None:
        return None
    end = kept = 0
    for char in candidate:
        end += 1
        kept += char.isalnum()
        if kept == length:
            break
    if kept < length or (end < len(candidate) and candidate[end].isalnum()):
        return None
    bare = "".join(filter(str.isalnum, candidate[:end])).upper()
    number = "".join(str(int(char, 36)) for char in bare[4:] + bare[:4])
    return end if int(number) % 97 == 1 else None


# -- phone numbers ---------------------------------------------------------------------------------------------------
_TERRITORY: Final = re.compile(rf"\d(?=(?:[{_SPACE}{_DASH}./()]{{0,3}}\d){{6}})\d*(?:[{_SPACE}{_DASH}./()]{{1,3}}\d+)*")
"""Where there are digits enough for a phone number; nothing else is looked at."""

_BEGIN: Final = re.compile(r"[+\uff0b(]|\d+")
_GAP: Final = (
    rf"(?:\.|[{_SPACE}]{{1,2}}|[{_SPACE}]?[{_DASH}/][{_SPACE}]?"
    rf"|[{_SPACE}]?\([{_SPACE}]?|\)[{_SPACE}]?[{_DASH}/]?[{_SPACE}]?\(?)"
)
_NO_DATE: Final = rf"(?!(?:19|20)\d\d[{_DASH}./]\d\d?[{_DASH}./]\d)"
_DAY_MONTH: Final = r"(?:0?[1-9]|[12]\d|3[01])"
_DATES: Final = re.compile(
    rf"{_DAY_MONTH}(?P<dot>[{_DASH}./ ]){_DAY_MONTH}(?P=dot)(?:(?:19|20)\d\d|\d\d(?!(?P=dot)\d\d(?!\d)))(?!\d)"
    rf"|(?:19|20)\d\d(?P<dash>[{_DASH}./ ])\d\d?(?P=dash)\d\d?(?!\d)"
)
_NOT_PHONES: Final = re.compile(rf"\d{{1,3}}(?:\.\d{{1,3}}){{3}}(?![\d.])|\d\d\.\d\d[ ]?[{_DASH}][ ]?\d\d\.\d\d(?!\d)")
"""IPv4 addresses and opening hours."""

_INTERNATIONAL: Final = re.compile(
    rf"(?<![\w+\uff0b])[+\uff0b][ ]?\(?[1-9]\d{{0,14}}(?:{_GAP}\d(?=\D))?(?:{_GAP}{_NO_DATE}\d{{2,12}}){{0,6}}(?!\w)"
)
_NATIONAL: Final = re.compile(
    rf"""
    (?<![\w\#$€£]) (?<!\w[{_DASH}]) (?<!\d[.,:/+])
    (?:
        (?P<trunk>(?!(?<=\d{{4}}[ ])\d{{4}}[ ])0\d{{1,5}}(?:{_GAP}{_NO_DATE}\d{{2,9}}){{1,6}})     # 030 1234567
      | \((?!(?:19|20)\d\d\))0?\d{{2,4}}\)[ ]?\d{{3,5}}(?:[{_DASH}.\ ]\d{{2,5}}){{1,3}}  # (415) 555-2671
      | \(0\d{{1,5}}\)[ ]?[/{_DASH}]?[ ]?\d{{3,9}}(?:[{_DASH}.\ ]\d{{2,5}}){{0,3}}   # (030) 1234567
      | (?:1[{_DASH}.\ ])?[2-9]\d\d(?P<us>[{_DASH}.\ ])\d{{3}}(?P=us)\d{{4}}      # 415-555-2671
      | 1[{_DASH}.\ ]\([2-9]\d\d\)[ ]?\d{{3}}[{_DASH}.\ ]\d{{4}}               # 1 (415) 555-2671
      | 1[3-9]\d(?P<cn>[{_DASH}\ ])\d{{4}}(?P=cn)\d{{4}}                         # 138-0013-8000
      | [6-9]\d{{4}}[{_DASH}\ ]\d{{5}}                                           # 98765 43210
      | [6-9]\d\d[ ]\d\d[ ]\d\d[ ]\d\d                                         # 612 34 56 78
    )
    (?![{_DASH}]?\w|[./]\d)
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
        if stop is not None and not _in_uuid(text, begin):
            yield begin, stop
            at = stop


def _enough(text: str, begin: int, end: int, fewest: int, most: int) -> int | None:
    """Where the number ends, without further numbers behind it; None when it is too short or too long."""
    digits = 0
    stop = begin
    for match in _GROUP.finditer(text, begin, end):
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
    rf"(?P<number>\(?\d{{2,15}}\)?(?:[{_SPACE}{_DASH}./]{_NO_DATE}\d{{2,9}}){{0,5}})(?!\w|[.,:]\d)"
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
