"""Real MLflow stores: a SQLite file, a server to kill, and other processes to race with.

Each takes seconds to make and is made once. Every test finds the stores empty.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from mlflow import MlflowClient

import dspy_prod
from tests.conftest import WITH_PROCESSES
from tests.registry.deploying import Bench
from tests.registry.processes import MlflowServer, Nursery, Other, forget


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def quickly(connection: Any, _record: Any) -> None:
    """No test cuts the power, so nobody need wait for the disk."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stores lie."""
    return tmp_path_factory.mktemp("stores")


def emptied(schema: Path, path: Path) -> Path:
    """A store without content. It stays the same file, so that MLflow's connections and compiled queries are kept."""
    with contextlib.closing(sqlite3.connect(schema)) as empty, contextlib.closing(sqlite3.connect(path)) as used:
        empty.backup(used)
    return path


@pytest.fixture
def database(schema: Path, places: Path) -> Path:
    """The file of a fresh MLflow store."""
    return emptied(schema, places / "mlflow.db")


@pytest.fixture
def store(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh MLflow store, which is MLflow's current one; copies are kept below the test's directory."""
    uri = f"sqlite:///{database}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture
def client(store: str) -> MlflowClient:
    """MLflow's own view of the store."""
    return MlflowClient(tracking_uri=store, registry_uri=store)


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """No test finds what another one loaded."""
    forget()
    yield
    forget()


@pytest.fixture
def events() -> Iterator[list[dspy_prod.Event]]:
    """What happened."""
    seen: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(seen.append)
    yield seen
    remove()


@pytest.fixture(scope="session")
def only_server(schema: Path, places: Path) -> Iterator[MlflowServer]:
    """The server of all tests; it may still be starting."""
    only = MlflowServer(emptied(schema, places / "served.db"))
    only.launch()
    yield only
    only.kill()


@pytest.fixture
def server(schema: Path, only_server: MlflowServer) -> Iterator[MlflowServer]:
    """A running server on a fresh store."""
    only_server.start()
    emptied(schema, only_server.database)
    yield only_server
    if only_server.frozen:
        only_server.kill()


@pytest.fixture(scope="session")
def only_others() -> Iterator[tuple[Other, Other]]:
    """The other processes of all tests."""
    pair = Other(), Other()
    yield pair
    for other in pair:
        other.end()


@pytest.fixture
def others(only_others: tuple[Other, Other]) -> Iterator[tuple[Other, Other]]:
    """Two other processes, which share nothing with this one but the stores."""
    yield only_others
    for other in only_others:
        other.rest()


@pytest.fixture(scope="session")
def nursery(schema: Path, places: Path) -> Iterator[Nursery]:
    """Where processes come from."""
    one = Nursery(f"sqlite:///{emptied(schema, places / 'nursery.db')}")
    yield one
    one.close()


@pytest.fixture
def bench(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A place to deploy from."""
    return Bench(tmp_path, store, capsys)


@pytest.fixture(scope="module", autouse=True)
def ahead(request: pytest.FixtureRequest) -> None:
    """Start what some test of this file will need, so that it is ready by then."""
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    wanted = {name for item in mine for name in getattr(item, "fixturenames", ())}
    if wanted & {"server", "others", "nursery"}:
        assert request.path.name in WITH_PROCESSES, f"name {request.path.name} in WITH_PROCESSES of tests/conftest.py"
    for name, slow in (("server", "only_server"), ("others", "only_others"), ("nursery", "nursery")):
        if name in wanted:
            request.getfixturevalue(slow)
