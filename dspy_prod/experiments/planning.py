"""How many units and days an experiment will need, before it begins; see `foretelling` for how it is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.alphas import Alphas, alphas
from dspy_prod.experiments.foretelling import most_better, units_needed
from dspy_prod.experiments.horizon import DAY, Horizon
from dspy_prod.options.metrics import LARGEST, Metric
from dspy_prod.views import Cell, Page, Shown, Table

LONG: Final = 30.0
"""An experiment of more days than these is called long."""
LARGE: Final = 10_000
"""More units than these are warned of, however many come a day."""


@dataclass(frozen=True)
class Need:
    """What one claim on one metric needs.

    Attributes:
        metric: by name.
        claim: `"better"` or `"no_worse"`.
        effect: the difference that is there to be found, or the margin; of a relative metric as a share.
        units: of all variants together, by which the claim is proven with the plan's `power`.
        days: until then; the metric's window included.
        words: the same as a sentence.
    """

    metric: str
    claim: str
    effect: float
    units: int
    days: float
    words: str


@dataclass(frozen=True)
class Plan(Shown):
    """What an experiment needs in order to decide. It prints as a table, and shows itself in a notebook.

    Attributes:
        needs: one for each claim, in the order of the metrics.
        slowest: the one that takes longest of those that a promotion waits for.
        power: the probability with which each is proven by then.
        warnings: what should be known before it begins.
        horizon: when the experiment pauses if it is still undecided, in words; None: never.
    """

    needs: tuple[Need, ...]
    slowest: Need
    power: float
    warnings: tuple[str, ...]
    horizon: str | None = None

    def _view(self) -> Page:
        rows = []
        for need in self.needs:
            told = "the slowest" if need is self.slowest else None
            if need.days > self.slowest.days:
                told = "nothing waits for it"
            days = Cell(_days(need.days), "strong" if need is self.slowest else "", (told,), number=True)
            rows.append((need.metric, need.words.partition(":")[0], _round(need.units), days))
        note = (
            f"Each is proven by then with a probability of {100 * self.power:g} %, at the shares of the last stage. A "
            "promotion waits for one metric to be better, and for others with a margin to be no worse."
        )
        last = f"slowest: {self.slowest.metric}, about {_days(self.slowest.days)}"
        table = Table("Plan", ("metric", "to prove", "users", "days"), rows, note)
        ends = [] if self.horizon is None else [f"horizon: pauses if undecided after {self.horizon}"]
        return Page(table, last, *ends, *(f"Beware: {each}" for each in self.warnings))


def plan(
    metrics: Sequence[Metric],
    *,
    units_per_day: float,
    baseline: Mapping[str, float | tuple[float, float]] | None = None,
    effects: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
    control: str = "control",
    alpha: float = 0.05,
    power: float = 0.8,
    horizon: Horizon | None = None,
    unit: str = "user",
) -> Plan:
    """How long an experiment will take at the shares of its last stage.

    Args:
        metrics: what it measures.
        units_per_day: new units (users, say) a day, of all variants together.
        baseline: control's mean of each score or share, in its unit; or mean and standard deviation. A mean alone is
            taken for right-or-wrong outcomes. Without it 0.8 of the range is assumed where higher is better, 0.05
            where lower is. Of an amount, its standard deviation as a share of its mean (default 1), or both in the
            metric's unit.
        effects: by how much a candidate is hoped to be better on success metrics, in the metric's unit, of amounts as
            a share. Default: 5 hundredths of the range, a tenth of amounts, half of a tail.
        shares: of each variant; default: two equal ones.
        control: its name in `shares`.
        alpha: of the experiment.
        power: the probability with which each claim is to be proven.
        horizon: of the experiment. unit: what its units are.

    Raises:
        ConfigError: a number is impossible.
    """
    _check_given(baseline, effects, power)
    shares = shares or {control: 0.5, "candidate": 0.5}
    candidates = [name for name in shares if name != control]
    if not units_per_day > 0:
        raise ConfigError(f"units_per_day={units_per_day!r} must be over 0: how many new units come a day")
    if control not in shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
        raise ConfigError(f"shares={dict(shares)!r} must name {control!r}, be over 0 and sum to 1 at most")
    if not 0 < power < 1:
        raise ConfigError(f"power={power!r} must lie between 0 and 1, such as 0.8")
    for given in (baseline or {}, effects or {}):
        if unknown := sorted(set(given) - {metric.name for metric in metrics}):
            raise ConfigError(f"{unknown[0]!r} is no metric of the plan: {', '.join(each.name for each in metrics)}")
    level = alphas(metrics, len(candidates), alpha)
    rarest = min(candidates, key=lambda name: shares[name])
    pair = shares[control] + shares[rarest]
    needs = []
    for metric in metrics:
        known = (baseline or {}).get(metric.name)
        for claim, size, each in _asked(metric, (effects or {}).get(metric.name), level):
            found = units_needed(metric, claim, size, each, baseline=known, power=power, share=shares[rarest] / pair)
            units = math.ceil(found / pair)
            days = units / units_per_day + metric.window / 86_400
            told = f"{_said(metric, claim, size)}: about {_round(units):,} units, {_days(days)}"
            needs.append(Need(metric.name, claim, size, units, days, told))
    slowest = max(_awaited(metrics, needs), key=lambda need: need.days)
    warnings = _warnings(metrics, needs, baseline or {})
    if horizon is not None:
        warnings += _beyond(slowest, horizon, horizon.words(unit))
    return Plan(tuple(needs), slowest, power, tuple(warnings), None if horizon is None else horizon.words(unit))


def _beyond(slowest: Need, horizon: Horizon, words: str) -> list[str]:
    """What is to be known of a horizon that comes before the experiment is likely to be decided."""
    units, seconds = horizon.units, horizon.seconds
    before = slowest.units > units if units is not None else slowest.days * DAY > (seconds or 0.0)
    if not before:
        return []
    return [
        f"the horizon of {words} comes before {slowest.metric} is proven (about {_round(slowest.units):,} units, "
        f"{_days(slowest.days)}): most likely it pauses undecided"
    ]


def _check_given(baseline: Any, effects: Any, power: Any) -> None:
    """Refuse what is no number, or no numbers by metric."""
    if isinstance(power, bool) or not isinstance(power, int | float):
        raise ConfigError(f"power={power!r} must lie between 0 and 1, such as 0.8")
    for what, given in (("baseline", baseline), ("effect", effects)):
        if not isinstance(given, Mapping | None):
            raise ConfigError(f"{what}={given!r}: give a number for each metric, such as {what}={{'resolved': 0.8}}")
        for name, value in (given or {}).items():
            pair = value if what == "baseline" and isinstance(value, tuple | list) and len(value) == 2 else (value,)
            numbers = [each for each in pair if isinstance(each, int | float) and not isinstance(each, bool)]
            if len(numbers) < len(pair) or not all(abs(each) <= LARGEST for each in numbers):
                told = "a number, or mean and standard deviation" if what == "baseline" else "a number"
                raise ConfigError(f"{what}={{{name!r}: {value!r}}}: give {told}, such as 0.8")


def _asked(
    metric: Metric, effect: float | None, level: Alphas
) -> list[tuple[Literal["better", "no_worse"], float, float]]:
    """The claims of a metric that a promotion rests on: (claim, difference, alpha)."""
    if effect is None:
        low, high = metric.bounds
        effect = 0.1 if metric.relative else 0.05 * (high - low) if metric.tail is None else 0.5 * (1.0 - metric.tail)
    if not effect > 0:
        raise ConfigError(f"effects[{metric.name!r}]={effect!r} must be over 0: by how much it is hoped better")
    claims: list[tuple[Literal["better", "no_worse"], float, float]] = []
    if metric.role == "success":
        claims.append(("better", effect, level.better))
    if metric.margin is not None:
        claims.append(("no_worse", metric.margin, level.no_worse))
    return claims


def _warnings(
    metrics: Sequence[Metric], needs: Sequence[Need], baseline: Mapping[str, float | tuple[float, float]]
) -> list[str]:
    by_name, found = {metric.name: metric for metric in metrics}, []
    for need in needs:
        if need.claim == "no_worse" and (need.days > LONG or need.units > LARGE):
            needed = f"about {_round(need.units):,} units ({_days(need.days)}) when nothing changes"
            margin = _amount(by_name[need.metric], need.effect)
            found.append(
                f"{need.metric}: a margin of {margin} needs {needed}; twice the margin needs a quarter to half of them"
            )
        metric = by_name[need.metric]
        most = most_better(metric, baseline.get(metric.name))
        if need.claim == "better" and need.effect > most * (1.0 + 1e-9):
            hoped, possible = _amount(metric, need.effect), _amount(metric, most)
            found.append(f"{need.metric}: nothing can be better by {hoped}, only by {possible}")
    success = [metric for metric in metrics if metric.role == "success"]
    if not success:
        found.append("no success metric: nothing can be promoted, only rolled back")
    elif all(metric.judge == "untrusted" for metric in success):
        found.append("only an untrusted judge measures success: nothing is promoted without outcomes of users")
    return found


def _awaited(metrics: Sequence[Metric], needs: Sequence[Need]) -> list[Need]:
    """What a promotion waits for: the quickest "better", and "no worse" of every other metric with a margin."""
    better = [need for need in needs if need.claim == "better"]
    if not better:
        return list(needs)
    first = min(better, key=lambda need: need.days)
    implied = {metric.name for metric in metrics if not metric.relative and metric.tail is None} & {first.metric}
    return [first, *(need for need in needs if need.claim == "no_worse" and need.metric not in implied)]


def _amount(metric: Metric, size: float) -> str:
    if metric.relative:
        return f"{size:.0%}"
    return f"{100 * size:.3g} points" if metric.bounds == (0.0, 1.0) else f"{size:g}"


def _said(metric: Metric, claim: str, size: float) -> str:
    return f"{'better by' if claim == 'better' else 'no worse by'} {_amount(metric, size)}"


def _round(units: int) -> int:
    """To two digits."""
    digits = max(len(str(units)) - 2, 0)
    return int(round(units, -digits))


def _days(days: float) -> str:
    return f"{days:.1f} days" if days < 10 else f"{days:,.0f} days"
