"""How experiments are shown at a terminal: the list, and where one stands."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.experiments.decisions import MetricEvidence
from dspy_prod.experiments.listing import Listed
from dspy_prod.experiments.opened import Opened, reason_of, stage_of
from dspy_prod.views import Cell, Page, Table

if TYPE_CHECKING:
    from dspy_prod.experiments.scorecard import Scorecard
    from dspy_prod.views.cells import Tone

LAST: Final = 5
"""Lines of the audit that are shown."""

_TONES: Final[dict[str, Tone]] = {
    "promote": "good", "better": "good", "no_worse": "good", "rollback": "bad", "worse": "bad", "invalid": "warn",
    "void": "warn", "paused": "warn", "damaged": "bad",
}  # fmt: skip


def listed(rows: Sequence[Listed], title: str) -> Table:
    """All experiments."""
    columns = ("name", "state", "stage", "users", "decision", "everybody gets", "since")
    return Table(title, columns, [
        (row.experiment, _toned(row.state), row.stage, row.users, _toned(row.decision), row.serves, _when(row.since))
        for row in rows
    ])  # fmt: skip


def status(opened: Opened) -> Page:
    """Where one stands."""
    card, told = opened.scorecard(), opened.declaration
    variants = [
        f"{name} ({said}{', ' + told.pinned[name] if name in told.pinned and told.pinned[name] != said else ''})"
        for name, said in told.variants.items()
    ]
    rows: list[tuple[str, Any]] = [
        ("state", _toned(card.state)),
        ("stage", f"{card.stage}, since {_when(card.since)}"),
        *([("next stage", following)] if (following := _next(opened)) else []),
        ("variants", ", ".join(variants)),
        (f"{told.unit}s", ", ".join(f"{name} {users:,}" for name, users in card.users.items())),
        ("evidence says", Cell(card.decision, _TONES.get(card.decision, ""), (card.reason,))),
        *([("everybody gets", card.serves)] if card.serves else []),
        *([("hurt", f"{card.hurt:,} {told.unit}s got a candidate that is worse")] if card.hurt else []),
        *_uncounted(card),
    ]
    columns = ("candidate", "metric", "role", "status", "difference", "from", "to", "better", "worse", "no worse",
               "control", "candidate's")  # fmt: skip
    metrics = [_metric(name, each) for name, about in card.candidates.items() for each in about.metrics]
    audit = [
        (_when(each.at), each.what, each.by, reason_of(each.evidence))
        for each in reversed(opened.trials.decisions(opened.name)[-LAST:])
    ]
    caption = f"E-values: 1 and more of what is needed is proof. Intervals of 95 %; {told.unit}s whose outcome counts."
    return Page(
        Table(f"{card.name}, in namespace {opened.namespace!r}", ("", ""), rows),
        Table("Evidence", columns, metrics, caption, numbers=8),
        *([Table("Audit, newest first", ("when", "what", "by", "why"), audit)] if audit else []),
    )


def _metric(candidate: str, found: MetricEvidence) -> tuple[Any, ...]:
    shown = found.interval
    between = (None, None, None) if shown is None else (shown.difference, shown.low, shown.high)
    claims = (
        (found.better, found.better_at), (found.worse, found.worse_at), (found.no_worse, found.no_worse_at)
    )  # fmt: skip
    return (
        candidate, found.metric, found.role, _toned(found.status), *between,
        *(None if value is None else Cell(f"{value / needed:.2g}", number=True) for value, needed in claims),
        found.control_units, found.candidate_units,
    )  # fmt: skip


def _next(opened: Opened) -> str:
    """What the rollout waits for."""
    trial, rollout = opened.trial(), opened.rollout
    if rollout is None or trial.state != "running" or trial.stage + 1 >= len(rollout.stages):
        return ""
    units = dict.fromkeys(opened.design.variants[1:], 0)
    for arm in opened.trials.counts(opened.name):
        if arm.stage == trial.stage and arm.arm in units:
            units[arm.arm] += arm.units
    least, time = rollout.least_users(trial.stage), trial.since + rollout.least_time(trial.stage)
    has = ", ".join(f"{name} {count:,}" for name, count in units.items())
    return (
        f"{stage_of(rollout, trial.stage + 1)}, once each candidate has {least:,} {opened.declaration.unit}s in this "
        f"stage ({has}), and not before {_when(time)}"
    )


def _uncounted(card: Scorecard) -> Iterator[tuple[str, str]]:
    found = {"seen in two variants": card.crossed, "outcomes too late": card.late, "outcomes of strangers": card.stray}
    told = ", ".join(f"{count:,} {name}" for name, count in found.items() if count)
    if told:
        yield "not counted", told


def _toned(word: str | None) -> Cell | None:
    return None if word is None else Cell(word.replace("_", " "), _TONES.get(word, ""))


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
