"""What is posted to the courier, and the node of a trace that posts it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from dspy_prod.context.current import CallContext
from dspy_prod.records import CallRecord
from dspy_prod.telemetry.tap import Way


class Post(Protocol):
    """Where messages go."""

    def post(self, message: Any) -> None:
        """Take it; never waits."""
        ...


@dataclass(slots=True, eq=False)
class LeanNode:
    """One open call of a program or an LM.

    Attributes:
        trace_id: 32 hex digits. span_id, parent_id: 16 each; a root has no parent.
        live: a span of MLflow's own stands here; only attempts are added beneath it.
    """

    courier: Post
    name: str
    kind: str
    inputs: Any
    context: CallContext
    trace_id: str
    span_id: str
    parent_id: str | None
    live: bool = False
    outputs: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    started_ns: int = field(default_factory=time.time_ns)
    ended_ns: int = 0

    def answered(self, outputs: Any, **attributes: Any) -> None:
        """See `tap.Node`."""
        self.outputs = outputs
        if attributes:
            self.attributes = attributes

    def attempt(self, record: CallRecord, route: Way, request: Any, response: Any) -> None:
        """See `tap.Node`."""
        breaker = route.breaker
        self.courier.post(Attempted(self, record, route, response, None if breaker is None else breaker.state))


class Attempted(NamedTuple):
    """An attempt, to be put into its trace."""

    node: LeanNode
    record: CallRecord
    route: Way
    response: Any
    breaker: str | None


class Ended(NamedTuple):
    """A node has ended."""

    node: LeanNode


class Foreign(NamedTuple):
    """A whole trace that MLflow itself recorded."""

    trace: Any


class Refused(NamedTuple):
    """A trace that MLflow recorded was turned away: its attempts are not kept either."""

    trace_id: str


class Delegated(NamedTuple):
    """A trace that MLflow ships by itself."""

    trace_id: str
