"""The environment as the interpreter keeps it: asking for a variable that is not set takes a tenth of the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any


def watch(names: Iterable[str]) -> Callable[[], tuple[Any, ...]]:
    """A function that gives the present values of environment variables, in a form that only tells them apart."""
    environment: Any = os.environ
    try:
        kept, keys = environment._data, tuple([environment.encodekey(name) for name in names])
    except AttributeError:
        kept, keys = environment, tuple(names)
    find = kept.get
    return lambda: tuple(map(find, keys))
