"""A `Scorecard` as tables: what to do and why first, then the users, then each metric, then what to know."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.wording import Wording, progress
from dspy_prod.views import Cell, Page, Picture, Table
from dspy_prod.views.cells import Tone

if TYPE_CHECKING:
    from dspy_prod.experiments.decisions import MetricEvidence
    from dspy_prod.experiments.facts import Facts, Waited
    from dspy_prod.experiments.unseen import Unseen

DECISIONS: Final[dict[str, tuple[str, Tone]]] = {
    "promote": ("promote {winner}", "good"),
    "rollback": ("roll back: everybody gets {control}", "bad"),
    "invalid": ("invalid: nothing can be concluded", "warn"),
    "keep": ("keep going: no decision yet", "strong"),
}
STATUSES: Final[dict[str, tuple[str, Tone]]] = {
    "better": ("better", "good"),
    "worse": ("worse", "bad"),
    "no_worse": ("no worse", "good"),
    "unclear": ("not known yet", ""),
    "void": ("void: unequal answers", "warn"),
}
MOST_EVENTS: Final = 10
"""Lines of the audit that a table shows; a page has all."""


def page(card: Facts, *, pictures: bool = False) -> Page:
    """The whole card.

    Args:
        card: what is shown.
        pictures: also as `drawing` draws it; without matplotlib there are none.
    """
    parts: list[Table | Picture | str] = [_outcome(card), *(_metrics(card, name) for name in card.candidates)]
    if pictures and card.history:
        from dspy_prod.experiments.drawing import drawn
        from dspy_prod.views.figures import png

        try:
            parts.append(Picture(png(drawn(card)), f"The differences of {card.name} and how they grew", 1000))
        except ConfigError:
            pass  # matplotlib is not installed: the tables say it all
    parts += [calls(card)] if card.calls else []
    parts += [users(card)] if len(card.stages) > 1 else []
    parts += [] if card.unseen is None else [unseen(card.unseen)]
    parts += [audit(card, MOST_EVENTS)] if card.audit else []
    return Page(*parts)


def verdict(card: Facts) -> tuple[str, Tone]:
    """The decision in words, and how it is meant."""
    said, tone = DECISIONS[card.decision]
    if card.decision == "keep" and card.state in ("stopped", "decided"):
        return "it ended without a winner", tone
    return said.format(winner=card.winner, control=card.control), tone


def state(card: Facts) -> str:
    """Where it stands, in words."""
    if card.serves is not None:
        return f"{card.state}: everybody gets {card.serves}"
    return f"{card.state}, stage {card.stage}"


def moment(at: float) -> str:
    """A time as people write it."""
    return dt.datetime.fromtimestamp(at, dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def users(card: Facts) -> Table:
    """Users by stage and variant."""
    rows = [(each.stage, *each.users.values()) for each in card.stages]
    return Table(
        "Users by stage", ("stage", *card.users), rows, "Each where it was seen first.", len(card.users),
        [("all", *card.users.values())] if len(rows) > 1 else (),
    )  # fmt: skip


def unseen(found: Unseen) -> Table:
    """The shadow stage."""
    rows = [
        (name, Cell(f"{count:,} of {found.needed:,}", number=True), found.failed[name], found.refused[name])
        for name, count in found.pairs.items()
    ]
    spent = "" if found.usd is None else f"{found.usd:.4f} of {found.cap_usd:g} USD are spent. "
    more = f" {found.left_out:,} calls were left out here, for the queue was full." if found.left_out else ""
    note = f"{spent}A call that a limit, a budget or a deadline refused tells nothing of a candidate.{more}"
    return Table("Calls that nobody saw", ("candidate", "answered", "failed", "refused"), rows, note)


def calls(card: Facts) -> Table:
    """How all calls ended, by variant."""
    rows = [
        (each.arm, f"{each.calls:,}", *(f"{100 * count / each.calls:.1f} %" for count in each[2:]))
        for each in (card.calls[name] for name in card.users if name in card.calls)
    ]
    note = (
        "Of users of the experiment, also those calls that count for no guardrail. Abandoned: whoever called left "
        "before it had ended. They decide nothing."
    )
    return Table("All calls", ("answered by", "calls", "failed", "fallback", "abandoned"), rows, note, 4)


def audit(card: Facts, most: int | None = None) -> Table:
    """What was decided, the latest first."""
    shown = [*reversed(card.audit)][:most]
    more = len(card.audit) - len(shown)
    rows = [(Cell(moment(each.at), number=True), Cell(each.what, "strong"), each.by, each.reason) for each in shown]
    note = f"{more:,} earlier lines are not shown." if more else ""
    return Table("Decisions, the latest first", ("when", "what", "by", "why"), rows, note)


def waits(card: Facts) -> Iterator[tuple[str, str]]:
    """Who does not count yet: (metrics, in words), for metrics that wait alike together."""
    alike: dict[Waited, list[str]] = {}
    for name, waited in card.waiting.items():
        if waited.units and waited.until is not None:
            alike.setdefault(waited, []).append(name)
    exposed = sum(card.users.values())
    for waited, names in alike.items():
        assert waited.until is not None
        yield (
            ", ".join(names),
            (
                f"{max(0, exposed - waited.units):,} of {exposed:,} users: {waited.units:,} are waited for, the first "
                f"until {moment(waited.until)}"
            ),
        )


def claims(found: MetricEvidence) -> Iterator[tuple[str, float, float]]:
    """The claims that are open on a metric: their name, the e-value, and the one that proves them."""
    if found.better is not None:
        yield "better", found.better, found.better_at
    yield "worse", found.worse, found.worse_at
    if found.no_worse is not None:
        yield "no worse", found.no_worse, found.no_worse_at


def _outcome(card: Facts) -> Table:
    said, tone = verdict(card)
    rows: list[tuple[str, Any]] = [
        ("decision", Cell(said, tone, (card.reason,))),
        ("state", Cell(state(card), below=(f"since {moment(card.since)}",))),
        ("users", ", ".join(f"{name} {count:,}" for name, count in card.users.items())),
    ]
    rows += [
        ("count so far" if not place else "", Cell(said, below=(names,)))
        for place, (names, said) in enumerate(waits(card))
    ]
    if card.horizon is not None:
        rows.append(("horizon", card.horizon))
    if card.hurt:
        rows.append(("users hurt", Cell(f"{card.hurt:,}", "bad", ("they got a candidate that was rolled back",))))
    if card.url is not None:
        rows.append(("in MLflow", card.url))
    rows += [("beware" if not place else "", Cell(each, "warn")) for place, each in enumerate(card.warnings)]
    return Table(f"Experiment {card.name}", ("", ""), rows)


def _metrics(card: Facts, name: str) -> Table:
    rows = [_row(card, each) for each in card.candidates[name].metrics]
    columns = ("metric", card.control, name, "difference", "better", "worse", "no worse", "status")
    return Table(f"{name} against {card.control}", columns, rows, _CAPTION)


_CAPTION: Final = (
    "Below a mean, of how many users. Better, worse, no worse by the margin: e-value of needed, and how far that is on "
    "a logarithmic scale. The interval (95 % over all looks, from 100 users a variant on) decides nothing."
)


def _row(card: Facts, found: MetricEvidence) -> tuple[Cell, ...]:
    amounts, shown = Wording(card.metric(found.metric)), found.interval
    said, tone = STATUSES[found.status]
    margin = amounts.accepted()
    told: dict[str, Cell] = {}
    for claim, e_value, needed in claims(found):
        first, _, way = progress(e_value, needed).partition(": ")
        told[claim] = Cell(first, "strong" if way == "proven" else "", (way,), number=True)
    means = (None, None) if shown is None else (shown.control, shown.candidate)
    counts = found.control_units, found.candidate_units
    return (
        Cell(found.metric, below=(amounts.unit, f"margin {margin}" if margin and amounts.margin is not None else None)),
        *(
            Cell(amounts.value(mean), below=(f"of {count:,}",), number=True)
            for mean, count in zip(means, counts, strict=True)
        ),
        _difference(amounts, found),
        *(told.get(claim, Cell("", number=True)) for claim in ("better", "worse", "no worse")),
        Cell(said, tone, ("all 0 so far" if found.nothing else None,)),
    )


def _difference(amounts: Wording, found: MetricEvidence) -> Cell:
    shown = found.interval
    if shown is None:
        return Cell(amounts.difference(None), "faint", number=True)
    return Cell(amounts.difference(shown.difference), below=(amounts.range(shown.low, shown.high),), number=True)
