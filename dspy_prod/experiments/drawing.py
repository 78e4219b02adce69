"""A `Scorecard` as a figure of matplotlib's: the differences of all metrics, and how each grew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.experiments.wording import Wording
from dspy_prod.views.cells import cut, told
from dspy_prod.views.figures import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dspy_prod.experiments.decisions import MetricEvidence
    from dspy_prod.experiments.facts import Facts

_WIDE: Final = 11.0
_HIGH: Final = 2.3
_ACROSS: Final = 3
"""Charts beside each other."""
_LONGEST: Final = 32
_FAINT, _MARGIN = "#9aa7b4", "#b07a12"
_COLOURS: Final = {
    "better": "#177245", "no_worse": "#177245", "worse": "#b8322a", "unclear": "#2b5d8a", "void": "#b07a12",
}  # fmt: skip


def drawn(card: Facts) -> Figure:
    """The whole figure.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    charts = [(name, each) for name, candidate in card.candidates.items() for each in candidate.metrics]
    down = math.ceil(len(charts) / _ACROSS)
    tall = [0.55 * len(candidate.metrics) + 0.9 for candidate in card.candidates.values()]
    figure = blank((_WIDE, sum(tall) + _HIGH * down))
    parts: Any = figure.subfigures(2, 1, height_ratios=[sum(tall), _HIGH * down])
    upper, lower = parts
    figure.suptitle(_plain(f"{card.name}: {card.decision}", 100), fontsize=12)
    forests = upper.subplots(len(card.candidates), 1, squeeze=False, height_ratios=tall)[:, 0]
    for axes, name in zip(forests, card.candidates, strict=True):
        _forest(axes, card, name)
    places = lower.subplots(down, _ACROSS, squeeze=False).flat
    for axes, (name, found) in zip(places, charts, strict=False):
        _sequence(axes, card, name, found)
    for axes in list(lower.axes)[len(charts) :]:
        axes.set_visible(False)
    return figure


def _forest(axes: Any, card: Facts, name: str) -> None:
    """A row for each metric, on a scale of its own, so that only directions and margins can be compared."""
    found = card.candidates[name].metrics
    for place, each in enumerate(found):
        y, shown, amounts = len(found) - 1 - place, each.interval, Wording(card.metric(each.metric))
        if shown is None:
            continue
        colour, margin = _COLOURS[each.status], amounts.margin
        ends = [shown.difference, *[end for end in (shown.low, shown.high, margin) if end is not None]]
        scale = amounts.good / (max(map(abs, ends)) or 1.0)
        if shown.low is not None and shown.high is not None:
            axes.plot([shown.low * scale, shown.high * scale], [y, y], color=colour, lw=2, solid_capstyle="butt")
        if margin is not None:
            axes.plot([margin * scale] * 2, [y - 0.28, y + 0.28], color=_MARGIN, lw=1.4, ls="--")
        axes.plot([shown.difference * scale], [y], "o", color=colour, ms=6)
        words = amounts.difference(shown.difference)
        between = amounts.range(shown.low, shown.high)
        axes.text(1.08, y, f"{words} ({between})" if between else words, va="center", fontsize=8.5, color=colour)
    axes.axvline(0, color=_FAINT, lw=1)
    axes.set_xlim(-1.15, 1.05)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_yticks(range(len(found)), [_plain(each.metric) for each in reversed(found)], fontsize=9)
    axes.set_xticks([-0.6, 0.6], ["← worse", "better →"], fontsize=8.5, color="#5d6b7a")
    axes.set_title(_plain(f"{name} against {card.control}", 80), fontsize=10, loc="left")
    _clean(axes)


def _sequence(axes: Any, card: Facts, name: str, found: MetricEvidence) -> None:
    looks = [each for each in card.history if (each.candidate, each.metric) == (name, found.metric)]
    amounts, colour = Wording(card.metric(found.metric)), _COLOURS[found.status]
    banded = [each for each in looks if each.low is not None]
    axes.axhline(0, color=_FAINT, lw=1)
    if amounts.margin is not None:
        axes.axhline(amounts.margin, color=_MARGIN, lw=1.2, ls="--")
    if banded:
        axes.fill_between(
            [each.units for each in banded], [each.low for each in banded], [each.high for each in banded],
            color=colour, alpha=0.18, lw=0,
        )  # fmt: skip
    axes.plot([each.units for each in looks], [each.difference for each in looks], color=colour, lw=1.6)
    later = [each for each in looks if each.units >= looks[-1].units / 2]
    seen = [each for look in later for each in (look.difference, look.low, look.high) if each is not None]
    if seen:
        spare = 0.08 * (max(*seen, 0.0) - min(*seen, 0.0)) or 0.01
        axes.set_ylim(min(*seen, 0.0) - spare, max(*seen, 0.0) + spare)
    axes.yaxis.set_major_formatter(lambda level, _: amounts.difference(level).replace(" points", " pt"))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("users", fontsize=8.5)
    many = f"{name}: " if len(card.candidates) > 1 else ""
    axes.set_title(_plain(f"{many}{found.metric}"), fontsize=9.5, loc="left")
    _clean(axes)


def _clean(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _plain(text: str, longest: int = _LONGEST) -> str:
    """A name as it is: a dollar sign begins no formula."""
    return cut(told(text), longest).replace("$", r"\$")
