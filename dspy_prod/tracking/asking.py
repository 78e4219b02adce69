"""Which predictor of a program asks. On the courier's thread: a call only leaves the modules that it is within."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from typing import Any, Final

_log = logging.getLogger("dspy_prod")

AGAIN: Final = 1.0
"""Seconds before a program without the predictor is looked through again: it may make new ones for each call."""


class Predictors:
    """Names of predictors, as `named_predictors()` of their program has them."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], str]] = weakref.WeakKeyDictionary()
        self._looked: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def name(self, program: Any, callers: Sequence[Any] | None) -> str | None:
        """The predictor that asks; None when the program is one by itself, or does not know it.

        Args:
            program: the module whose predictors have the names; None for the outermost caller.
            callers: the modules that the call is within, the outermost first.
        """
        if not callers:
            return None
        try:
            return self._found(callers[0] if program is None else program, callers)
        except Exception:  # a program's own methods, or one that changes meanwhile
            _log.debug("The predictor of an LM call could not be named", exc_info=True)
            return None

    def _found(self, program: Any, callers: Sequence[Any]) -> str | None:
        for again in (False, True):
            if again and not self._look(program):
                return None
            for caller in reversed(callers):
                known = self._names.get(caller)
                if known is not None and known[0]() is program:
                    return None if known[1] == "self" else known[1]
                if caller is program:
                    break
        return None

    def _look(self, program: Any) -> bool:
        """Learn the names of a program's predictors, unless that was just done."""
        now = time.monotonic()
        if now - self._looked.get(program, -AGAIN) < AGAIN:
            return False
        self._looked[program] = now
        its = weakref.ref(program)
        for name, predictor in program.named_predictors():
            self._names[predictor] = (its, name)
        return True
