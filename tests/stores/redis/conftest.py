"""A namespace of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from dspy_prod.stores.redis.connection import Connection


@pytest.fixture
def connection(valkey: str) -> Iterator[Connection]:
    """A namespace that nobody else uses."""
    connection = Connection(valkey, f"test-{uuid.uuid4().hex}")
    yield connection
    connection.close()
