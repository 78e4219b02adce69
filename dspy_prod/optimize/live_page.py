"""The live view of a notebook: a table of the best candidates and a chart, which change in place."""

from __future__ import annotations

import contextvars
import html
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.optimize.candidates import Progress
from dspy_prod.optimize.telling import sentence
from dspy_prod.views.cells import told

if TYPE_CHECKING:
    from dspy_prod.views.parts import Table

EVERY: Final = 1.0
"""Seconds between two changes of the page."""

MOST: Final = 8
"""Candidates in the table."""

_WIDE, _HIGH, _LEFT, _LOW = 520, 180, 58, 26


class LivePage:
    """Shows a run below its cell, and replaces what it shows as the run goes on."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._context: contextvars.Context | None = None
        self._lock = threading.Lock()
        self._next = 0.0

    def begin(self, progress: Progress) -> None:
        """Show it."""
        from IPython.display import display

        # The kernel tells by the context which cell a display belongs to; the run's own thread has none.
        self._context = contextvars.copy_context()
        self._handle = display(_both(progress), raw=True, display_id=True)
        self._next = time.monotonic() + EVERY

    def update(self, progress: Progress) -> None:
        """Show it anew, at most once a second."""
        if time.monotonic() >= self._next:
            self._show(progress)

    def end(self, progress: Progress, report: Any) -> None:
        """Show it a last time."""
        self._show(progress)

    def _show(self, progress: Progress) -> None:
        with self._lock:
            if self._handle is not None and self._context is not None:
                self._context.run(self._handle.update, _both(progress), raw=True)
            self._next = time.monotonic() + EVERY


def _both(progress: Progress) -> dict[str, str]:
    """For what shows HTML, and for what does not, such as a console that is connected to the kernel."""
    return {"text/html": page(progress), "text/plain": table(progress).text()}


def page(progress: Progress) -> str:
    """Everything, as HTML without scripts."""
    return f"<div>{table(progress).html()}{chart(progress)}</div>"


def table(progress: Progress) -> Table:
    """The best candidates first, then those that are not complete."""
    from dspy_prod.views import Table, usd

    ranked = sorted(progress.candidates, key=lambda each: (each.score is None, -(each.score or 0.0), each.index))
    rows = [
        (each.index, each.origin, each.status, each.score, each.examples, usd(each.cost_usd)) for each in ranked[:MOST]
    ]
    left = len(ranked) - len(rows)
    more = f" {left} more candidates are not shown." if left > 0 else ""
    return Table(
        f"{progress.run} ({progress.optimizer})", ("candidate", "origin", "status", "score", "examples", "USD"), rows,
        caption=f"{sentence(progress)}.{more}",
    )  # fmt: skip


def chart(progress: Progress) -> str:
    """The best score so far against dollars, each complete candidate as a dot, as SVG; nothing while there is none."""
    points = sorted(
        (each.found_usd, each.score)
        for each in progress.candidates
        if each.found_usd is not None and each.score is not None
    )
    if not points:
        return ""
    wide, right = _width(max(progress.spent_usd, points[-1][0]), progress.budget_usd)
    scores = [score for _, score in points]
    low, high = min(scores), max(scores)
    low, high = (
        (low - 0.05, high + 0.05) if high - low < 1e-9 else (low - 0.1 * (high - low), high + 0.1 * (high - low))
    )

    def at(usd: float, score: float) -> tuple[float, float]:
        across, up = usd / wide, (score - low) / (high - low)
        return _LEFT + across * (_WIDE - _LEFT - 10), (1 - up) * (_HIGH - _LOW - 6) + 6

    dots = "".join(
        [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" opacity=".45"/>' for x, y in (at(*one) for one in points)]
    )
    spent, _ = at(progress.spent_usd, low)
    ground = _HIGH - _LOW
    given = ""
    if progress.baseline is not None and low < progress.baseline < high:
        given = f'<path d="M{_LEFT} {at(0, progress.baseline)[1]:.1f}H{_WIDE - 10}" stroke-dasharray="5 4"/>'
    texts = [
        *[(_LEFT - 6, at(0, score)[1] + 4, "end", _told(score)) for score in sorted({min(scores), max(scores)})],
        (_LEFT, _HIGH - 8, "start", "$0"),
        (_WIDE - 10, _HIGH - 8, "end", right),
    ]
    words = "".join(
        [
            f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="11" fill="currentColor">{text}</text>'
            for x, y, anchor, text in texts
        ]
    )
    label = html.escape(told(f"best score against dollars, {sentence(progress)}"), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {_WIDE} {_HIGH}" '
        f'width="{_WIDE}" style="max-width:100%;color:inherit"><g fill="#1f77b4">{dots}</g>'
        f'<polyline points="{_steps(points, at, spent)}" fill="none" stroke="#1f77b4" stroke-width="2"/>'
        f'<g stroke="currentColor" opacity=".35">{given}'
        f'<path d="M{_LEFT} {ground}H{_WIDE - 10}M{spent:.1f} 6V{ground}"/></g>{words}</svg>'
    )


def _width(spent: float, cap: float | None) -> tuple[float, str]:
    """The dollars at the chart's right end, and what is written there: a cap that is far away is only told."""
    if cap and cap <= 3 * spent:
        wide = max(cap, spent)
        return wide, f"cap ${cap:,.4g}" if wide == cap else f"${wide:,.4g}"
    if not spent:
        return (cap, f"cap ${cap:,.4g}") if cap else (1.0, "")
    return spent, f"${spent:,.4g}" + (f", cap ${cap:,.4g} further right" if cap else "")


def _told(score: float) -> str:
    return f"{score:,.0f}" if 1000 <= abs(score) < 1e6 else f"{score:.3g}"


def _steps(points: Sequence[tuple[float, float]], at: Any, end: float) -> str:
    """The best score so far, as steps up to what is spent."""
    corners: list[tuple[float, float]] = []
    best = None
    for usd, score in points:
        if best is None or score > best:
            if best is not None:
                corners.append(at(usd, best))
            corners.append(at(usd, score))
            best = score
    corners.append((max(end, corners[-1][0]), corners[-1][1]))
    return " ".join([f"{x:.1f},{y:.1f}" for x, y in corners])
