"""The built-in rules by name, and rules of a user's own patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.numbers import cards, ibans, phones
from dspy_prod.privacy.secrets import secrets
from dspy_prod.privacy.spans import Finder, Span, merged

_DIGIT: Final = re.compile(r"\d")
_KIND: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")

_EDGE: Final = r"\s@\uff20<>()\[\]\\,;:\""
_DOMAIN: Final = r"(?:(?:\w[\w-]*\.)+[^\W\d_][\w-]*\w|\[[0-9a-fA-F:.]{3,45}\])"
_EMAIL: Final = re.compile(rf"(?<![^{_EDGE}])(?P<local>[^{_EDGE}]+|\"[^\"\n]{{1,64}}\")[@\uff20]{_DOMAIN}")
_QUOTED_AT: Final = re.compile(rf"(?<![\w.+%-])(?P<local>[\w.+%-]+?)%40{_DOMAIN}")
_BEFORE_LOCAL: Final = re.compile(r".*[/=?{}|`]", re.DOTALL)
_PUNCTUATION: Final = re.compile(r"['*_~.!#$%^&+-]+")


class Rule(NamedTuple):
    """One kind of thing to hide.

    Attributes:
        kind: names it in tokens (`<email>`) and pseudonyms (`email-3f9a2c1b4d5e`).
        find: where it is in a text.
    """

    kind: str
    find: Finder


def emails(text: str) -> list[Span]:
    """Email addresses, with Unicode and plus signs in their local part, also as they are quoted in URLs (`%40`)."""
    spans: list[Span] = []
    if "@" in text or "\uff20" in text:
        spans = [(_local(text, *match.span("local")), match.end()) for match in _EMAIL.finditer(text)]
    if "%40" in text:
        spans += [match.span() for match in _QUOTED_AT.finditer(text)]
    return spans


def _local(text: str, begin: int, end: int) -> int:
    """Where the local part begins: not with what stands before an address in a URL, an assignment or markup.

    All of it may be part of an address, so it is taken when nothing else would be left.
    """
    lead = _BEFORE_LOCAL.match(text, begin, end)
    start = begin if lead is None or lead.end() == end else lead.end()
    marks = _PUNCTUATION.match(text, start, end)
    return start if marks is None or marks.end() == end else marks.end()


def _of_digits(find: Finder) -> Finder:
    return lambda text: find(text) if _DIGIT.search(text) else []


BUILT_IN: Final[Mapping[str, Finder]] = {
    "secret": secrets,
    "email": emails,
    "iban": _of_digits(ibans),
    "card": _of_digits(cards),
    "phone": _of_digits(phones),
}
"""In the order in which they are applied: a password may contain an address, and a card number looks like a phone's."""


def built_in(names: Iterable[str]) -> tuple[Rule, ...]:
    """The named rules, in the order in which they are applied.

    Raises:
        ConfigError: an unknown name.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in BUILT_IN:
            raise ConfigError(f"Redactor(rules=...): {name!r} is no rule; use some of {', '.join(map(repr, BUILT_IN))}")
    return tuple(Rule(name, find) for name, find in BUILT_IN.items() if name in wanted)


def of_patterns(patterns: Any) -> tuple[Rule, ...]:
    """Rules of a user's own: regular expressions by the kind they find.

    Raises:
        ConfigError: an impossible name or pattern; the message says which.
    """
    if not isinstance(patterns, Mapping):
        if not patterns and isinstance(patterns, (list, tuple)):
            return ()
        raise ConfigError('Redactor(patterns=...) takes names with their patterns, e.g. {"ticket": r"TCK-\\d+"}')
    return tuple(_of_pattern(name, pattern) for name, pattern in patterns.items())


def _of_pattern(name: Any, pattern: Any) -> Rule:
    if not isinstance(name, str) or not _KIND.fullmatch(name):
        raise ConfigError(f"Redactor(patterns=...): {name!r} is no name; use letters, digits, - and _, e.g. 'ticket'")
    compiled = pattern
    if isinstance(pattern, str):
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"Redactor(patterns=...): {name!r} is no valid regular expression: {error}") from None
    if not isinstance(compiled, re.Pattern) or not isinstance(compiled.pattern, str):
        raise ConfigError(
            f"Redactor(patterns=...): {name!r} must be a regular expression for text, as str or re.compile(...); "
            f"got {type(pattern).__name__}"
        )
    if compiled.fullmatch(""):
        raise ConfigError(f"Redactor(patterns=...): {name!r} also matches the empty text; make it ask for a character")

    def find(text: str) -> list[Span]:
        return merged(match.span() for match in compiled.finditer(text))

    return Rule(name, find)
