"""Beside `mlflow.dspy.autolog()`: MLflow goes on to record its spans, and hands finished traces to the courier.

MLflow's own exporter would write them from threads of this process, resolve the experiment on the first call (which
hangs when the server is down), and let the total cost of a trace depend on which of its threads comes first. The
bridge puts an OpenTelemetry exporter of ours into the processor that MLflow makes. Attempts are not recorded as live
spans; the courier adds them, with their cost, when the trace is complete.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from dspy_prod.compat.mlflow import flush_queue, place_of, put_exporter
from dspy_prod.tracking.courier import Courier

_log = logging.getLogger("dspy_prod")
_FLUSH_TIMEOUT: Final = 30.0


def install(courier: Courier, uri: str) -> Callable[[], None] | None:
    """Take over the traces of MLflow's that calls of ours belong to; returns a function that gives them back.

    Other traces, and those of `mlflow.genai.evaluate`, which needs them at once, are MLflow's own business. None if
    this MLflow is built otherwise. MLflow must be imported.
    """
    try:
        return put_exporter(lambda *of_mlflow: _exporter(courier, uri, *of_mlflow))
    except ImportError as error:
        _log.warning(
            "This version of MLflow cannot be bridged (%s); its autologging exports by itself, costs follow", error
        )
        return None


def _exporter(
    courier: Courier, uri: str, own: Callable[[], Any], traces: Callable[[], Any], request_id: Callable[..., Any]
) -> Any:
    """An OpenTelemetry span exporter: it posts our traces once all their spans have ended; the rest is MLflow's.

    Args:
        uri: where ours are written.
        own: makes MLflow's exporter. Not before there is something for it: its store may be none of ours to open.
        traces: gives MLflow's traces in memory.
        request_id: what an evaluation, if asked with `is_evaluate`, waits for here.
    """
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Exporter(SpanExporter):
        def __init__(self) -> None:
            self._spans: dict[int, list[ReadableSpan]] = {}  # ended, of traces that have not
            self._roots: set[int] = set()
            self._lock = threading.Lock()
            self._own: Any = None

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
            if not ours or request_id(is_evaluate=True):
                with self._lock:
                    self._own = self._own or own()
                self._own.export(spans)
                if ours:
                    courier.post(courier.traces.delegated, trace_id.removeprefix("tr-"))
                return
            found = manager.pop_trace(number)
            if found is None:
                return
            if courier.admits():
                courier.post(courier.traces.foreign, found.trace, place_of(found.trace.info, uri))
            else:
                courier.post(courier.traces.refused, trace_id.removeprefix("tr-"))

        def flush(self, terminate: bool = False) -> None:
            """Wait for what is on its way, as MLflow's own queue does."""
            courier.flush(_FLUSH_TIMEOUT)
            flush_queue(self._own, terminate)

        def shutdown(self) -> None:
            if self._own is not None:
                self._own.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return courier.flush(timeout_millis / 1000)

    return Exporter()
