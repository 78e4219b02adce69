"""The tap of tracking: it opens a node per call and posts what happened. A few microseconds on a caller's thread.

Nodes only hold references; they are rendered, redacted and shipped by the courier's thread.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Final

import dspy

from dspy_prod.context import SETTING, CallContext, current
from dspy_prod.pipeline.routes import Route
from dspy_prod.records import CallRecord
from dspy_prod.tracking.courier import Attempted, Courier, Ended

PROGRAM: Final = "CHAIN"
LM: Final = "CHAT_MODEL"


class LeanNode:
    """One open call of a program or an LM.

    Attributes:
        trace_id: 32 hex digits. span_id, parent_id: 16 each; a root has no parent.
        live: a span of MLflow's own stands here; only attempts are added beneath it.
    """

    __slots__ = (
        *("attributes", "context", "courier", "ended_ns", "error", "inputs", "kind", "live", "name", "outputs"),
        *("parent_id", "span_id", "started_ns", "trace_id"),
    )

    def __init__(
        self,
        courier: Courier,
        name: str,
        kind: str,
        inputs: Any,
        context: CallContext,
        ids: tuple[str, str, str | None],
        live: bool = False,
    ) -> None:
        self.courier = courier
        self.name = name
        self.kind = kind
        self.inputs = inputs
        self.outputs: Any = None
        self.attributes: dict[str, Any] = {}
        self.context = context
        self.error: BaseException | None = None
        self.trace_id, self.span_id, self.parent_id = ids
        self.live = live
        self.started_ns = time.time_ns()
        self.ended_ns = 0

    def answered(self, outputs: Any, **attributes: Any) -> None:
        """See `tap.Node`."""
        self.outputs = outputs
        if attributes:
            self.attributes = attributes

    def attempt(self, record: CallRecord, route: Route, request: Any, response: Any) -> None:
        """See `tap.Node`."""
        breaker = route.breaker
        self.courier.post(Attempted(self, record, route, response, None if breaker is None else breaker.state))


class Recorder:
    """The tap.

    Args:
        courier: what ships.
    """

    def __init__(self, courier: Courier) -> None:
        self.courier = courier

    def program_call(self, name: str, inputs: dict[str, Any]) -> _Scope:
        """See `tap.Tap`."""
        return _Scope(self, name, PROGRAM, inputs)

    def lm_call(self, name: str, inputs: dict[str, Any]) -> _Scope:
        """See `tap.Tap`."""
        return _Scope(self, name, LM, inputs)

    def open(self, name: str, kind: str, inputs: dict[str, Any]) -> LeanNode | None:
        """A node for a call that begins here; None when too many wait to be shipped already."""
        context = current()
        live = active_span()
        if live is not None:
            ids = live.trace_id.removeprefix("tr-"), live.span_id, live.parent_id
            return LeanNode(self.courier, name, kind, None, context, ids, live=True)
        outer = context.node
        digits = os.urandom(24).hex()
        if isinstance(outer, LeanNode) and outer.courier is self.courier:
            return LeanNode(self.courier, name, kind, inputs, context, (outer.trace_id, digits[32:], outer.span_id))
        if not self.courier.admits():
            return None
        return LeanNode(self.courier, name, kind, inputs, context, (digits[:32], digits[32:], None))


class _Scope:
    """Opens a node, puts it in force, and posts its end."""

    __slots__ = ("_inner", "_inputs", "_kind", "_name", "_node", "_recorder")

    def __init__(self, recorder: Recorder, name: str, kind: str, inputs: dict[str, Any]) -> None:
        self._recorder = recorder
        self._name = name
        self._kind = kind
        self._inputs = inputs

    def __enter__(self) -> LeanNode | None:
        node = self._node = self._recorder.open(self._name, self._kind, self._inputs)
        context = current()
        trace_id = context.trace_id if node is None else context.trace_id or f"tr-{node.trace_id}"
        self._inner = dspy.context(**{SETTING: context._replace(node=node, trace_id=trace_id)})
        self._inner.__enter__()
        return node

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._inner.__exit__(kind, error, traceback)
        except ValueError:  # a coroutine that was never finished is collected in somebody else's context
            pass
        node = self._node
        if node is not None:
            node.ended_ns = time.time_ns()
            node.error = error
            node.courier.post(Ended(node))


def active_span() -> Any:
    """The span of MLflow's that is being recorded here, None without one. Does not import MLflow."""
    provider = sys.modules.get("mlflow.tracing.provider")
    fluent = sys.modules.get("mlflow.tracing.fluent")
    if provider is None or fluent is None:
        return None
    span = fluent.get_current_active_span()
    if span is None or not str(getattr(span, "trace_id", "")).startswith("tr-"):
        return None
    return span
