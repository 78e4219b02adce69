"""How far a run is, put together from what it keeps."""

from __future__ import annotations

from collections.abc import Sequence

from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.candidates import Progress
from dspy_prod.optimize.choosing import best_of, described
from dspy_prod.optimize.outcome import Outcome
from dspy_prod.optimize.sums import Sums
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms


def progress_of(
    task: Task,
    terms: Terms,
    run: str,
    camera: Camera,
    sums: Sums,
    outcome: Outcome,
    phase: str,
    spent_usd: float,
    seconds: float,
    silent: Sequence[str] = (),
) -> Progress:
    """How far a run is that has spent so much in so many seconds, and waits for models that are silent."""
    total, _, _ = sums.snapshot()
    candidates = described(camera, sums, outcome.returned)
    best, given = best_of(camera, outcome.returned), outcome.given
    used = (
        (spent_usd, terms.budget_usd), (total.calls, terms.max_calls), (total.tokens, terms.max_tokens),
        (seconds, terms.max_time),
    )  # fmt: skip
    share = max([part / cap for part, cap in used if cap], default=0.0)
    return Progress(
        run=run, optimizer=type(task.optimizer).__name__, phase=phase, seconds=seconds, spent_usd=spent_usd,
        calls=total.calls, tokens=total.tokens, candidates=candidates,
        best=next((each for each in candidates if best is not None and each.key == best.state.key), None),
        baseline=camera.mean(given) if given is not None and camera.is_complete(given) else None,
        budget_usd=terms.budget_usd, max_calls=terms.max_calls, max_tokens=terms.max_tokens, max_time=terms.max_time,
        cached=total.cached, replayed=total.replayed,
        eta=seconds * (1 - share) / share if 0.01 < share < 1 else None,  # until a cap is used up, at this pace
        waiting=f"{', '.join(silent)} to answer again" if silent else None,
        stopped_by=outcome.stopped_by if phase == "ended" else None,
    )  # fmt: skip
