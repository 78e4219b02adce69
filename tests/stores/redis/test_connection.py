"""A connection to Redis."""

from __future__ import annotations

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.redis.connection import Connection


def test_what_was_written_is_read_in_one_round_trip(connection: Connection) -> None:
    """Several commands are one pipeline."""
    key = connection.key("some", "thing")
    assert connection.read([("SET", key, b"1"), ("GET", key)]) == [True, b"1"]


def test_no_two_lots_of_names_make_the_same_key() -> None:
    """Parts are quoted, the namespace too, and all keys of a namespace have one hash tag."""
    one = Connection("redis://127.0.0.1:1/0", "a}b")
    assert one.key("a:b") != one.key("a", "b")
    assert one.key("x").count("}") == 1


def test_a_dead_server_is_told_without_its_password() -> None:
    """The error names the address, and nothing that is secret."""
    dead = Connection("redis://:hunter2@127.0.0.1:1/0", "n")
    with pytest.raises(StoreUnavailableError) as told:
        dead.read([("PING",)])
    assert "hunter2" not in str(told.value)
    assert "127.0.0.1:1" in str(told.value)
