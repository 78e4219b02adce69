"""Real MLflow stores behind the tracking: a SQLite file per test, written by the real exporter process."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace

from dspy_prod import tracking
from tests.e2e.conftest import connect, serve, sqlite_url, store_url

__all__ = ["connect", "serve", "sqlite_url", "store_url"]

EXPERIMENT = "tracked"


@pytest.fixture
def database(schema: Path, tmp_path: Path) -> Path:
    """The file of a fresh MLflow store."""
    return Path(shutil.copy(schema, tmp_path / "mlflow.db"))


@pytest.fixture
def uri(database: Path) -> str:
    """Its tracking URI."""
    return f"sqlite:///{database}"


@pytest.fixture
def track(uri: str, quick_exporters: None) -> Iterator[Callable[..., None]]:
    """Turn tracking on for one test."""

    def on(**options: Any) -> None:
        tracking.enable(**{"experiment_name": EXPERIMENT, "tracking_uri": uri, "content": "full", **options})

    yield on
    tracking.disable()
    if "mlflow.dspy" in __import__("sys").modules:
        import mlflow.dspy

        mlflow.dspy.autolog(disable=True)


def traces_in(uri: str, experiment: str = EXPERIMENT) -> list[Trace]:
    """Every trace in MLflow's experiment."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    traces: list[Trace] = []
    token = None
    while True:
        page = client.search_traces(locations=[found.experiment_id], max_results=200, page_token=token)
        traces += page
        token = page.token
        if not token:
            return traces


def costs_of(records: list[Any]) -> dict[str, float]:
    """The ledger's cost of each trace, in USD."""
    sums: dict[str, int] = defaultdict(int)
    for record in records:
        assert record.trace_id is not None
        sums[record.trace_id] += record.cost_nano or 0
    return {trace_id: nano / 1e9 for trace_id, nano in sums.items()}


def assert_same_costs(uri: str, records: list[Any]) -> None:
    """Every trace in MLflow costs what the ledger says, and every one in the ledger is in MLflow."""
    ledger = costs_of(records)
    shown = {trace.info.trace_id: (trace.info.cost or {}).get("total_cost", 0.0) for trace in traces_in(uri)}
    assert set(ledger) <= set(shown)
    assert {trace_id: pytest.approx(cost, abs=1e-9) for trace_id, cost in ledger.items()} == {
        trace_id: shown[trace_id] for trace_id in ledger
    }
