"""LMs that a program calls past this library: no budget, no limit and no ledger knows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import dspy
from dspy.utils import DummyLM

from dspy_prod.errors import ConfigError
from dspy_prod.pipeline.pipeline import Pipeline

_log = logging.getLogger("dspy_prod")

Unguarded: TypeAlias = Literal["warn", "refuse", "allow"]
CHOICES: Final = ("warn", "refuse", "allow")


class Guard:
    """Looks at the LMs of a program's predictors, cheaply enough for each call.

    Args:
        name: the program, in words to people.
        unguarded: what to do about an LM that is not a `dspy_prod.LM`.
    """

    def __init__(self, name: str, unguarded: Unguarded) -> None:
        if unguarded not in CHOICES:
            raise ConfigError(f"unguarded={unguarded!r}: use {', '.join(map(repr, CHOICES))}")
        self._name = name
        self._unguarded = unguarded
        self._program: Any = None
        self._predictors: list[tuple[str, Any]] = []
        self._known: set[tuple[str, str]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (self._name, self._unguarded)  # a copy looks at the copied program

    def look(self, program: Any) -> None:
        """Notice what has not been said yet.

        Raises:
            ConfigError: with `"refuse"`.
        """
        if self._unguarded == "allow":
            return
        if program is not self._program:
            found = program.named_sub_modules(dspy.Predict, skip_compiled=False)
            self._predictors = [(name.removeprefix("self."), predictor) for name, predictor in found]
            self._program = program
        for predictor, lm in self._used():
            if not is_guarded(lm):
                self._object(predictor, lm)

    def again(self) -> None:
        """The program's predictors were replaced."""
        self._program = None

    def _used(self) -> Iterator[tuple[str, Any]]:
        for name, predictor in self._predictors:
            lm = getattr(predictor, "lm", None)
            yield name, dspy.settings.lm if lm is None else lm

    def _object(self, predictor: str, lm: Any) -> None:
        model = str(getattr(lm, "model", type(lm).__name__))
        if (predictor, model) in self._known:
            return
        what = (
            f"predictor {predictor!r} of {self._name!r} calls {model!r} past every budget, limit and ledger: "
            "its LM is no dspy_prod.LM; make it one, or use dspy_prod.wrap(lm)"
        )
        if self._unguarded == "refuse":
            raise ConfigError(f"{what}, or allow it with Production(..., unguarded='warn')")
        self._known.add((predictor, model))
        _log.warning("%s, or say Production(..., unguarded='allow')", what)


def is_guarded(lm: Any) -> bool:
    """Whether calls of this LM pass our pipeline, or reach nobody: no LM is set, or DSPy's dummy for tests."""
    return lm is None or isinstance(getattr(lm, "pipeline", None), Pipeline) or isinstance(lm, DummyLM)
