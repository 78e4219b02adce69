"""Pictures of an optimization: best score against dollars, quality against the cost of an answer.

How a figure is made and saved stands in `views.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.views.figures import blank, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dspy_prod.optimize.candidates import Candidate

SIZE: Final = (6.4, 4.0)
"""Inches of one picture."""

__all__ = ["both", "pareto", "png", "quality_against_cost", "records", "score_against_dollars"]

_INK, _FAINT, _BEST, _BASE, _CAP = "#1f3b57", "#9aa7b4", "#0b7a75", "#8a6d3b", "#b23a48"


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other is better than at the same cost or less, cheapest first.

    Only complete candidates whose cost per answer is known are looked at.
    """
    front: list[Candidate] = []
    for one in sorted(_priced(candidates), key=lambda one: (one.usd_per_answer, -(one.score or 0.0), one.index)):
        if not front or (one.score or 0.0) > (front[-1].score or 0.0):
            front.append(one)
    return front


def records(candidates: Sequence[Candidate]) -> list[tuple[float, float]]:
    """(dollars spent, best score by then) each time the best score rose."""
    steps: list[tuple[float, float]] = []
    known = [one for one in candidates if one.score is not None and one.found_usd is not None]
    for one in sorted(known, key=lambda one: (one.found_usd, one.index)):
        assert one.score is not None
        assert one.found_usd is not None
        if not steps or one.score > steps[-1][1]:
            steps.append((one.found_usd, one.score))
    return steps


