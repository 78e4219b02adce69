"""The stores under test, and a clock that stands still."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.redis.servers import started_valkey
from tests.stores.support import FakeClock

MakeStore = Callable[..., Store]


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """The URL of a Valkey of this worker process."""
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Make a store of the kind under test; all are closed at the end."""
    made: list[Store] = []
    own = uuid.uuid4().hex

    def make(namespace: str = "test", clock: Clock = SYSTEM_CLOCK) -> Store:
        store: Store
        if request.param == "memory":
            store = MemoryStore(namespace, clock=clock)
        elif request.param == "redis":
            store = RedisStore(request.getfixturevalue("valkey"), f"{own} {namespace}", clock=clock)
        else:
            store = SqliteStore(str(tmp_path / "state.db"), namespace, clock=clock)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    """A store on the system's clocks."""
    return make_store()


@pytest.fixture
def still(make_store: MakeStore, clock: FakeClock) -> Store:
    """A store on the fake clock."""
    return make_store(clock=clock)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a SQLite store may be made."""
    return str(tmp_path / "state" / "state.db")


@pytest.fixture
def open_sqlite(path: str) -> Iterator[Callable[..., SqliteStore]]:
    """Make SQLite stores on one file; all are closed at the end."""
    made: list[SqliteStore] = []

    def make(**options: Any) -> SqliteStore:
        store = SqliteStore(path, **options)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def sqlite_store(open_sqlite: Callable[..., SqliteStore]) -> SqliteStore:
    """A SQLite store on the system's clocks."""
    return open_sqlite()
