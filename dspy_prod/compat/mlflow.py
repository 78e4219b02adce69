"""MLflow: the processor its spans go through, its traces in memory, and facts it keeps to itself.

MLflow is optional: it is imported when one of these is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final
from uuid import uuid4

from dspy_prod.compat.foreign import names

EXPERIMENTS: Final = "_mlflow_experiment_ids"
"""The tag by which MLflow's pages list a prompt under its experiments: `,1,2,`."""


_PLACED: Final = "_dspy_prod_placed"


def absolute(uri: str) -> str:
    """A tracking URI in the form that can be compared: a file by its whole path, a server without a slash at its end.

    MLflow keeps the URI as `set_tracking_uri` was given it.
    """
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    scheme, _, place = uri.partition("sqlite:///")
    path, mark, query = place.partition("?")
    if scheme or not path or path.startswith(":memory:"):
        return uri
    return f"sqlite:///{os.path.abspath(path)}{mark}{query}"


def _is_current(uri: str) -> bool:
    """Whether MLflow, which is imported, writes to the store at this `absolute` URI."""
    current: str = sys.modules["mlflow"].get_tracking_uri()
    return current == uri or absolute(current) == uri


def place_of(info: Any, uri: str) -> str | None:
    """The experiment into which the code around a trace has put it, in the store at an `absolute` URI: by the
    destination of the trace or an active run. None when only the defaults say where."""
    return str(info.experiment_id) if getattr(info, _PLACED, False) and _is_current(uri) else None


def place_here(uri: str) -> tuple[str | None, str | None]:
    """(experiment, run) into which MLflow would put a trace that begins here, as `place_of`. Does not import MLflow."""
    fluent = sys.modules.get("mlflow.tracking.fluent")
    provider = sys.modules.get("mlflow.tracing.provider")
    latest_run = getattr(fluent, "_get_latest_active_run", None)
    destination = getattr(provider, "_MLFLOW_TRACE_USER_DESTINATION", None)
    run: Any = None if latest_run is None else latest_run()
    chosen = None if destination is None else getattr(destination.get(), "experiment_id", None)
    if (run is None and chosen is None) or not _is_current(uri):
        return None, None
    return (chosen, None) if run is None else (chosen or run.info.experiment_id, run.info.run_id)


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
    base, _ = names("mlflow.tracing.processor.mlflow_v3", "MlflowV3SpanProcessor", "MlflowV3SpanProcessor._start_trace")
    [keys] = names("mlflow.tracing.constant", "SpanAttributeKey")
    [latest_run] = names("mlflow.tracking.fluent", "_get_latest_active_run")

    class Processor(base):
        def _start_trace(self, root_span: Any) -> Any:
            placed = keys.EXPERIMENT_ID in (root_span.attributes or {}) or destination.get() or latest_run()
            if not placed and not chosen_experiment():
                root_span.set_attribute(keys.EXPERIMENT_ID, '"0"')
            info = super()._start_trace(root_span)
            setattr(info, _PLACED, bool(placed))
            return info

    return Processor


_APART: Final = "dspy_prod_apart"
"""The DSPy setting that says so: settings reach the threads of an evaluation, context variables do not."""


class _Config(dict[str, Any]):
    """Autologging's settings for DSPy; in a context that is kept apart, as if no runs were to be logged."""

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, which is how MLflow asks."""
        from dspy_prod.compat.dspy import settings  # not above: the process that writes traces has no need of DSPy

        found = super().get(key, default)
        if key not in _CHANGED or not settings()[0].get(_APART):
            return found
        if key == "log_traces":  # the patches, which are off, would have kept a compile's traces out, unless told
            return found and super().get("log_traces_from_compile", False)
        return key == "disable"  # the patches then pass calls on as they are


_CHANGED: Final = ("disable", "log_compiles", "log_evals", "log_traces")


@contextmanager
def apart_from_autolog() -> Iterator[None]:
    """Within it, and in what it starts, `mlflow.dspy.autolog` makes no runs of compiles and evaluations of its own.

    Traces of a compile are kept as `log_traces_from_compile` says. Other threads, and everything afterwards, are as
    they were. Nothing happens where autologging is not on; MLflow is not imported.
    """
    integrations = getattr(sys.modules.get("mlflow.utils.autologging_utils"), "AUTOLOGGING_INTEGRATIONS", None)
    if integrations is None:
        yield
        return
    found = integrations.get("dspy")
    if type(found) is dict:
        integrations["dspy"] = _Config(found)  # stays: wherever nobody is apart, it says what `autolog` was told
    import dspy

    with dspy.context(**{_APART: True}):
        yield


def link_together(store: Any, links: Iterable[tuple[str, str]]) -> bool:
    """Link traces to prompt versions in one transaction; MLflow's own way is one for each trace.

    Args:
        store: MLflow's tracking store. links: (`tr-...`, `name/version`) each.

    Returns:
        False when the store is no database that this process opens itself, or this MLflow is built otherwise.
    """
    if not hasattr(store, "ManagedSessionMaker"):
        return False
    try:
        [model] = names("mlflow.store.tracking.dbmodels.models", "SqlEntityAssociation")
        [kinds] = names("mlflow.entities.entity_type", "EntityAssociationType")
        trace, prompt = kinds.TRACE, kinds.PROMPT_VERSION
        columns = model.source_id, model.destination_id, model.source_type, model.destination_type
    except (ImportError, AttributeError):
        return False
    wanted = list(dict.fromkeys(links))
    with store.ManagedSessionMaker(read_only=False) as session:
        found = session.query(*columns[:2]).filter(
            columns[0].in_({source for source, _ in wanted}), columns[2] == trace, columns[3] == prompt
        )
        there = {(str(source), str(destination)) for source, destination in found}
        session.add_all(
            model(
                association_id=uuid4().hex, source_type=trace, source_id=source, destination_type=prompt,
                destination_id=destination,
            )
            for source, destination in wanted
            if (source, destination) not in there
        )  # fmt: skip
    return True
