"""How experiments are shown at a terminal: the list, and where one stands."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.experiments.listing import Listed
from dspy_prod.experiments.opened import Opened, stage_of
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
    following = _next(opened)
    return (
        opened.scorecard(), Table("Variants", ("variant", "", "given as", "version"), variants),
        *([f"Next stage: {following}"] if following else []),
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
        f"one (now {has}), and not before {_when(time)}"
    )


def _toned(word: str | None) -> Cell | None:
    return None if word is None else Cell(word, _TONES.get(word, ""))


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
