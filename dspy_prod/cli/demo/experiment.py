"""The demo's last act: a new version that fails every call meets an experiment. No model is asked."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import count
from typing import Any, Final
from uuid import uuid4

import dspy

import dspy_prod

SHARE: Final = 0.01
MOST: Final = 5_000
"""Users, should it not be decided before. Two to four that meet the new version are enough, of a few hundred."""


class _Works(dspy.Module):
    def forward(self, message: str) -> Any:
        return dspy.Prediction(category="billing")


class _Fails(dspy.Module):
    def forward(self, message: str) -> Any:
        raise ValueError("a field of the new version is misspelt")


@dataclass(frozen=True)
class Act:
    """How it ended.

    Attributes:
        came: users, of all variants. hurt: those of them who met the new version. serves: what everybody gets now.
        reason: of the decision. seconds: that it took.
    """

    came: int
    hurt: int
    serves: str | None
    reason: str
    seconds: float


def act() -> Act:
    """Let users come, one after the other, until the experiment is decided."""
    began = time.monotonic()
    name = f"demo-{uuid4().hex[:8]}"
    experiment = dspy_prod.Experiment(
        name,
        variants={"control": _Works(), "new": _Fails()},
        rollout=dspy_prod.Rollout(stages=(SHARE, 0.5), min_time=0.0),
        store=f"memory://{name}",
    )
    experiment.start()
    quiet = logging.getLogger("dspy")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # that its calls fail is the point here
    try:
        for came in count(1):
            with dspy_prod.call_context(user=f"user-{came}"):
                try:
                    experiment(message="I was charged twice.")
                except ValueError:
                    experiment.step()  # a service looks every few seconds; what changes nothing need not be looked at
            if experiment.state != "running" or came == MOST:
                break
    finally:
        quiet.setLevel(level)
    card = experiment.scorecard()
    return Act(came, card.hurt, card.serves, card.reason, time.monotonic() - began)


def lines(found: Act) -> list[str]:
    """What the demo prints of it."""
    if found.serves is None:
        return [f"Experiment: not decided after {found.came:,} users: {found.reason}."]
    users = "user" if found.hurt == 1 else "users"
    return [
        f"Experiment: a new version fails every call, and gets {SHARE:.0%} of the users (simulated; no model asked).",
        f"  {found.came:,} users came, {found.hurt} {users} met it, and it was rolled back: {found.reason}.",
        f"  Everybody gets {found.serves} now, after {found.seconds:.1f} s. More: notebooks/04_compare_variants.ipynb "
        "and dspy-prod experiment --help",
    ]
