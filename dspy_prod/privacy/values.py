"""Redacting JSON-like values: `Redactor.value`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from dspy_prod.privacy.names import is_secret

DEPTH: Final = 64
SECRET: Final = "<secret>"
_CYCLE: Final = "<cycle>"
_TOO_DEEP: Final = "<too deep>"
_UNREADABLE: Final = "<redaction failed>"
_LONG: Final = 10**12
"""From here on an integer may be a card number."""


class Walk:
    """One walk through a value. Each container in it is visited once.

    Args:
        text: redacts a text.
    """

    def __init__(self, text: Callable[[str], str]) -> None:
        self._text = text
        self._done: dict[int, tuple[Any, Any]] = {}  # by id; holding the value keeps its id from being used again

    def value(self, value: Any, depth: int = 0) -> Any:
        """The value without what is to be hidden; the same object when there is nothing."""
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            return value if -_LONG < value < _LONG else self._number(value)
        if not isinstance(value, (Mapping, list, tuple)):
            return self._text(_shown(value))
        if depth >= DEPTH:
            return _TOO_DEEP
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = (value, _CYCLE)
        try:
            result = self._mapping(value, depth) if isinstance(value, Mapping) else self._sequence(value, depth)
        except Exception:
            result = _UNREADABLE  # a container of somebody's own that cannot be read
        self._done[id(value)] = (value, result)
        return result

    def _number(self, value: int) -> Any:
        try:
            text = str(value)
        except ValueError:  # more digits than Python converts
            return value
        clean = self._text(text)
        return value if clean == text else clean

    def _sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> Any:
        items = [self.value(item, depth + 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items
        make = getattr(value, "_make", None)  # a named tuple
        return tuple(items) if make is None else make(items)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        kept: dict[Any, Any] = {}
        changed = False
        counts: dict[Any, int] = {}
        for name, item in value.items():
            clean_name = self.value(name, depth + 1)
            clean = self._hidden(item) if isinstance(name, str) and is_secret(name) else self.value(item, depth + 1)
            changed = changed or clean_name is not name or clean is not item
            key = clean_name
            while key in kept:  # two addresses are two entries
                counts[clean_name] = counts.get(clean_name, 1) + 1
                key = f"{clean_name}-{counts[clean_name]}"
            kept[key] = clean
        return kept if changed else value

    @staticmethod
    def _hidden(item: Any) -> Any:
        return item if item is None or isinstance(item, bool) or item in ("", SECRET) else SECRET


def _shown(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return _UNREADABLE
