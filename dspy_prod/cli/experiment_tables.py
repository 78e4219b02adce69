"""How experiments are shown at a terminal: the list, and where one stands."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.listing import Listed
from dspy_prod.experiments.opened import Opened, stage_of
from dspy_prod.experiments.unseen import Unseen
from dspy_prod.options.experiments import SHADOW
from dspy_prod.views import Cell, Table

if TYPE_CHECKING:
    from dspy_prod.views.cells import Tone

_TONES: Final[dict[str, Tone]] = {
    "promote": "good", "rollback": "bad", "invalid": "warn", "paused": "warn", "damaged": "bad",
}  # fmt: skip


def listed(rows: Sequence[Listed], title: str) -> Table:
    """All experiments."""
    columns = ("name", "state", "stage", "users", "decision", "everybody gets", "since")
    return Table(title, columns, [
        (row.experiment, _toned(row.state), row.stage, row.users, _toned(row.decision), row.serves, _when(row.since))
        for row in rows
    ])  # fmt: skip


def status(opened: Opened) -> tuple[Any, ...]:
    """Where one stands: its scorecard, what its variants are, and what its rollout waits for."""
    told = opened.declaration
    variants = [
        (name, "control" if name == opened.control else None, said, told.pinned.get(name))
        for name, said in told.variants.items()
    ]
    card = opened.scorecard()
    following = _next(opened, card.unseen)
    return (
        card, Table("Variants", ("variant", "", "given as", "version"), variants),
        *([f"Next stage: {following}"] if following else []),
    )  # fmt: skip


def _next(opened: Opened, unseen: Unseen | None) -> str:
    """What the rollout waits for."""
    trial, rollout = opened.trial(), opened.rollout
    if rollout is None or trial.state != "running" or trial.stage + 1 >= len(rollout.stages):
        return ""
    after, earliest = stage_of(rollout, trial.stage + 1), _when(trial.since + rollout.least_time(trial.stage))
    if rollout.stages[trial.stage] == SHADOW and unseen is not None:
        gone = Declaration.from_json(trial.declaration).dropped
        has = ", ".join(f"{name} {count:,}" for name, count in unseen.pairs.items() if name not in gone)
        return (
            f"{after}, once each candidate has answered {unseen.needed:,} calls unseen (now {has}), and not before "
            f"{earliest}"
        )
    units = dict.fromkeys(opened.design.variants[1:], 0)
    for arm in opened.trials.counts(opened.name):
        if arm.stage == trial.stage and arm.arm in units:
            units[arm.arm] += arm.units
    least = rollout.least_users(trial.stage)
    has = ", ".join(f"{name} {count:,}" for name, count in units.items())
    return (
        f"{after}, once each candidate has {least:,} {opened.declaration.unit}s in this "
        f"one (now {has}), and not before {earliest}"
    )


def _toned(word: str | None) -> Cell | None:
    return None if word is None else Cell(word, _TONES.get(word, ""))


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
