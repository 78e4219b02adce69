"""Where payment cards and IBANs are in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dspy_prod.privacy.spans import Span

SPACE: Final = " \\t\u00a0\u2007\u2009\u202f"
DASH: Final = "\\-\u2010-\u2015\u2212"

# -- payment cards ---------------------------------------------------------------------------------------------------
_RUN: Final = re.compile(rf"\d(?=(?:[{SPACE}{DASH}]{{0,3}}\d){{12}})\d*(?:[{SPACE}{DASH}]{{1,3}}\d+)*")
"""Thirteen digits or more, with what may stand between them."""

GROUP: Final = re.compile(r"\d+")
_DATE: Final = re.compile(rf"(?:19|20)\d\d[{DASH}](?:0[1-9]|1[0-2])[{DASH}](?:0[1-9]|[12]\d|3[01])(?!\d)")
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
    groups = [match.span() for match in GROUP.finditer(text, begin, end)]
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
    return not (len(groups) == 1 and _in_digest(text, begin, end)) and not in_uuid(text, begin)


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


def in_uuid(text: str, begin: int) -> bool:
    """Whether one of a UUID's groups begins here."""
    return any(_UUID.match(text, max(0, begin - back)) for back in (0, 9, 14, 19, 24))


# -- IBAN ------------------------------------------------------------------------------------------------------------
_IBAN_DIGITS: Final = re.compile(r"[0-9]{2}(?<=[A-Za-z][A-Za-z][0-9][0-9])(?<![A-Za-z0-9][A-Za-z][A-Za-z][0-9][0-9])")
"""The check digits: searching for digits first is much faster than searching for letters."""

_IBAN: Final = re.compile(rf"[A-Za-z]{{2}}[0-9]{{2}}(?:[{SPACE}{DASH}]?[A-Za-z0-9]){{11,30}}")
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
