"""Calls of LMs that another one answers: every call made under a DSPy setting, whatever LM it is made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, Protocol

import dspy

from dspy_prod.compat.dspy import thread_local_overrides

SETTING: Final = "dspy_prod_rehearsal"
"""Name of the DSPy setting that carries who answers; it follows a program into DSPy's threads."""

_LOCK = threading.RLock()
_before: dict[tuple[type[Any], str], Any] = {}
_users = 0


class Answers(Protocol):
    """Who answers in the place of LMs."""

    def answer(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `lm(*args, **kwargs)` gives."""
        ...


@contextmanager
def answered_by(answers: Answers | None, kinds: tuple[type[Any], ...] = ()) -> Iterator[None]:
    """Let `answers` answer every call of an LM made inside; None: the LMs themselves, within such a block too.

    Args:
        kinds: classes of LMs beside DSPy's own that may be called.
    """
    if answers is None:
        with dspy.context(**{SETTING: None}):
            yield
        return
    with _turned_aside((dspy.BaseLM, dspy.LM, *kinds)), dspy.context(**{SETTING: answers}):
        yield


@contextmanager
def _turned_aside(kinds: tuple[type[Any], ...]) -> Iterator[None]:
    global _users
    with _LOCK:
        _users += 1
        for kind in kinds:
            for base in kind.__mro__:
                if isinstance(base, type) and issubclass(base, dspy.BaseLM):
                    for name, turn in (("__call__", _turned), ("acall", _aturned)):
                        if name in vars(base) and (base, name) not in _before:
                            _before[base, name] = vars(base)[name]
                            setattr(base, name, turn(vars(base)[name]))
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if not _users:
                for (kind, name), method in _before.items():
                    setattr(kind, name, method)
                _before.clear()


def _who() -> Answers | None:
    found: Answers | None = thread_local_overrides.get().get(SETTING)
    return found


def _turned(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        who = _who()
        return method(self, *args, **kwargs) if who is None else who.answer(self, args, kwargs)

    return called


def _aturned(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    async def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        who = _who()
        return await method(self, *args, **kwargs) if who is None else who.answer(self, args, kwargs)

    return called
