"""What an experiment may be made of: refused where it cannot be, before anything is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.declaration import BUILT_IN, Declaration
from dspy_prod.experiments.variants import Variant
from dspy_prod.options.metrics import Metric, guardrails

_SAID: Final = ("direction", "role", "margin", "relative", "tail", "missing")
"""What an error says of a guardrail."""


def measured(where: str, metrics: Sequence[Metric], given: Sequence[Metric] | None) -> tuple[Metric, ...]:
    """The metrics, and the guardrails that they do not replace."""
    for each in (*metrics, *(given or ())):
        if not isinstance(each, Metric):
            raise ConfigError(f"{where}: metrics= takes dspy_prod.Metric objects, got {type(each).__name__}")
        _check_kind(where, each)
    own = {each.name for each in metrics}
    return (*metrics, *(each for each in (guardrails() if given is None else given) if each.name not in own))


def _check_kind(where: str, metric: Metric) -> None:
    """Refuse a metric under the name of one that calls tell, which says other things of its values than they are."""
    low, high = metric.bounds
    if metric.name == "cost":
        fits, means = metric.relative, "dollars, compared as a ratio"
    elif metric.name == "latency":
        fits, means = metric.relative or metric.tail is not None, "seconds, compared by a tail or as a ratio"
    elif metric.name in BUILT_IN:
        fits, means = not metric.relative and metric.tail is None and low <= 0 and high >= 1, "a share from 0 to 1"
    else:
        return
    if not fits or metric.direction != "lower":
        usual = next(each for each in guardrails() if each.name == metric.name)
        said = ", ".join(f"{name}={getattr(usual, name)!r}" for name in _SAID if name in usual.model_fields_set)
        raise ConfigError(
            f"{where}: Metric({metric.name!r}): calls tell it by themselves, as {means}, and lower is better. Declare "
            f"it as that, such as Metric({metric.name!r}, {said}), or give a metric of your own another name"
        )


def weighed(where: str, names: Sequence[str], weights: Mapping[str, float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        raise ConfigError(f"{where}: weights= takes a number for each of {', '.join(map(repr, names))}")
    try:
        return [float(weights[name]) for name in names]
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: weights={dict(weights)!r}: a weight is a positive number, such as 1") from None


def check_versions(where: str, variants: Sequence[Variant], stored: Declaration) -> None:
    """Refuse a program that was loaded from another version than the one that is measured under its name."""
    for each in variants:
        measured = stored.pinned.get(each.name)
        if each.version != measured:
            raise ConfigError(
                f"{where}: variants[{each.name!r}] is {each.version or 'no published version'} here, but "
                f"{measured or 'no published version'} where it was made. What was measured would be mixed up: load "
                "the same version, or give this experiment a name of its own"
            )


def program_of(variants: Sequence[Any]) -> str:
    """The program's name, whose holdout it is."""
    return str(variants[0].program.name)
