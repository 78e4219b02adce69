"""Where tracking looks into a call. Nothing is imported and next to nothing is done while nobody looks.

The pipeline tells a `Tap` of program calls, LM calls and attempts; `dspy_prod.tracking` is the one that ships. A tap
never waits and never raises: what it cannot do, it counts, for who asks how tracking goes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response, Usage

    from dspy_prod.records import CallRecord


class Guard(Protocol):
    """What is told of a circuit breaker."""

    @property
    def state(self) -> str:
        """`closed`, `open`, `half_open`, or a state that an operator forced."""
        ...


class Tariff(Protocol):
    """What is told of a model's prices."""

    def cost(self, usage: Usage) -> int | None:
        """What this usage costs in nano-USD, None when that is not known."""
        ...


class Way(Protocol):
    """What is told of the route an attempt took."""

    @property
    def breaker(self) -> Guard | None:
        """Its breaker, if it has one."""
        ...

    def rates(self) -> Tariff | None:
        """Its model's prices, None when unknown."""
        ...


class Node(Protocol):
    """An open piece of a trace: one call of a program, of an LM or of an embedder."""

    def answered(self, outputs: Any, **attributes: Any) -> None:
        """Note what it gives back, and attributes of its span."""
        ...

    def attempt(self, record: CallRecord, route: Way, request: Request | None, response: Response | None) -> None:
        """Add an upstream attempt, or an answer from the cache, perhaps after the node has ended."""
        ...


class Nothing:
    """In the place of a node when nobody looks, or when its trace was turned away; it is its own scope."""

    __slots__ = ()

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Nothing was put in force."""

    def answered(self, outputs: Any, **attributes: Any) -> None:
        """See `Node`."""

    def attempt(self, record: CallRecord, route: Way, request: Request | None, response: Response | None) -> None:
        """See `Node`."""


NOTHING: Final = Nothing()


class Tap(Protocol):
    """Sees every call."""

    def program_call(self, name: str, inputs: dict[str, Any]) -> AbstractContextManager[Node]:
        """The scope of one call of a `Production`; it puts a context with `trace_id` and `node` in force."""
        ...

    def lm_call(self, name: str, inputs: dict[str, Any]) -> AbstractContextManager[Node]:
        """The scope of one call of an LM, likewise."""
        ...

    def embedding_call(self, name: str, inputs: dict[str, Any]) -> AbstractContextManager[Node]:
        """The scope of one call of an embedder, likewise."""
        ...

    def flush(self) -> bool:
        """Wait until what has ended is shipped, no longer than something moves; False when it is not."""
        ...


class _Slot:
    """Holds the one active tap."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active: Tap | None = None


TAP = _Slot()


class Frozen(BaseModel):
    """Base of what can be asked: of health, costs, and of tracking here."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrackingHealth(Frozen):
    """How the tracking in MLflow goes.

    Attributes:
        uri: where traces go, without a password. experiment: name of the MLflow experiment.
        exported: traces in MLflow. waiting: not there yet, those of running calls included.
        sampled_out: left out by `sample`. lost: turned away because too many waited, refused by MLflow, or given up.
        failing: why nothing can be delivered at the moment, None when it can.
        messages_waiting, messages_lost: likewise, of what is told of runs and of feedback.

    Example:
        ```python
        state = tracking.status()
        if state is not None and state.lost:
            print(state.lost, state.failing)
        ```
    """

    uri: str
    experiment: str
    exported: int
    waiting: int
    sampled_out: int
    lost: int
    failing: str | None
    messages_waiting: int = 0
    messages_lost: int = 0
