"""What a run is about: an optimizer, a program, its examples and its metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import BetterTogether

from dspy_prod.compat.dspy import CompiledAsProgram, copy_of, input_keys
from dspy_prod.errors import ConfigError
from dspy_prod.optimize.metrics import checked_metric, metric_of
from dspy_prod.optimize.supported import (
    Chosen,
    Rounds,
    Traits,
    accepts,
    fitting,
    parameters_of,
    refuse_steps,
    selection_of,
)


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
    def rounds(self) -> Rounds | None:
        """The optimizer's, if it has any."""
        return None if self.traits.rounds is None else self.traits.rounds(self.optimizer)

    @property
    def examples(self) -> list[Any]:
        """All examples of the optimizer's arguments."""
        found = [*(self.arguments.get("trainset") or ()), *(self.arguments.get("valset") or ())]
        return found or list(self.selection[0])


def task_of(
    optimizer: Any,
    traits: Traits,
    metric: Callable[..., Any] | None,
    student: Any,
    trainset: Any,
    valset: Any,
    testset: Any,
    more: Mapping[str, Any],
) -> tuple[Task, list[str]]:
    """(what is asked for, what of it the optimizer does not get, in words).

    Args:
        optimizer: DSPy's. traits: what is known of it. metric: where it has none of its own.
        student, trainset, valset, testset: of `BudgetedOptimizer.compile`. more: its further arguments.

    Raises:
        ConfigError: an argument is impossible; it names the remedy.
    """
    student = copy_of(checked_student(student))  # nothing that happens meanwhile, here or there, is seen there
    trainset, valset = checked_examples("trainset", trainset), checked_examples("valset", valset, asked=True)
    tested = checked_examples("testset", testset, asked=True) or []
    kind, known = type(optimizer).__name__, parameters_of(optimizer)
    for name in more:
        if not accepts(optimizer, name):
            raise ConfigError(
                f"BudgetedOptimizer.compile: {name}: {kind}.compile does not take it; it takes "
                f"{', '.join(each for each in known if each not in ('self', 'student'))}"
            )
    given: dict[str, Any] = {
        **more,
        **({"trainset": trainset} if trainset is not None else {}),
        **({"valset": valset} if valset else {}),
    }
    refuse_steps(optimizer, given)
    passed, kept_back = dict(more), []
    for name, use in (("trainset", "nothing of it reaches the optimizer"), ("valset", "it selects the result")):
        if name not in given:
            continue
        if accepts(optimizer, name):
            passed[name] = given[name]
        else:
            kept_back.append(f"{name} is not used by {kind}; {use}")
    if isinstance(optimizer, BetterTogether) and passed.get("seed") is None and accepts(optimizer, "seed"):
        passed["seed"] = 0  # it would draw one
    if passed.get("teacher") is not None:
        teachers = passed["teacher"]
        passed["teacher"] = [_teacher(each) for each in teachers] if isinstance(teachers, list) else _teacher(teachers)
    fitting(optimizer, student, passed)
    examples, source = selection_of(optimizer, traits, given)
    metric = metric_of(optimizer) or metric
    if metric is None:
        kept_back.append(f"{kind} has no metric, so nothing is evaluated: give BudgetedOptimizer a metric=")
    else:
        checked_metric(metric)
        checked_examples(source, examples, asked=True)
    task = Task(
        optimizer=optimizer, traits=traits, student=student, arguments=passed, selection=(examples, source),
        testset=tested, metric=metric, num_threads=threads_of(optimizer, passed),
    )  # fmt: skip
    return task, kept_back


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
    """The program itself, out of a `Production`.

    Raises:
        ConfigError: it is no program.
    """
    while isinstance(student, CompiledAsProgram) and isinstance(getattr(student, "program", None), dspy.Module):
        student = student.program  # type: ignore[attr-defined]
    if not isinstance(student, dspy.Module):
        raise ConfigError(f"BudgetedOptimizer.compile: student: takes a dspy.Module, got {type(student).__name__}")
    return student


def _teacher(teacher: Any) -> Any:
    """A copy of a teacher, whose LMs are put under the caps meanwhile; the program itself, out of a `Production`."""
    return copy_of(checked_student(teacher)) if isinstance(teacher, dspy.Module) else teacher


def checked_examples(name: str, examples: Any, *, asked: bool = False) -> list[Any] | None:
    """The examples of an argument as a list; None where none were given.

    Args:
        name: of the argument. examples: any iterable of them. asked: programs are asked them, so that it has to be
            known which of their fields are inputs.

    Raises:
        ConfigError: it holds something else, or an example without inputs.
    """
    if examples is None:
        return None
    where = f"BudgetedOptimizer.compile: {name}"
    if isinstance(examples, (str, Mapping)) or not isinstance(examples, Iterable) or hasattr(examples, "columns"):
        raise ConfigError(f"{where}: takes a list of dspy.Example, got {type(examples).__name__}")
    found = list(examples)
    for place, example in enumerate(found):
        if not isinstance(example, dspy.Example):
            raise ConfigError(
                f"{where}: takes dspy.Example, got {type(example).__name__} at {place}: "
                "dspy.Example(**fields).with_inputs('question')"
            )
        if asked and not input_keys(example):
            raise ConfigError(
                f"{where}: the example at {place} does not say which of its fields are inputs, so no program could be "
                f"asked it: example.with_inputs({next(iter(example.keys()), 'question')!r})"
            )
    return found
