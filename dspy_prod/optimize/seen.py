"""What was seen of one candidate of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspy_prod.optimize.states import State


@dataclass(eq=False)
class Seen:
    """What was seen of one state.

    Attributes:
        index: in order of appearance. state: which. origin: where it came from.
        scores: by the key of the example. answered, total: of them, those of the selection set: how many, and their
            sum. failed: examples at which the program itself failed, scored 0.
        evaluated: it was evaluated, so it is a candidate, and not a teacher or a sample.
        calls: calls of the program. minibatches: means over parts of other sets.
        predicted: the mean that a race expected of it. parents: what it was made from.
        found_usd: what the run had spent when it was complete.
    """

    index: int
    state: State
    origin: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    answered: int = 0
    total: float = 0.0
    failed: set[str] = field(default_factory=set)
    evaluated: bool = False
    calls: int = 0
    minibatches: list[tuple[int, float]] = field(default_factory=list)
    predicted: float | None = None
    parents: tuple[int, ...] = ()
    found_usd: float | None = None
