"""The tap of tracking: it opens a node per call and posts what happened. A few microseconds on a caller's thread.

Nodes only hold references; they are rendered, redacted and shipped by the courier's thread.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Final

import dspy

from dspy_prod.compat.dspy import thread_local_overrides
from dspy_prod.compat.mlflow import place_here
from dspy_prod.context.current import SETTING, current
from dspy_prod.telemetry.tap import NOTHING, Nothing
from dspy_prod.tracking.calls import LeanNode
from dspy_prod.tracking.courier import Courier

_log = logging.getLogger("dspy_prod")

PROGRAM: Final = "CHAIN"
LM: Final = "CHAT_MODEL"
EMBEDDING: Final = "EMBEDDING"


class Recorder:
    """The tap.

    Args:
        courier: what ships.
        timeout: seconds a flush may take.
        uri: where MLflow is.
    """

    def __init__(self, courier: Courier, timeout: float, uri: str) -> None:
        self._uri = uri
        self.courier = courier
        self._timeout = timeout

    def flush(self) -> bool:
        return self.courier.flush(self._timeout, patiently=False)

    def program_call(self, name: str, inputs: dict[str, Any]) -> _Scope:
        return _Scope(self, name, PROGRAM, inputs)

    def lm_call(self, name: str, inputs: dict[str, Any]) -> _Scope:
        return _Scope(self, name, LM, inputs)

    def embedding_call(self, name: str, inputs: dict[str, Any]) -> _Scope:
        return _Scope(self, name, EMBEDDING, inputs)

    def open(self, name: str, kind: str, inputs: dict[str, Any]) -> LeanNode | Nothing:
        """A node for a call that begins here; `NOTHING` when too many wait to be shipped already."""
        context = current()
        outer = context.node
        if isinstance(outer, Nothing):  # the trace was turned away as a whole
            return outer
        callers = thread_local_overrides.get().get("caller_modules")
        live = active_span()
        if live is not None:
            if not self.courier.has_room():
                return NOTHING
            self.courier.expect(live.trace_id)
            trace_id, its = live.trace_id.removeprefix("tr-"), live.span_id
            ids = trace_id, its, live.parent_id
            return LeanNode(self.courier, name, kind, None, context, *ids, live=True, callers=callers)
        program = subject = None
        if kind != PROGRAM:
            if isinstance(outer, LeanNode):
                program = outer.program
        elif callers:
            program = callers[-1]
            subject = getattr(program, "program", None)
        digits = os.urandom(24).hex()
        trace_id, parent_id = digits[:32], None
        place: tuple[str | None, str | None] = (None, None)
        if isinstance(outer, LeanNode) and not outer.live and outer.courier is self.courier:
            trace_id, parent_id = outer.trace_id, outer.span_id
        elif not self.courier.admits():
            return NOTHING
        elif "mlflow" in sys.modules:
            place = place_here(self._uri)
        kept = {given: _copied(value) for given, value in inputs.items()}
        return LeanNode(
            self.courier, name, kind, kept, context, trace_id, digits[32:], parent_id,
            place=place, callers=callers, program=program, subject=subject,
        )  # fmt: skip


def _copied(value: Any) -> Any:
    """An input as it is now: the history of a chat grows in the caller's own list."""
    if isinstance(value, list):
        return [dict(item) if type(item) is dict else item for item in value]
    return dict(value) if type(value) is dict else value


class _Scope:
    """Opens a node, puts it in force, and posts its end."""

    __slots__ = ("_inner", "_inputs", "_kind", "_name", "_node", "_recorder")

    def __init__(self, recorder: Recorder, name: str, kind: str, inputs: dict[str, Any]) -> None:
        self._recorder = recorder
        self._name = name
        self._kind = kind
        self._inputs = inputs

    def __enter__(self) -> LeanNode | Nothing:
        context = current()
        try:
            node = self._recorder.open(self._name, self._kind, self._inputs)
        except Exception:  # whatever it is: a call is never failed by its tracking
            _log.debug("A trace could not be begun", exc_info=True)
            node = NOTHING
        self._node = node
        trace_id, outer = context.trace_id, context.node
        if isinstance(node, LeanNode) and (
            trace_id is None or (isinstance(outer, LeanNode) and trace_id == f"tr-{outer.trace_id}")
        ):
            trace_id = f"tr-{node.trace_id}"  # else the caller has named the trace
        self._inner = dspy.context(**{SETTING: context._replace(node=node, trace_id=trace_id)})
        self._inner.__enter__()
        return node

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._inner.__exit__(kind, error, traceback)
        except ValueError:  # a coroutine that was never finished is collected in somebody else's context
            pass
        node = self._node
        if isinstance(node, LeanNode):
            node.ended_ns = time.time_ns()
            node.error = error
            node.courier.post(node.courier.traces.ended, node)


def active_span() -> Any:
    """The span of MLflow's that is being recorded here, None without one. Does not import MLflow."""
    find = getattr(sys.modules.get("mlflow.tracing.fluent"), "get_current_active_span", None)
    if find is None:  # or it is being imported by another thread
        return None
    span = find()
    if span is None or not str(getattr(span, "trace_id", "")).startswith("tr-"):
        return None
    return span
