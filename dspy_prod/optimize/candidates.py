"""What an optimization found: its candidates, and how far it is. Plain data, which views, figures and MLflow read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["complete", "raced", "minibatch", "unfinished"]
"""`complete`: it has a score on the whole selection set. `raced`: a race dropped it early. `minibatch`: it was only
looked at on examples of other sets. `unfinished`: the run ended before its evaluation did."""

StoppedBy = Literal[
    "completed", "budget", "calls", "tokens", "time", "target", "stopped", "interrupted", "failed"
]  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One program that the optimizer tried.

    Attributes:
        index: 0 is the given program. key: what identifies its instructions, demonstrations and settings.
        origin: where it comes from, as "given program", "seed 2", "trial 4".
        parents: indices of the candidates that it was made from, as far as the optimizer tells.
        status: see `Status`.
        score: mean score on the selection set, as the metric gives it; None unless it is complete.
        predicted: the mean that a race expected of it when it was dropped.
        examples: how many examples of the selection set it has answered.
        scores: those answers' scores, by the example's place in the selection set.
        cost_usd: what asking it cost in this run, answers from caches and the log for nothing.
        usd_per_answer: what an answer of it costs at list price; None when nothing is known.
        tokens: input and output together. latency: mean seconds of an answer that came from upstream.
        prompts: instructions by predictor. demos: how many demonstrations by predictor.
        state: what makes it this program, as `dspy.Module.dump_state` tells it.
        found_usd: what the run had spent when its score was known.
        minibatches: scores on parts of other sets, in order: (how many examples, mean score).
    """

    index: int
    key: str
    origin: str
    status: Status
    parents: tuple[int, ...] = ()
    score: float | None = None
    predicted: float | None = None
    examples: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)
    cost_usd: float = 0.0
    usd_per_answer: float | None = None
    tokens: int = 0
    latency: float | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    demos: Mapping[str, int] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    found_usd: float | None = None
    minibatches: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a run is, for those who watch it.

    Attributes:
        run: its name. optimizer: name of the class. phase: "baseline", "search", "finals", "test", "ended".
        seconds: since it began. max_time: its limit in seconds.
        spent_usd, calls, tokens: used so far; budget_usd, max_calls, max_tokens: their caps.
        cached, replayed: calls that the cache or the run's log answered.
        candidates: all so far. best: the best complete one. baseline: score of the given program.
        eta: seconds that are left by the forecast or by the caps; None when nobody can tell.
        waiting: what the run waits for, as "an outage of openai/gpt-4o-mini"; None when it goes on.
        stopped_by: why it ended.
    """

    run: str
    optimizer: str
    phase: str
    seconds: float
    spent_usd: float
    calls: int
    tokens: int
    candidates: tuple[Candidate, ...] = ()
    best: Candidate | None = None
    baseline: float | None = None
    budget_usd: float | None = None
    max_calls: int | None = None
    max_tokens: int | None = None
    max_time: float | None = None
    cached: int = 0
    replayed: int = 0
    eta: float | None = None
    waiting: str | None = None
    stopped_by: StoppedBy | None = None


class Watcher(Protocol):
    """Somebody who watches a run: the live view, MLflow. What it raises is logged and never ends the run."""

    def begin(self, progress: Progress) -> None: ...

    def update(self, progress: Progress) -> None:
        """Called from a thread of the run, a few times a second at most, and when a candidate is new or complete."""
        ...

    def end(self, progress: Progress, report: Any) -> None:
        """Called once, with the `OptimizationReport`; None when there is none."""
        ...
