"""What an experiment may be made of: refused where it cannot be, before anything is kept of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.declaration import BUILT_IN, Declaration
from dspy_prod.experiments.standing import REFRESH
from dspy_prod.experiments.variants import Variant
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric, guardrails

_SAID: Final = ("direction", "role", "margin", "relative", "tail", "missing")
"""What an error says of a guardrail."""

RESERVED: Final = frozenset({"self", "unit", "trace", "at", "id"})
"""What `Experiment.record` takes beside values of metrics."""


def check_options(
    where: str, variants: Any, rollout: Any, overrides: Any, assign: Any, judges: Any, holdout: Any, alpha: Any,
    refresh: Any,
) -> None:  # fmt: skip
    """Refuse arguments of an `Experiment` that are of another kind than it takes.

    Raises:
        ConfigError: names the first of them, and the remedy.
    """
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError(
            f"{where}: variants= takes what is compared, by name, such as variants={{'control': program, 'new': other}}"
        )
    if not isinstance(rollout, Rollout | None):
        raise ConfigError(
            f"{where}: rollout={rollout!r}: give a dspy_prod.Rollout, such as Rollout(stages=(0.01, 0.1, 0.5))"
        )
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(f"{where}: overrides={overrides!r}: give variants by unit, such as {{'qa@acme': 'new'}}")
    for unit in overrides or {}:
        if not isinstance(unit, str) or not unit:
            raise ConfigError(
                f"{where}: overrides={{{unit!r}: ...}}: a unit is a text, as call_context has it, such as {str(unit)!r}"
            )
    if assign is not None and not callable(assign):
        raise ConfigError(f"{where}: assign={assign!r}: give a function that takes a unit and returns a variant's name")
    if not isinstance(judges, Mapping | None):
        raise ConfigError(f"{where}: judges={judges!r}: give each by its metric, such as {{'quality': Judge(...)}}")
    if not _is_number(holdout) or not 0 <= holdout < 1:
        raise ConfigError(f"{where}: holdout={holdout!r} must be a share of the units: 0 <= holdout < 1, such as 0.1")
    if not _is_number(alpha) or not 0 < alpha < 0.5:
        raise ConfigError(f"{where}: alpha={alpha!r} must lie between 0 and 0.5, such as 0.05")
    if not _is_number(refresh) or not 0 <= refresh <= threading.TIMEOUT_MAX:
        raise ConfigError(f"{where}: refresh={refresh!r} is a number of seconds, 0 or more, such as {REFRESH}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def measured(where: str, metrics: Sequence[Metric], given: Sequence[Metric] | None) -> tuple[Metric, ...]:
    """The metrics, and the guardrails that they do not replace."""
    for name, some in (("metrics", metrics), ("guardrails", given)):
        if not isinstance(some, list | tuple | None) or (some is None and name == "metrics"):
            raise ConfigError(f"{where}: {name}= takes a list of dspy_prod.Metric objects, got {type(some).__name__}")
    for each in (*metrics, *(given or ())):
        if not isinstance(each, Metric):
            raise ConfigError(f"{where}: metrics= takes dspy_prod.Metric objects, got {type(each).__name__}")
        _check_kind(where, each)
        if each.name in RESERVED:
            raise ConfigError(
                f"{where}: Metric({each.name!r}) cannot be recorded, for record({each.name}=...) means something else: "
                f"give it another name, such as {each.name + '_score'!r}"
            )
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
