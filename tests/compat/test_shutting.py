"""What is read of an answer can be ended from outside, as long as it is being read."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from dspy_prod.compat.httpx_reading import bound
from dspy_prod.compat.stay import Stay

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(5)
    with ours, theirs:
        yield ours, theirs


class Body(httpx.SyncByteStream):
    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire

    def __iter__(self) -> Iterator[bytes]:
        while data := self._wire.recv(100):
            yield data


class Wire:
    """httpcore's stream of a connection."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self._wire if name == "socket" else None


def answer(wire: socket.socket, stay: Stay, version: bytes = b"HTTP/1.1") -> httpx.Response:
    response = httpx.Response(
        200, stream=Body(wire), extensions={"http_version": version, "network_stream": Wire(wire)}
    )
    bound(response, stay)
    return response


def test_who_reads_an_answer_that_is_dropped_hears_so_at_once(pair: Pair) -> None:
    """It waits in another thread, which nothing else wakes."""
    stay, read = Stay(), threading.Event()
    response = answer(pair[0], stay)
    got: list[bytes] = []

    def reads() -> None:
        for data in response.iter_raw():
            got.append(data)
            read.set()

    reader = threading.Thread(target=reads, daemon=True)
    reader.start()
    pair[1].sendall(b"a word")
    assert read.wait(5)
    stay.drop()
    reader.join(4)  # its own time-out comes after five seconds
    assert not reader.is_alive()
    assert got == [b"a word"]


def test_an_answer_that_comes_to_who_has_dropped_it_is_not_read(pair: Pair) -> None:
    """Its reader left before the first line of it had come."""
    stay = Stay()
    stay.drop()
    assert list(answer(pair[0], stay).iter_raw()) == []


def open_still(pair: Pair) -> bool:
    pair[0].sendall(b"a question")
    pair[1].sendall(b"an answer")
    return (pair[1].recv(100), pair[0].recv(100)) == (b"a question", b"an answer")


def test_the_connection_of_an_answer_that_was_read_is_the_next_one_s(pair: Pair) -> None:
    """It has gone back to the pool: shut, it would break another call's request."""
    stay = Stay()
    answer(pair[0], stay).close()
    stay.drop()
    assert open_still(pair)


def test_a_connection_that_others_share_is_left_open(pair: Pair) -> None:
    """Several answers come by one connection of HTTP/2."""
    stay = Stay()
    answer(pair[0], stay, version=b"HTTP/2")
    stay.drop()
    assert open_still(pair)
