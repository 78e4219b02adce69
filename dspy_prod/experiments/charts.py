"""Charts of a `Scorecard` as SVG for its page: the differences of all metrics, and how one grew.

They take colours and letters from the page's style sheet, and are drawn for the width of a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from dspy_prod.experiments.wording import Wording
from dspy_prod.views.cells import cut, told

if TYPE_CHECKING:
    from dspy_prod.experiments.decisions import MetricEvidence
    from dspy_prod.experiments.facts import Facts
    from dspy_prod.experiments.history import Look

WIDE: Final = 340
_ROW: Final = 46
_EDGE: Final = 8
_LONGEST: Final = 22
"""Characters of a name in a chart."""


def forest(card: Facts, candidate: str) -> str:
    """The difference of each metric with its interval and margin; to the right is better, whatever the direction.

    Each metric has a scale of its own, for a dollar and a point have nothing in common.
    """
    found = card.candidates[candidate].metrics
    rows = [_row(card, each, _ROW * place) for place, each in enumerate(found)]
    high = _ROW * len(found) + 18
    middle, ground = WIDE / 2, high - 18
    words = [
        _text(middle - 8, high - 4, "← worse", "end", "faint"),
        _text(middle + 8, high - 4, "better →", "start", "faint"),
    ]
    zero = f'<path class="zero" d="M{middle} 4V{ground}"/>'
    return _svg(high, f"differences between {candidate} and {card.control}", zero + "".join([*rows, *words]))


def _row(card: Facts, found: MetricEvidence, top: int) -> str:
    amounts, shown = Wording(card.metric(found.metric)), found.interval
    name = _text(0, top + 13, cut(told(found.metric), _LONGEST), "start", "name")
    if shown is None:
        return name + _text(WIDE, top + 13, "no users yet", "end", "faint")
    words = _text(WIDE, top + 13, amounts.difference(shown.difference), "end", found.status)
    turned = [amounts.good * each for each in (shown.difference, shown.low, shown.high) if each is not None]
    margin = None if amounts.margin is None else amounts.good * amounts.margin
    reach = 1.1 * max([abs(each) for each in (*turned, margin or 0.0)]) or 1.0
    at = [WIDE / 2 + each / reach * (WIDE / 2 - _EDGE) for each in turned]
    y = top + 30
    marks = ""
    if margin is not None:
        x = WIDE / 2 + margin / reach * (WIDE / 2 - _EDGE)
        marks += f'<path class="margin" d="M{x:.1f} {y - 9}V{y + 9}"/>'
    if len(at) == 3:
        low, high = sorted(at[1:])
        marks += (
            f'<path class="bar {found.status}" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}V{y + 4}'
            f'M{high:.1f} {y - 4}V{y + 4}"/>'
        )
    return f'{name}{words}{marks}<circle class="{found.status}" cx="{at[0]:.1f}" cy="{y}" r="4.5"/>'


def sequence(card: Facts, found: MetricEvidence, looks: Sequence[Look]) -> str:
    """The difference with its interval against users; nothing while there are no two points.

    Args:
        card: whose. found: the metric as it is now. looks: its points, oldest first.
    """
    if len(looks) < 2:
        return ""
    amounts = Wording(card.metric(found.metric))
    left, right, top, ground = 58.0, WIDE - 6.0, 8.0, 132.0
    low, high = _heights(looks, amounts.margin)
    last = looks[-1].units

    def place(units: float, difference: float) -> tuple[float, float]:
        up = (min(max(difference, low), high) - low) / (high - low)
        return left + units / last * (right - left), ground - up * (ground - top)

    banded = [each for each in looks if each.low is not None and each.high is not None]
    upper = [place(each.units, each.high or 0.0) for each in banded]
    lower = [place(each.units, each.low or 0.0) for each in reversed(banded)]
    parts = [f'<polygon class="band {found.status}" points="{_points([*upper, *lower])}"/>'] if len(banded) > 1 else []
    zero = place(0, 0.0)[1]
    parts.append(f'<path class="zero" d="M{left} {zero:.1f}H{right}"/>')
    levels = [(0.0, "0")]
    if amounts.margin is not None:
        y = place(0, amounts.margin)[1]
        parts.append(f'<path class="margin" d="M{left} {y:.1f}H{right}"/>')
        levels.append((amounts.margin, amounts.difference(amounts.margin)))
    mean = [place(each.units, each.difference) for each in looks]
    parts.append(f'<polyline class="mean {found.status}" points="{_points(mean)}"/>')
    levels += [(high, amounts.difference(high)), (low, amounts.difference(low))]
    written: list[float] = []
    for level, words in levels:
        y = place(0, level)[1]
        if all(abs(y - other) > 13 for other in written):
            written.append(y)
            parts.append(_text(left - 5, y + 4, words.replace(" points", " pt"), "end", "faint"))
    parts.append(_text(left, ground + 17, "0", "start", "faint"))
    parts.append(_text(right, ground + 17, f"{last:,} users", "end", "faint"))
    return _svg(int(ground + 22), f"{found.metric}: difference against users, with its interval", "".join(parts))


def _heights(looks: Sequence[Look], margin: float | None) -> tuple[float, float]:
    """The differences at the bottom and the top: the later half is in sight, whatever the first users did."""
    later = [each for each in looks if each.units >= looks[-1].units / 2]
    seen = [each for look in later for each in (look.difference, look.low, look.high) if each is not None]
    low, high = min([*seen, margin or 0.0, 0.0]), max([*seen, margin or 0.0, 0.0])
    spare = 0.06 * (high - low) or 0.01
    return low - spare, high + spare


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join([f"{x:.1f},{y:.1f}" for x, y in places])


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(high: int, label: str, inner: str) -> str:
    said = escape(cut(told(label)), quote=True)
    return f'<svg role="img" aria-label="{said}" viewBox="0 0 {WIDE} {high}">{inner}</svg>'
