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
from typing import Any, Final

from dspy_prod.tracking.courier import Courier
from dspy_prod.tracking.messages import Delegated, Foreign, Refused

_log = logging.getLogger("dspy_prod")
_FLUSH_TIMEOUT: Final = 30.0


def install(courier: Courier) -> Callable[[], None] | None:
    """Take over the traces of MLflow's that calls of ours belong to; returns a function that gives them back.

    Other traces, and those of `mlflow.genai.evaluate`, which needs them at once, are MLflow's own business. None if
    this MLflow is built otherwise. MLflow must be imported.
    """
    from mlflow.tracing import provider

    make = getattr(provider, "_get_mlflow_span_processor", None)
    if make is None:
        _log.warning("This version of MLflow cannot be bridged; its autologging exports by itself, costs follow")
        return None

    def bridged(tracking_uri: str) -> Any:
        return _processor(_exporter(courier, make(tracking_uri).span_exporter))

    provider._get_mlflow_span_processor = bridged
    _reset()

    def remove() -> None:
        provider._get_mlflow_span_processor = make
        _reset()

    return remove


def mlflow_is_there() -> bool:
    """Whether the program has imported MLflow."""
    return "mlflow" in sys.modules


def _reset() -> None:
    """Have MLflow make its processors anew, for the destination that was set."""
    import mlflow.tracing
    from mlflow.tracing import provider

    destination = provider._MLFLOW_TRACE_USER_DESTINATION.get()
    reset: Callable[[], None] = mlflow.tracing.reset
    reset()
    if destination is not None:
        mlflow.tracing.set_destination(destination)


def _processor(exporter: Any) -> Any:
    """MLflow's span processor, which does not ask the server for an experiment that nobody has set."""
    from mlflow.tracing import provider
    from mlflow.tracing.constant import SpanAttributeKey
    from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
    from mlflow.tracking import fluent

    class Processor(MlflowV3SpanProcessor):
        def _start_trace(self, root_span: Any) -> Any:
            run: Callable[[], Any] = fluent._get_latest_active_run
            known = (
                getattr(fluent, "_active_experiment_id", None),
                provider._MLFLOW_TRACE_USER_DESTINATION.get(),
                run(),
            )
            if not any(known) and SpanAttributeKey.EXPERIMENT_ID not in (root_span.attributes or {}):
                root_span.set_attribute(SpanAttributeKey.EXPERIMENT_ID, '"0"')
            return super()._start_trace(root_span)

    return Processor(span_exporter=exporter, export_metrics=False)


def _exporter(courier: Courier, own: Any) -> Any:
    """An OpenTelemetry span exporter: it posts our traces once all their spans have ended; the rest is MLflow's.

    Args:
        own: MLflow's exporter.
    """
    from mlflow.tracing.trace_manager import InMemoryTraceManager
    from mlflow.tracing.utils import maybe_get_request_id
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    traces: Callable[[], Any] = InMemoryTraceManager.get_instance

    class Exporter(SpanExporter):
        def __init__(self) -> None:
            self._spans: dict[int, list[ReadableSpan]] = {}  # ended, of traces that have not
            self._roots: set[int] = set()
            self._lock = threading.Lock()
            self._async_queue = self  # what MLflow flushes

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            manager: Any = traces()
            with self._lock:
                for span in spans:
                    if span.context is not None:
                        self._spans.setdefault(span.context.trace_id, []).append(span)
                        if span.parent is None:
                            self._roots.add(span.context.trace_id)
                done = [number for number in self._roots if not manager.has_open_spans(number)]
                self._roots.difference_update(done)
                ended = {number: self._spans.pop(number, []) for number in done}
            for number, its_spans in ended.items():
                self._hand_over(manager, number, its_spans)
            return SpanExportResult.SUCCESS

        def _hand_over(self, manager: Any, number: int, spans: list[ReadableSpan]) -> None:
            trace_id = manager.get_mlflow_trace_id_from_otel_id(number)
            ours = trace_id is not None and courier.live.pop(trace_id, 0) is None
            if not ours or maybe_get_request_id(is_evaluate=True):
                own.export(spans)
                if ours:
                    courier.post(Delegated(trace_id.removeprefix("tr-")))
                return
            found = manager.pop_trace(number)
            if found is None:
                return
            if courier.admits():
                courier.post(Foreign(found.trace))
            else:
                courier.post(Refused(trace_id.removeprefix("tr-")))

        def flush(self, terminate: bool = False) -> None:
            """Wait for what is on its way, as MLflow's own queue does."""
            courier.flush(_FLUSH_TIMEOUT)
            queue = getattr(own, "_async_queue", None)
            if queue is not None:
                queue.flush(terminate=terminate)

        def shutdown(self) -> None:
            own.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return courier.flush(timeout_millis / 1000)

    return Exporter()
