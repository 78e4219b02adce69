"""What tests of controllers share: units and outcomes straight into a store, drawn with a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from dspy_prod import Metric
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.opened import Opened
from dspy_prod.stores.base import Store
from dspy_prod.stores.trials import RUNNING, Call, Decision, Exposure, Outcome, Trials

OK = Metric("ok", margin=0.02)


def declared(store: Store, name: str = "e", state: str | None = RUNNING, **more: Any) -> Opened:
    """An experiment of two variants, as a process with its code would have made it."""
    said = {"salt": "s", "variants": {"control": "A", "new": "B"}, "weights": [1.0, 1.0],
            "metrics": [OK.model_dump(mode="json")], **more}  # fmt: skip
    trial = store.trials.create(name, Declaration(**said).to_json(), {"ok": 0.0, None: 0.0})
    if state is not None:
        store.trials.change(name, trial.revision, state=state)
    return Opened(store, name)


def feed(opened: Opened, count: int, rates: Mapping[str, float], seed: int = 1, begin: int = 0) -> None:
    """So many users, each with a call and an outcome that is good with the rate of its variant."""
    trials: Trials = opened.trials
    for number in range(begin, begin + count):
        unit, now = f"u{number}", trials.now()
        got = opened.design.assign(unit, opened.trial().stage if opened.rollout else 0)
        trials.expose(Exposure(opened.name, unit, got.stage, got.variant, got.propensity, now, got.full))
        trials.call(Call(opened.name, unit, now))
        good = random.Random(f"{seed}:{unit}").random() < rates[got.variant]
        trials.outcome(Outcome(opened.name, unit, "ok", float(good), now))


def audit(opened: Opened) -> list[tuple[str, str]]:
    """What was done, and by whom."""
    return [(each.what, each.by) for each in opened.trials.decisions(opened.name)]


def lines(opened: Opened, what: str) -> list[Decision]:
    """The lines of the audit of one kind."""
    return [each for each in opened.trials.decisions(opened.name) if each.what == what]
