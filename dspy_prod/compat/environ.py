"""The environment as the interpreter keeps it: asking for a variable that is not set takes a tenth of the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def snapshot() -> Iterable[tuple[Any, Any]]:
    """The variables, as the interpreter keeps them: for asking whether they are still the same."""
    kept: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
    return kept.items()


def watch(names: Iterable[str]) -> Callable[[], bool]:
    """A function that says whether these environment variables are still as they are now."""
    environment: Any = os.environ
    try:
        kept, keys = environment._data, tuple([environment.encodekey(name) for name in names])
    except AttributeError:
        kept, keys = environment, tuple(names)
    find = kept.get
    base = tuple(map(find, keys))
    if any(value is not None for value in base):
        return lambda: tuple(map(find, keys)) == base
    none_of = kept.keys().isdisjoint
    return lambda: none_of(keys)