def score_against_dollars(
    candidates: Sequence[Candidate],
    *,
    spent_usd: float,
    budget_usd: float | None = None,
    baseline: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """The best score so far as steps over the money spent, each candidate as a dot.

    Args:
        candidates: all so far. spent_usd: by now. budget_usd: the cap, drawn as a line when it is in sight.
        baseline: score of the given program.
        axes: where to draw; default: a new figure.

    Raises:
        ConfigError: matplotlib is not installed.

    Example:
        ```python
        score_against_dollars(report.candidates, spent_usd=report.spent_usd).savefig("score.png")
        ```
    """
    axes = _axes() if axes is None else axes
    scored = [one for one in candidates if one.score is not None and one.found_usd is not None]
    axes.scatter(
        [_at(one) for one in scored], [_score(one) for one in scored],
        s=28, color=_FAINT, edgecolor="white", linewidth=0.6, zorder=3, label="candidate, all examples",
    )  # fmt: skip
    raced = [one for one in candidates if one.predicted is not None and one.score is None and one.found_usd is not None]
    if raced:
        axes.scatter(
            [_at(one) for one in raced], [_score(one) for one in raced],
            s=24, marker="x", color=_FAINT, linewidth=1.0, zorder=2, label="dropped early (predicted)",
        )  # fmt: skip
    steps = records(candidates)
    if steps:
        spent, best = [at for at, _ in steps], [score for _, score in steps]
        axes.step([*spent, max(spent_usd, spent[-1])], [*best, best[-1]], where="post", color=_INK, lw=2, label="best")
        axes.scatter([spent[-1]], [best[-1]], s=60, color=_BEST, zorder=5, edgecolor="white")
        axes.annotate(
            f"{best[-1]:.4g}", (spent[-1], best[-1]), xytext=(0, 7), textcoords="offset points",
            color=_BEST, fontsize=9, fontweight="bold", ha="center",
        )  # fmt: skip
    if baseline is not None:
        axes.axhline(baseline, color=_BASE, lw=1.2, ls="--", zorder=1, label=f"given program ({baseline:.4g})")
    if budget_usd is not None:
        if budget_usd <= 3 * spent_usd or not spent_usd:
            axes.axvline(budget_usd, color=_CAP, lw=1.2, ls=":", zorder=1, label=f"cap (${budget_usd:,.4g})")
        else:  # a line far to the right would leave the rest in a corner
            axes.plot([], [], color=_CAP, lw=1.2, ls=":", label=f"cap (${budget_usd:,.4g}), further right")
    axes.set_xlim(left=0)
    axes.set_title("Best score against dollars")
    axes.set_xlabel("spent, USD")
    axes.set_ylabel("score on the selection set")
    _finish(axes)
    return _figure(axes)


def quality_against_cost(
    candidates: Sequence[Candidate], *, best: Candidate | None = None, axes: Axes | None = None
) -> Figure:
    """Each complete candidate by what an answer of it costs and how good it is; those worth having are joined.

    Args:
        candidates: all. best: it has a colour of its own, as the given program (number 0) has.
        axes: where to draw; default: a new figure.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    axes = _axes() if axes is None else axes
    priced, front = _priced(candidates), pareto(candidates)
    chosen = {one.index for one in front}
    rest = [one for one in priced if one.index not in chosen]
    axes.scatter(
        [_price(one) for one in rest], [_score(one) for one in rest],
        s=28, color=_FAINT, edgecolor="white", linewidth=0.6, zorder=2, label="another is as cheap and better",
    )  # fmt: skip
    if front:
        costs, scores = [_price(one) for one in front], [_score(one) for one in front]
        axes.step(costs, scores, where="post", color=_INK, lw=1.3, alpha=0.7, zorder=3)
        axes.scatter(costs, scores, s=44, color=_INK, edgecolor="white", zorder=4, label="none is as cheap and better")
    for mark, colour, name, those in (
        ("s", _BASE, "given program", [one for one in priced if one.index == 0]),
        ("*", _BEST, "best", [one for one in priced if best is not None and one.index == best.index]),
    ):
        axes.scatter(
            [_price(one) for one in those], [_score(one) for one in those],
            s=170 if mark == "*" else 50, marker=mark, color=colour, edgecolor="white", zorder=5, label=name,
        )  # fmt: skip
    _label_front(axes, front, [_price(one) for one in priced])
    if not priced:
        axes.text(0.5, 0.5, "no candidate's cost per answer is known", transform=axes.transAxes, ha="center")
    axes.set_title("Quality against cost")
    axes.set_xlabel("1,000 answers at list price, USD")
    axes.set_ylabel("score on the selection set")
    _finish(axes, legend=bool(priced))
    return _figure(axes)


def both(
    candidates: Sequence[Candidate],
    *,
    spent_usd: float,
    budget_usd: float | None = None,
    baseline: float | None = None,
    best: Candidate | None = None,
) -> Figure:
    """Both pictures beside each other, see above."""
    figure = blank((SIZE[0] * 1.9, SIZE[1]))
    left, right = figure.subplots(1, 2)
    score_against_dollars(candidates, spent_usd=spent_usd, budget_usd=budget_usd, baseline=baseline, axes=left)
    quality_against_cost(candidates, best=best, axes=right)
    return figure


def _label_front(axes: Axes, front: Sequence[Candidate], prices: Sequence[float]) -> None:
    """The numbers of those on the front, as far as they do not lie on one another."""
    if not front:
        return
    apart, taken = (max(prices) - min(prices)) / 12, list[float]()
    for one in reversed(front):  # the best one has its number in any case
        at = _price(one)
        if any(abs(at - other) <= apart for other in taken):
            continue
        taken.append(at)
        axes.annotate(
            f"#{one.index}", (at, one.score or 0.0), xytext=(-4, 7), textcoords="offset points",
            fontsize=8, color=_INK, ha="right",
        )  # fmt: skip


def _priced(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [
        one
        for one in candidates
        if one.status == "complete" and one.score is not None and one.usd_per_answer is not None
    ]


def _price(one: Candidate) -> float:
    """Of a thousand answers: that of one is a number nobody can read."""
    return 1000.0 * (one.usd_per_answer or 0.0)


def _score(one: Candidate) -> float:
    """Its score, or what a race expected of it."""
    return one.score if one.score is not None else one.predicted or 0.0


def _at(one: Candidate) -> float:
    """What the run had spent by then."""
    return one.found_usd or 0.0


def _axes() -> Axes:
    axes: Any = blank(SIZE).subplots()
    return axes  # type: ignore[no-any-return,unused-ignore]


def _figure(axes: Axes) -> Figure:
    figure: Any = axes.figure
    return figure  # type: ignore[no-any-return,unused-ignore]


def _finish(axes: Axes, legend: bool = True) -> None:
    axes.margins(x=0.06, y=0.14)
    axes.grid(visible=True, color="#e6eaee", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.title.set_fontsize(11)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
            handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
