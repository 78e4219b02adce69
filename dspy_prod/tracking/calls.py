"""One open call, as light as it can be: it holds what was given, and posts what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dspy_prod.context.current import CallContext
from dspy_prod.records import CallRecord
from dspy_prod.telemetry.tap import Way


class Gatherer(Protocol):
    """What makes traces of calls; see `Traces`."""

    def attempted(self, node: LeanNode, record: CallRecord, route: Way, response: Any, breaker: str | None) -> None:
        """An attempt, to be put into its trace."""
        ...

    def ended(self, node: LeanNode) -> None:
        """A node has ended."""
        ...


class Shipper(Protocol):
    """Gathers and ships; see `Courier`."""

    @property
    def traces(self) -> Gatherer:
        """What gathers; used on the shipper's own thread."""
        ...

    def post(self, tell: Callable[..., None], *told: Any) -> None:
        """Have `tell(*told)` called on that thread. Never waits, never raises."""
        ...


@dataclass(slots=True, eq=False)
class LeanNode:
    """One open call of a program or an LM.

    Attributes:
        trace_id: 32 hex digits. span_id, parent_id: 16 each; a root has no parent.
        live: a span of MLflow's own stands here; only attempts are added beneath it.
        place: of a root, the experiment and the run of MLflow's into which the code around it puts traces.
        callers: the modules that it is within, the outermost first. program: the one whose call is traced here or
            above. subject: what that one runs at the time of the call, where it may be replaced.
    """

    courier: Shipper
    name: str
    kind: str
    inputs: Any
    context: CallContext
    trace_id: str
    span_id: str
    parent_id: str | None
    live: bool = False
    place: tuple[str | None, str | None] = (None, None)
    callers: Sequence[Any] | None = None
    program: Any = None
    subject: Any = None
    outputs: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    started_ns: int = field(default_factory=time.time_ns)
    ended_ns: int = 0

    def answered(self, outputs: Any, **attributes: Any) -> None:
        self.outputs = outputs
        if attributes:
            self.attributes = attributes

    def attempt(self, record: CallRecord, route: Way, request: Any, response: Any) -> None:
        breaker = route.breaker
        state = None if breaker is None else breaker.state
        self.courier.post(self.courier.traces.attempted, self, record, route, response, state)
