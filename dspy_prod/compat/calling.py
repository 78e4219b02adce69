"""Who calls an LM at all: a look at every call in the process, for the time that it takes to run one example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import dspy

_LOCK = threading.RLock()


@contextmanager
def looking_at_calls(kinds: tuple[type[Any], ...], look: Callable[[Any], None]) -> Iterator[None]:
    """Call `look(lm)` before every call of an LM in the process, in the thread that makes it; what it raises ends it.

    Args:
        kinds: classes of LMs beside DSPy's own whose calls are looked at.
        look: takes the LM.
    """
    found: dict[tuple[type[Any], str], Any] = {}
    for kind in kinds:
        for base in kind.__mro__:
            if isinstance(base, type) and issubclass(base, dspy.BaseLM):
                for name in ("__call__", "acall"):
                    if name in vars(base):
                        found[base, name] = vars(base)[name]
    with _LOCK:
        try:
            for (kind, name), method in found.items():
                setattr(kind, name, _looked_at(method, look))
            yield
        finally:
            for (kind, name), method in found.items():
                setattr(kind, name, method)


def _looked_at(method: Any, look: Callable[[Any], None]) -> Any:
    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        look(self)
        return method(self, *args, **kwargs)

    return called
