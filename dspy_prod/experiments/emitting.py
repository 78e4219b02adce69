"""What listeners are told of an experiment."""

from __future__ import annotations

import time

from dspy_prod.stores.trials import Trial
from dspy_prod.telemetry.events import BUS


def emit(what: str, reason: str, trial: Trial, serves: str | None, verdict: str) -> None:
    """Tell listeners what a controller has done.

    Args:
        what, reason: as of the audit. trial: as it is since. serves: the variant that everybody gets; None: units are
            assigned. verdict: of the evidence.
    """
    if not BUS.active:
        return
    at, name, stage = time.time(), trial.name, trial.stage
    if what in ("stage", "promote"):
        BUS.emit(
            "experiment_moved", at, experiment=name, what=what, reason=reason, stage=stage, variant=serves,
            verdict=verdict,
        )  # fmt: skip
    else:
        BUS.emit(
            "experiment_alarm", at, experiment=name, what=what, reason=reason, stage=stage, variant=serves,
            verdict=verdict,
        )  # fmt: skip
