"""How DSPy evaluates a program on many examples, made to stop asking where a race is decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import dspy
from dspy.evaluate import evaluate
from dspy.utils.callback_context import ACTIVE_CALL_ID

from dspy_prod.compat.foreign import names


class Heat(Protocol):
    """The race of one program, as `dspy_prod.optimize.racing` has it."""

    order: list[int]

    def tell(self, index: int, score: float) -> None: ...

    def fail(self, index: int) -> None: ...

    def stop(self) -> None: ...

    @property
    def dropped(self) -> bool: ...

    @property
    def predicted(self) -> float: ...


HEATS: Final[dict[str, Any]] = {}
"""The heat of an evaluation that is raced, by the id that DSPy's callbacks have for the call of `Evaluate`: put in when
it starts, taken out when it ends."""


def install() -> None:
    """Have DSPy's `Evaluate` run the examples of an evaluation that has a heat in the heat's order, and no more of them
    once it is dropped. The rest is answered with an empty prediction and such a score that the mean is the predicted
    one. An evaluation without a heat is as it was. Once for the process."""
    [executor, *_] = names(
        "dspy.evaluate.evaluate",
        "ParallelExecutor",
        "ParallelExecutor.execute",
        "ParallelExecutor._process_outcome",
    )
    if not getattr(executor, "_dspy_prod_raced", False):
        evaluate.ParallelExecutor = _raced(executor)


def _raced(executor: Any) -> Any:
    """A kind of executor that races where there is a heat."""

    class RacedExecutor(executor):
        _dspy_prod_raced = True

        def execute(self, function: Callable[[Any], Any], data: Sequence[Any]) -> list[Any]:
            heat = HEATS.get(ACTIVE_CALL_ID.get() or "")
            if heat is None or len(heat.order) != len(data):
                return super().execute(function, data)  # type: ignore[no-any-return]
            ordered = [_Item(index, data[index]) for index in heat.order]
            results: list[Any] = [None] * len(data)
            for item, result in zip(ordered, super().execute(_Asked(heat, function), ordered), strict=True):
                results[item.index] = result
            _name_failures(self, heat.order)
            return _filled(heat, results)

    RacedExecutor.__name__ = RacedExecutor.__qualname__ = executor.__name__
    return RacedExecutor


def _name_failures(executor: Any, order: Sequence[int]) -> None:
    """DSPy's lists of what failed, which count places in the order of asking, made to count those of the set."""
    executor.failed_indices = [order[at] for at in executor.failed_indices]
    executor.exceptions_map = {order[at]: error for at, error in executor.exceptions_map.items()}


class _Item:
    """An example and its place in the set; it is shown as the example."""

    __slots__ = ("example", "index")

    def __init__(self, index: int, example: Any) -> None:
        self.index, self.example = index, example

    def __repr__(self) -> str:
        return repr(self.example)


class _Asked:
    """What is done with an item: asked while the race is on, and told to the heat."""

    def __init__(self, heat: Heat, function: Callable[[Any], Any]) -> None:
        self._heat, self._function = heat, function

    def __call__(self, item: _Item) -> Any:
        heat = self._heat
        if heat.dropped:
            return _Skipped(heat.predicted)
        try:
            prediction, score = self._function(item.example)
        except Exception:
            heat.fail(item.index)
            raise
        try:
            heat.tell(item.index, float(score))
        except (TypeError, ValueError):
            heat.stop()  # a score that is no number is DSPy's to complain about
        return prediction, score


class _Skipped(tuple[Any, float]):
    """The result of an example that was not asked."""

    __slots__ = ()

    def __new__(cls, score: float) -> _Skipped:
        return super().__new__(cls, (dspy.Prediction(), score))


def _filled(heat: Heat, results: list[Any]) -> list[Any]:
    """The results, with a score in place of the missing ones that makes their mean the predicted one."""
    skipped = [at for at, result in enumerate(results) if isinstance(result, _Skipped)]
    if not skipped:
        return results
    asked = math.fsum(float(result[1]) for result in results if result is not None and not isinstance(result, _Skipped))
    score = (heat.predicted * len(results) - asked) / len(skipped)
    for at in skipped:
        results[at] = (dspy.Prediction(), score)
    return results
