"""What a run is about: an optimizer, a program, its examples and its metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.supported import Chosen, Traits


@dataclass
class Task:
    """What is to be optimized, and with what.

    Attributes:
        optimizer: DSPy's. traits: what is known of it. student: the given program. arguments: of its `compile`.
        selection: the examples that the best is chosen by, and where they come from.
        testset: untouched examples. metric: what scores; None where nobody told one.
        num_threads: of our own evaluations.
    """

    optimizer: Any
    traits: Traits
    student: Any
    arguments: Mapping[str, Any]
    selection: Chosen
    testset: Sequence[Any]
    metric: Callable[..., Any] | None
    num_threads: int | None

    @property
    def examples(self) -> list[Any]:
        """All examples of the optimizer's arguments."""
        found = [*(self.arguments.get("trainset") or ()), *(self.arguments.get("valset") or ())]
        return found or list(self.selection[0])


def threads_of(optimizer: Any, arguments: Mapping[str, Any]) -> int | None:
    """How many threads the optimizer evaluates with."""
    for found in (
        arguments.get("num_threads"), (arguments.get("eval_kwargs") or {}).get("num_threads"),
        getattr(optimizer, "num_threads", None),
    ):  # fmt: skip
        if isinstance(found, int):
            return found
    return None


def checked_student(student: Any) -> Any:
    """The program itself, out of what wraps it.

    Raises:
        ConfigError: it is no program.
    """
    while not isinstance(student, dspy.Module) or type(student).__name__ == "Production":
        inner = getattr(student, "program", None)
        if inner is None:
            raise ConfigError(f"BudgetedOptimizer.compile: student: takes a dspy.Module, got {type(student).__name__}")
        student = inner
    return student
