"""Beside `mlflow.dspy.autolog()`: MLflow goes on to record its spans, and hands finished traces to the courier.

MLflow's own exporter would write them from threads of this process, resolve the experiment on the first call (which
hangs when the server is down), and let the total cost of a trace depend on which of its threads comes first. The
bridge puts an OpenTelemetry exporter of ours into the processor that MLflow makes. Attempts are not recorded as live
spans; the courier adds them, with their cost, when the trace is complete.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dspy_prod.tracking.courier import Courier, Foreign

_log = logging.getLogger("dspy_prod")


def install(courier: Courier) -> Callable[[], None] | None:
    """Take over what MLflow exports; returns a function that gives it back, or None if this MLflow is built otherwise.

    MLflow must be imported.
    """
    import mlflow
    from mlflow.entities.trace_location import MlflowExperimentLocation
    from mlflow.tracing import provider

    make = getattr(provider, "_get_mlflow_span_processor", None)
    if make is None:
        _log.warning("This version of MLflow cannot be bridged; its autologging exports by itself, costs follow")
        return None

    def bridged(tracking_uri: str) -> Any:
        from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor

        return MlflowV3SpanProcessor(span_exporter=_exporter(courier), export_metrics=False)

    before = provider._MLFLOW_TRACE_USER_DESTINATION.get()
    provider._get_mlflow_span_processor = bridged
    if before is None:  # where it really goes is the exporter process's business; this only keeps MLflow from asking
        mlflow.tracing.set_destination(MlflowExperimentLocation("0"))
    else:
        _reset()
        mlflow.tracing.set_destination(before)

    def remove() -> None:
        provider._get_mlflow_span_processor = make
        _reset()
        if before is not None:
            mlflow.tracing.set_destination(before)

    return remove


def _reset() -> None:
    """Have MLflow make its processors anew."""
    import mlflow.tracing

    reset: Callable[[], None] = mlflow.tracing.reset
    reset()


def mlflow_is_there() -> bool:
    """Whether the program has imported MLflow."""
    return "mlflow" in sys.modules


def _exporter(courier: Courier) -> Any:
    """An OpenTelemetry span exporter that posts traces whose root and spans have all ended."""
    from mlflow.tracing.trace_manager import InMemoryTraceManager
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    traces: Callable[[], Any] = InMemoryTraceManager.get_instance

    class Exporter(SpanExporter):
        def __init__(self) -> None:
            self._roots: dict[int, None] = {}  # ended, while spans of other threads beneath them have not
            self._lock = threading.Lock()

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            manager: Any = traces()
            with self._lock:
                for span in spans:
                    if span.parent is None and span.context is not None:
                        self._roots[span.context.trace_id] = None
                done = [trace_id for trace_id in self._roots if not manager.has_open_spans(trace_id)]
                for trace_id in done:
                    del self._roots[trace_id]
            for trace_id in done:
                self._hand_over(manager.pop_trace(trace_id))
            return SpanExportResult.SUCCESS

        def _hand_over(self, found: Any) -> None:
            if found is not None and courier.admits():
                courier.post(Foreign(found.trace))

        def shutdown(self) -> None:
            """Nothing of its own is open."""

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return courier.flush(timeout_millis / 1000)

    return Exporter()
