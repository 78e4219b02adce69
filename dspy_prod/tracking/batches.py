"""What is written at once: the spans of traces that have ended, each trace counted the first time alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dspy_prod.context.assignments import Assignment
from dspy_prod.tracking.endings import NOTHING_YET, Answer
from dspy_prod.tracking.spans import Span

BATCH: Final = 50
"""Traces, or messages, in one batch."""
LINGER: Final = 0.2
"""Seconds for which ended traces wait for company: MLflow takes many at once for little more than one."""


@dataclass(slots=True, eq=False)
class Batch:
    """What is written at once.

    Attributes:
        number: of the batch. traces: how many are in it for the first time.
        spans: in the form MLflow reads. infos: headlines of traces that MLflow itself recorded.
        places: experiments of traces that do not go into the usual one, by the spans' `trace_id`.
        runs: the runs that traces belong to, by `tr-...`.
        lines: what MLflow's list shows in the place of answers, by the spans' `trace_id`.
        messages: of runs and feedback, see `runs_exporter`; done: told what became of them.
        tries: exporter processes that were given it.
    """

    number: int
    traces: int
    spans: list[Span]
    infos: list[dict[str, Any]]
    places: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    done: Callable[[Batch, Mapping[str, Any] | None, str | None], None] | None = None
    tries: int = 1


@dataclass(slots=True, eq=False)
class Trace:
    """One trace in the making."""

    begun: float
    counted: bool = True
    spans: list[Span] = field(default_factory=list)
    cost: int = 0
    unknown: bool = False
    usage: list[int] = field(default_factory=lambda: [0, 0])
    remarkable: bool = False
    answer: Answer = NOTHING_YET
    ending: dict[str, Any] = field(default_factory=dict)  # tags: how it ended
    line: str | None = None
    info: dict[str, Any] | None = None
    whose: dict[str, Any] = field(default_factory=dict)  # of its attempts
    place: str | None = None
    run: tuple[str, str] | None = None  # its trace's id, and the run's
    places: dict[Assignment, bool] = field(default_factory=dict)  # in experiments: whether it is linked by that one yet
    id: str | None = None  # `tr-...`
    sample: float | None = None  # share of its like that is kept, where its context says so


def batch_of(number: int, some: Sequence[Trace]) -> Batch:
    """A batch of these traces, which keep none of what is in it."""
    batch = Batch(
        number,
        sum(trace.counted for trace in some),
        [one for trace in some for one in trace.spans],
        [trace.info for trace in some if trace.info is not None],
        {one["trace_id"]: trace.place for trace in some if trace.place for one in trace.spans},
        dict(trace.run for trace in some if trace.run is not None),
        {trace.spans[0]["trace_id"]: trace.line for trace in some if trace.line is not None and trace.spans},
    )
    for trace in some:
        trace.spans, trace.counted, trace.line = [], False, None
    return batch
