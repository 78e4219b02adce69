"""A connection to Redis."""

from __future__ import annotations

import gc
import socketserver
import threading
from collections.abc import Iterator

import pytest
import redis

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.redis.connection import HOPS, Connection
from tests.stores.support import until


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


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (redis.exceptions.MovedError("5 127.0.0.1:7001"), "one of a Redis Cluster"),
        (redis.exceptions.ClusterDownError("Hash slot not served"), "one of a Redis Cluster"),
        (redis.exceptions.TryAgainError("Multiple keys request during rehashing of slot"), "that passes"),
        (redis.ResponseError("SELECT is not allowed in cluster mode"), "no database but 0"),
        (redis.ResponseError("DB index is out of range"), "no database of that number"),
        (redis.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), "ssl_ca_certs="),
        (redis.exceptions.NoPermissionError("has no permissions to run"), "the guide on fleets"),
        (redis.ConnectionError("Error 111"), "check that the server runs"),
    ],
)
def test_an_error_says_what_to_do(said: Exception, remedy: str) -> None:
    """What it names (keys, addresses, users) is not repeated."""
    told = str(Connection("redis://127.0.0.1:1/0", "n").unavailable(said))
    assert remedy in told
    assert "7001" not in told
    assert "permissions to run" not in told


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Nothing is closed only because it was found to be garbage."""
    gc.disable()
    yield
    gc.enable()


def test_nodes_that_send_each_other_whoever_asks_are_not_asked_for_ever(no_collection: None) -> None:
    """As in a cluster whose nodes do not agree; the error says so, and no connection is left open."""
    asked: list[bytes] = []
    opened: list[None] = []
    ended: list[None] = []

    class Sending(socketserver.StreamRequestHandler):
        def finish(self) -> None:
            super().finish()
            ended.append(None)

        def handle(self) -> None:
            opened.append(None)
            while line := self.rfile.readline():
                word = line.strip().upper()
                if word == b"GET":
                    asked.append(word)
                    self.wfile.write(f"-MOVED 5 :{self.server.server_address[1]}\r\n".encode())
                elif word in (b"PING", b"SETINFO", b"HELLO"):
                    self.wfile.write(b"+PONG\r\n" if word == b"PING" else b"+OK\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Sending) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = Connection(f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2", "n")
        with pytest.raises(StoreUnavailableError, match="nodes do not agree"):
            one.read([("GET", one.key("meta"))])
        one.close()
        until(lambda: len(ended) == len(opened), 10, "all connections are closed")
        server.shutdown()
    assert len(asked) == HOPS + 1
