"""Every LM that a run may call: found, put under the run's caps, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError
from dspy_prod.lm.lm import LM
from dspy_prod.lm.wrapping import wrap
from dspy_prod.stores.base import Store

_ROLES: Final = {"task_model": "task", "prompt_model": "prompt", "reflection_lm": "reflection", "lm": "teacher"}
_DEPTH: Final = 6
_FEW: Final = 100
"""Longer collections are data, and hold no LMs."""


class LMs:
    """The LMs of an optimization, by role.

    Args:
        store: where LMs that were plain ones keep what they share.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wrapped: dict[int, tuple[Any, LM]] = {}
        self._kwargs: list[tuple[Any, dict[str, Any]]] = []
        self._undo: list[Callable[[], None]] = []
        self.roles: dict[str, str] = {}
        self.all: list[LM] = []

    def guarded(self, lm: Any, role: str) -> Any:
        """The same LM under our policies; the role that its model has is remembered.

        Raises:
            ConfigError: it is of a kind that nobody can put a cap on.
        """
        if not isinstance(lm, dspy.BaseLM):
            return lm
        known = self._wrapped.get(id(lm))
        if known is not None:
            return known[1]
        guarded = lm if isinstance(lm, LM) else self._wrap(lm, role)
        self._wrapped[id(lm)] = (lm, guarded)
        self.roles.setdefault(guarded.model, role)
        self.all.append(guarded)
        for each in (lm, guarded):
            self._kwargs.append((each, dict(each.kwargs)))
        return guarded

    def _wrap(self, lm: Any, role: str) -> LM:
        try:
            return wrap(lm, store=self._store)
        except ConfigError as error:
            raise ConfigError(
                f"BudgetedOptimizer: the {role} LM {type(lm).__name__} cannot be capped: {error}"
            ) from None

    def program(self, program: Any, role: str) -> None:
        """Put the LMs of a program's predictors under the caps."""
        if not isinstance(program, dspy.Module):
            return
        for _, predictor in program.named_predictors():
            if isinstance(predictor.lm, dspy.BaseLM):
                self._set(predictor, "lm", self.guarded(predictor.lm, role))

    def within(self, holder: Any) -> None:
        """Put the LMs that an optimizer names under the caps, those of the optimizers and programs within it too.

        Args:
            holder: the optimizer, or the arguments of its `compile`.
        """
        self._walk(holder, set(), 0)

    def _walk(self, holder: Any, seen: set[int], depth: int) -> None:
        if id(holder) in seen or depth > _DEPTH:
            return
        seen.add(id(holder))
        if isinstance(holder, dspy.Module):
            self.program(holder, "prompt")
        items = holder.items() if isinstance(holder, dict) else vars(holder).items()
        for name, value in list(items):
            if isinstance(value, dspy.BaseLM):
                guarded = self.guarded(value, _ROLES.get(str(name), "prompt"))
                if guarded is not value:
                    self._put(holder, name, guarded)
            elif isinstance(value, (Teleprompter, dspy.Module)) or (isinstance(value, dict) and _may_hold(value)):
                self._walk(value, seen, depth + 1)
            elif isinstance(value, (list, tuple)) and len(value) <= _FEW:
                for place, each in enumerate(value):
                    if isinstance(each, (Teleprompter, dspy.Module)):
                        self._walk(each, seen, depth + 1)
                    elif isinstance(each, dspy.BaseLM) and isinstance(value, list):
                        self._put(value, place, self.guarded(each, "prompt"))

    def _put(self, holder: Any, name: Any, value: Any) -> None:
        if isinstance(holder, (dict, list)):
            before = holder[name]
            holder[name] = value
            self._undo.append(lambda: holder.__setitem__(name, before))
        else:
            self._set(holder, name, value)

    def _set(self, holder: Any, name: str, value: Any) -> None:
        before = getattr(holder, name)
        if before is value:
            return
        setattr(holder, name, value)
        self._undo.append(lambda: setattr(holder, name, before))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give everything back at the end, on every way out."""
        try:
            yield
        finally:
            while self._undo:
                self._undo.pop()()
            for lm, kwargs in self._kwargs:
                if lm.kwargs != kwargs:  # SIMBA writes a roll into those of a teacher
                    lm.kwargs.clear()
                    lm.kwargs.update(kwargs)


def _may_hold(value: dict[Any, Any]) -> bool:
    return len(value) <= _FEW and any(
        isinstance(each, (dspy.BaseLM, Teleprompter, dspy.Module, dict)) for each in value.values()
    )
