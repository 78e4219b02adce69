"""MLflow: the processor its spans go through, its traces in memory, and facts it keeps to itself.

MLflow is optional: it is imported when one of these is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from dspy_prod.compat.foreign import names

EXPERIMENTS: Final = "_mlflow_experiment_ids"
"""The tag by which MLflow's pages list a prompt under its experiments: `,1,2,`."""


def newest_schema() -> str | None:
    """The version of the tables of a new SQLite store; None where MLflow does not say."""
    try:
        [newest] = names("mlflow.store.db.utils", "_get_latest_schema_revision")
    except ImportError:
        return None
    return str(newest())


def chosen_experiment() -> Any:
    """The experiment that `mlflow.set_experiment` has chosen in this process; None when none was."""
    from mlflow.tracking import fluent

    return getattr(fluent, "_active_experiment_id", None)


def flush_queue(exporter: Any, terminate: bool) -> None:
    """Wait for what an exporter of MLflow's sends in the background."""
    queue = getattr(exporter, "_async_queue", None)
    if queue is not None:
        queue.flush(terminate=terminate)


def put_exporter(around: Callable[[Any, Any, Callable[..., Any]], Any]) -> Callable[[], None]:
    """Have MLflow's spans exported by another OpenTelemetry exporter; returns a function that undoes it.

    The processor before it does not ask the server for an experiment that nobody has set.

    Args:
        around: gives the exporter, which has `flush(terminate)` besides, when it is given what makes MLflow's own
            (and opens the store of the tracking URI in force, or creates or migrates it), the keeper of traces whose
            spans have not all ended, and what tells whether `mlflow.genai.evaluate` waits for a trace.

    Raises:
        ImportError: this MLflow is built otherwise.
    """
    provider = import_module("mlflow.tracing.provider")
    make, destination = names(provider.__name__, "_get_mlflow_span_processor", "_MLFLOW_TRACE_USER_DESTINATION")
    reset, set_destination = names("mlflow.tracing", "reset", "set_destination")
    [keeper, *_] = names(
        "mlflow.tracing.trace_manager",
        "InMemoryTraceManager",
        "InMemoryTraceManager.has_open_spans",
        "InMemoryTraceManager.pop_trace",
        "InMemoryTraceManager.get_mlflow_trace_id_from_otel_id",
    )
    [request_id] = names("mlflow.tracing.utils", "maybe_get_request_id")
    processor = _processor(destination)

    def put(maker: Any) -> None:
        provider._get_mlflow_span_processor = maker  # type: ignore[attr-defined]
        chosen = destination.get()
        reset()  # processors are made anew, for the destination that was set
        if chosen is not None:
            set_destination(chosen)

    def bridged(tracking_uri: str) -> Any:
        exporter = around(lambda: make(tracking_uri).span_exporter, keeper.get_instance, request_id)
        exporter._async_queue = exporter  # what MLflow flushes
        return processor(span_exporter=exporter, export_metrics=False)

    put(bridged)
    return lambda: put(make)


def _processor(destination: Any) -> Any:
    base: Any
    [base] = names("mlflow.tracing.processor.mlflow_v3", "MlflowV3SpanProcessor")
    [keys] = names("mlflow.tracing.constant", "SpanAttributeKey")
    [latest_run] = names("mlflow.tracking.fluent", "_get_latest_active_run")

    class Processor(base):
        def _start_trace(self, root_span: Any) -> Any:
            known = chosen_experiment(), destination.get(), latest_run()
            if not any(known) and keys.EXPERIMENT_ID not in (root_span.attributes or {}):
                root_span.set_attribute(keys.EXPERIMENT_ID, '"0"')
            return super()._start_trace(root_span)

    return Processor
