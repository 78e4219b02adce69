"""Who calls an LM at all: a look at every call in the process, for the time that it takes to run one example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import dspy

Look = Callable[[Any], None]

_LOCK = threading.Lock()
_LOOKS: list[Look] = []
_WRAPPED: dict[tuple[type[Any], str], Any] = {}
"""The methods of classes of LMs that stand in for their own while anybody looks."""


@contextmanager
def looking_at_calls(kinds: tuple[type[Any], ...], look: Look) -> Iterator[None]:
    """Call `look(lm)` before every call of an LM in the process, in the thread that makes it; what it raises ends it.

    Several may look at once.

    Args:
        kinds: classes of LMs beside DSPy's own whose calls are looked at.
        look: takes the LM.
    """
    with _LOCK:
        _LOOKS.append(look)
        for base in {base for kind in kinds for base in kind.__mro__}:
            if isinstance(base, type) and issubclass(base, dspy.BaseLM):
                for name in ("__call__", "acall"):
                    if name in vars(base) and (base, name) not in _WRAPPED:
                        _WRAPPED[base, name] = vars(base)[name]
                        setattr(base, name, _looked_at(vars(base)[name]))
    try:
        yield
    finally:
        with _LOCK:
            _LOOKS.remove(look)
            if not _LOOKS:
                for (base, name), method in _WRAPPED.items():
                    setattr(base, name, method)
                _WRAPPED.clear()


def _looked_at(method: Any) -> Any:
    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        for look in tuple(_LOOKS):
            look(self)
        return method(self, *args, **kwargs)

    return called


def is_without_lm(error: BaseException) -> bool:
    """Whether DSPy says that nobody has configured an LM."""
    return isinstance(error, ValueError) and str(error).startswith("No LM is loaded")
