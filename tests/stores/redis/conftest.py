"""A namespace of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_prod.stores.redis.connection import Connection
from tests.stores.redis.standin import Served


@pytest.fixture
def connection(valkey: str) -> Iterator[Connection]:
    """A namespace that nobody else uses."""
    connection = Connection(valkey, f"test-{uuid.uuid4().hex}")
    yield connection
    connection.close()


@pytest.fixture
def namespace() -> str:
    """One that nobody else uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def open_served(valkey: str, namespace: str) -> Iterator[Callable[..., Served]]:
    """Make stores on one namespace; all are closed at the end."""
    made: list[Served] = []

    def make(**options: Any) -> Served:
        made.append(Served(Connection(valkey, namespace), **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def served(open_served: Callable[..., Served]) -> Served:
    """A store of programs, runs and experiments on the system's clock."""
    return open_served()
