"""The metric of an optimizer, wherever it keeps it: found, watched for the time of a run, and given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.scored import Scored
from dspy_prod.optimize.supported import traits_of

_NAMES: Final = ("metric", "metric_fn")


def metric_of(optimizer: Any) -> Callable[..., Any] | None:
    """The metric that an optimizer, or one within it, was given; None when there is none."""
    return next((metric for _, _, metric, _ in _places(optimizer)), None)


def checked_metric(metric: Any) -> None:
    """See whether it can be asked as DSPy's evaluations ask it.

    Raises:
        ConfigError: it cannot.
    """
    if not callable(metric):
        raise ConfigError(f"BudgetedOptimizer: metric: must be a function of (example, prediction), got {metric!r}")
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # it is written in C
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"BudgetedOptimizer: metric: evaluations call metric(example, prediction), which this one does not take "
            f"({error}). Give its other parameters a default, as trace=None"
        ) from None


def optimizers_within(optimizer: Any) -> list[Any]:
    """An optimizer and those within it, as far as they have a metric."""
    return [holder for holder, _, _, _ in _places(optimizer) if isinstance(holder, Teleprompter)]


class Metrics:
    """The metrics of a run.

    Args:
        camera: sees what they tell. metric: of our own evaluations; None where there is none.

    Attributes:
        scores: the metric as our own evaluations call it; it tells numbers. None where there is none.
        scored: knows where a metric told none.
    """

    def __init__(self, camera: Camera, metric: Callable[..., Any] | None) -> None:
        self.scored = Scored(camera)
        self.scores = None if metric is None else self.scored.watched(metric, rich=False)

    @contextmanager
    def watched(self, optimizer: Any) -> Iterator[None]:
        """Put watched ones in the places of an optimizer's metrics, of those within it too, until the end."""
        undo: list[Callable[[], None]] = []
        try:
            for holder, name, metric, rich in list(_places(optimizer)):
                back = _given_back(holder, name, metric)
                _put(holder, name, self.scored.watched(metric, rich))
                undo.append(back)
            yield
        finally:
            for back in reversed(undo):
                back()


def _places(optimizer: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[Any, str, Callable[..., Any], bool]]:
    """(who holds it, under which name, a metric, whether its holder understands feedback)."""
    if id(optimizer) in seen:
        return
    try:
        rich = traits_of(optimizer).rich
    except ConfigError:
        rich = False  # a step that the strategy leaves out
    held = vars(optimizer)
    for name in _NAMES:
        metric = getattr(optimizer, name, None)
        if callable(metric) and not isinstance(inspect.getattr_static(optimizer, name, None), property):
            yield optimizer, name, metric, rich
    for value in list(held.values()):
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if isinstance(value, dict) and callable(value.get("metric")):
            yield value, "metric", value["metric"], rich
        for each in inner:
            if isinstance(each, Teleprompter):
                yield from _places(each, seen | {id(optimizer)})


def _given_back(holder: Any, name: str, metric: Callable[..., Any]) -> Callable[[], None]:
    """What puts a metric back into its place: one of the optimizer's class is seen again when its own is gone."""
    if isinstance(holder, dict) or name in vars(holder):
        return lambda: _put(holder, name, metric)
    return lambda: delattr(holder, name)


def _put(holder: Any, name: str, metric: Callable[..., Any]) -> None:
    if isinstance(holder, dict):
        holder[name] = metric
    else:
        setattr(holder, name, metric)
