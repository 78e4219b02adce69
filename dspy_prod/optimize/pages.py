"""An `Facts` as a page: what was found, how sure that is, what it cost, what was tried, what to know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.optimize import figures
from dspy_prod.views import Cell, Page, Picture, Table, usd

if TYPE_CHECKING:
    from dspy_prod.optimize.candidates import Candidate
    from dspy_prod.optimize.facts import Facts, Spent

MOST_WARNINGS: Final = 20
MOST_CANDIDATES: Final = 30
"""Rows of the table of candidates: the best ones, and the given program."""

_GOOD: Final = ("completed", "target")
_WHY: Final = {
    "completed": "the optimizer came to its end",
    "budget": "the budget was used up",
    "calls": "the cap on calls was reached",
    "tokens": "the cap on tokens was reached",
    "time": "the time was up",
    "target": "the score to stop at was reached",
    "stopped": "it was asked to stop",
    "interrupted": "Ctrl-C",
    "failed": "it failed",
}


def page(report: Facts, *, pictures: bool = False) -> Page:
    """The whole report.

    Args:
        report: what is shown.
        pictures: also as `report.plot()` draws it; without matplotlib there are none.
    """
    parts: list[Table | Picture | str] = [_outcome(report)]
    if pictures:
        try:
            parts.append(Picture(figures.png(report.plot()), _alt(report), 1000))
        except ConfigError:
            pass  # matplotlib is not installed: the tables say it all
    parts += [_spent(report)] if report.spent_by or report.phases else []
    parts += [_candidates(report)] if report.candidates else []
    if report.warnings:
        parts.append(_warnings(report.warnings))
    return Page(*parts)


def _outcome(report: Facts) -> Table:
    ending = Cell(
        report.stopped_by,
        "good" if report.stopped_by in _GOOD else "bad" if report.stopped_by == "failed" else "warn",
        (report.detail or _WHY.get(report.stopped_by),),
    )
    rows: list[tuple[str, Any]] = [("ended", ending), *_scores(report), *_costs(report)]
    if report.experiment_run:
        rows.append(("MLflow run", report.experiment_run))
    return Table(f"{report.optimizer}: optimization {report.run}", ("", ""), rows)


def _scores(report: Facts) -> Iterator[tuple[str, Any]]:
    chosen, best, given = report.selection, report.best, report.baseline
    where = "" if chosen is None else f" on {chosen.size:,} examples of the {chosen.source}"
    if best is None:
        yield "best program", Cell("none", "bad", ("nothing was evaluated completely",))
    else:
        what = best.origin if best.index else "the given program: nothing better was found"
        yield "best program", Cell(f"#{best.index}", "strong", (what,))
    if report.best_score is not None:
        before = None if given is None or given.score is None else f"given program: {given.score:.4g}"
        note = "the highest of many noisy scores, so it flatters" if len(report.candidates) > 1 else None
        yield f"score{where}", Cell(f"{report.best_score:.4g}", "strong", (before, note))
    if report.expected_score is not None:
        interval = report.expected_interval
        below = None if interval is None else f"95 % interval: {interval[0]:.4g} to {interval[1]:.4g}"
        yield "expected on new examples", Cell(f"{report.expected_score:.4g}", "strong", (below,))
    if report.test is not None:
        yield "on the test set", _tested(report.test)


def _tested(test: Any) -> Cell:
    sure = test.low > 0 or test.high < 0
    tone: Any = "good" if test.low > 0 else "bad" if test.high < 0 else "warn"
    return Cell(
        f"{test.best:.4g}, given program {test.given:.4g}: {test.difference:+.4g}",
        tone,
        (
            f"95 % interval of the difference: {test.low:+.4g} to {test.high:+.4g}"
            + ("" if sure else "; it may be chance"),
            f"{test.n:,} examples, {test.better:,} better, {test.worse:,} worse, p = {_p(test.p_value)}",
        ),
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def _costs(report: Facts) -> Iterator[tuple[str, Any]]:
    cap = "no cap" if report.budget_usd is None else f"cap ${report.budget_usd:,.4g}"
    if report.budget_usd:
        cap += f", {100 * report.spent_usd / report.budget_usd:.0f} % used"
    unsure = (
        f"${report.unconfirmed_usd:,.4f} of it are bounds: the bill is not known" if report.unconfirmed_usd else None
    )
    yield "spent", Cell(f"${report.spent_usd:,.4f}", "strong", (cap, unsure))
    if report.forecast is not None:
        yield "forecast", _forecast(report, report.forecast)
    free = [f"{count:,} {word}" for count, word in ((report.cached, "from the cache"), (report.replayed, "replayed"))
            if count]  # fmt: skip
    first = "" if report.first_new is None or not report.replayed else f"; the first new call was {report.first_new:,}"
    caps = _caps((report.max_calls, "calls"), (report.max_tokens, "tokens"))
    yield (
        "calls",
        Cell(
            f"{report.calls:,} upstream, {report.tokens:,} tokens",
            below=((", ".join(free) + " for nothing" + first) if free else None, caps),
        ),
    )
    limit = None if report.max_time is None else f"at most {lasted(report.max_time)}"
    yield "time", Cell(lasted(report.seconds), below=(limit,))
    raced = report.racing
    if raced is not None:
        whole = raced.evaluated + raced.saved
        part = f", {100 * raced.saved / whole:.0f} % of {whole:,}" if whole else ""
        yield (
            "saved by racing",
            Cell(f"{raced.saved:,} answers{part}", below=(f"{raced.dropped:,} candidates were dropped early",)),
        )


def _forecast(report: Facts, forecast: Any) -> Cell:
    said = f"${forecast.usd:,.4f} (${forecast.usd_low:,.4f} to ${forecast.usd_high:,.4f}), {forecast.calls:,.0f} calls"
    if report.stopped_by != "completed":
        return Cell(said, below=("for a run that comes to its end, which this one did not",))
    tested = report.phases["test"].usd if "test" in report.phases else 0.0
    actual = report.spent_usd - tested
    ratio = f"{actual / forecast.usd:.2f} × as forecast" if forecast.usd else "nothing was forecast"
    inside = forecast.usd_low <= actual <= forecast.usd_high
    what = "actual, without the test set" if tested else "actual"
    return Cell(said, "" if inside else "warn", (f"{what}: {ratio}, {'in' if inside else 'outside'} the range",))


def _caps(*caps: tuple[int | None, str]) -> str | None:
    said = [f"{most:,} {what}" for most, what in caps if most is not None]
    return f"at most {', '.join(said)}" if said else None


def _spent(report: Facts) -> Table:
    def rows(kind: str, parts: Iterable[tuple[str, Spent]]) -> Iterator[tuple[Any, ...]]:
        for name, one in parts:
            yield Cell(kind, "faint"), name, usd(one.usd, 4), one.calls, one.tokens

    by = [*rows("LM", report.spent_by.items()), *rows("phase", report.phases.items())]
    before = report.spent_usd - sum(one.usd for one in report.phases.values())
    if before > 1e-9:
        by.append((Cell("before", "faint"), "the pilot of a forecast, earlier parts", usd(before, 4), "", ""))
    return Table("Where it went", ("", "", "USD", "calls", "tokens"), by, numbers=3)


def _candidates(report: Facts) -> Table:
    given = [one for one in report.candidates if one.index == 0]
    rest = sorted(
        (one for one in report.candidates if one.index != 0),
        key=lambda one: (one.score is None, -(one.score or 0.0), -(one.predicted or 0.0), one.index),
    )
    shown = [*given, *rest][:MOST_CANDIDATES]
    more = len(report.candidates) - len(shown)
    caption = f"{more:,} more are in to_frame()." if more else ""
    front = {one.index for one in figures.pareto(report.candidates)}
    columns = ("", "origin", "from", "status", "score", "examples", "USD per 1,000 answers", "spent, USD", "seconds")
    return Table(
        "Candidates", columns, [_candidate(one, report, one.index in front) for one in shown], caption, numbers=5
    )


def _candidate(one: Candidate, report: Facts, worthwhile: bool) -> tuple[Any, ...]:
    best = report.best is not None and one.index == report.best.index
    if one.score is not None:
        score = Cell(f"{one.score:.4g}", "good" if best else "", number=True)
    elif one.predicted is not None:
        score = Cell(f"≈ {one.predicted:.4g}", "faint", number=True)
    elif one.minibatches:
        score = Cell(f"{one.minibatches[-1][1]:.4g} of {one.minibatches[-1][0]:,}", "faint", number=True)
    else:
        score = Cell("–", "faint", number=True)
    words = [word for word, holds in (("best", best), ("none is as cheap and better", worthwhile)) if holds]
    return (
        Cell(f"#{one.index}", "strong" if best else ""),
        Cell(one.origin, below=(", ".join(words),)),
        ", ".join(f"#{parent}" for parent in one.parents),
        one.status,
        score,
        one.examples,
        usd(None if one.usd_per_answer is None else 1000 * one.usd_per_answer, 4),
        usd(one.cost_usd, 4),
        None if one.latency is None else Cell(f"{one.latency:.2f}", number=True),
    )


def _warnings(warnings: tuple[str, ...]) -> Table:
    more = len(warnings) - MOST_WARNINGS
    rows = [(Cell(one, "warn"),) for one in warnings[:MOST_WARNINGS]]
    return Table("What to know", ("",), rows, f"{more:,} more are in warnings." if more > 0 else "")


def _alt(report: Facts) -> str:
    best = "no best score" if report.best_score is None else f"best score {report.best_score:.4g}"
    return f"Best score against dollars, and quality against cost: {best} after ${report.spent_usd:,.4f}"


def lasted(seconds: float) -> str:
    """Seconds as a person says them: `12 s`, `3 min 5 s`, `2 h 10 min`.

    Example:
        ```python
        assert lasted(185.2) == "3 min 5 s"
        ```
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
