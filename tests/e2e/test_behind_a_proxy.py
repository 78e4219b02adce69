"""Behind a proxy that finds no way to the model, nothing was sent to any: what was said to the proxy is no question.

The bound of each attempt was charged.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from dspy.utils.exceptions import LMError

from dspy_prod import Budget, Embedder, Price
from tests.e2e.support import MODEL, assert_nothing_held, fresh_memory, make_lm
from tests.e2e.test_deadline import ENGINES, WAYS, Way, _warm  # noqa: F401  (a fixture)
from tests.e2e.test_unreached import SHORT, ask, booked

HOSTS = (f"model-{number}.invalid" for number in itertools.count())
"""A new one for each test: LiteLLM keeps its clients by address, each with the proxy of its time."""
DENIED = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
OPENED = b"HTTP/1.1 200 Connection established\r\n\r\n"
ANSWERS = {"refuses": DENIED, "is silent": None, "leaves": b"", "opens and is silent": OPENED}


class Proxy:
    """Hears one request from each who comes, answers with `says` (None: never), and closes but for `OPENED`."""

    def __init__(self, says: bytes | None) -> None:
        self.heard: list[bytes] = []
        self.says = says
        self.over = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listening.accept()[0],), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self.heard.append(connection.recv(1 << 16).partition(b" ")[0])
            if self.says is not None:
                connection.sendall(self.says)
            if self.says in (None, OPENED):
                self.over.wait(20)

    def stop(self) -> None:
        self.over.set()
        self._listening.close()


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Proxy]]:
    """Put all that goes out by TLS behind a proxy that does this."""
    started: list[Proxy] = []

    def start(does: str) -> Proxy:
        started.append(Proxy(ANSWERS[does]))
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, started[-1].url)
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("does", ANSWERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_got_no_further_than_a_proxy_costs_nothing(
    behind: Callable[[str], Proxy], engine: str, way: Way, does: str
) -> None:
    """Also where the way was opened, and nobody at its end spoke TLS."""
    proxy = behind(does)
    lm = make_lm(
        f"https://{next(HOSTS)}/v1", engine=engine, timeout=SHORT if "silent" in does else 20.0,
        budget=Budget(usd=1, name="all"),
    )  # fmt: skip
    assert isinstance(ask(lm, way), LMError)
    assert [cost for _, *cost in booked(lm)] == [[0.0, False]]
    assert set(proxy.heard) == {b"CONNECT"}
    assert_nothing_held(lm.pipeline.store)
    lm.close()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["sync", "async"])
def test_texts_for_vectors_that_got_no_further_cost_nothing(behind: Callable[[str], Proxy], way: str) -> None:
    """An embedder has the same flow and an engine of its own."""
    proxy = behind("refuses")
    embedder: Any = Embedder(
        MODEL, api_base=f"https://{next(HOSTS)}/v1", api_key="test", timeout=20.0, retry=False, caching=False,
        prices={MODEL: Price(input=1, output=0)}, budget=Budget(usd=1, name="all"), store=fresh_memory(),
    )  # fmt: skip
    with pytest.raises(LMError):
        embedder(["hello"]) if way == "sync" else asyncio.run(embedder.acall(["hello"]))
    assert [cost for _, *cost in booked(embedder)] == [[0.0, False]]
    assert set(proxy.heard) == {b"CONNECT"}
    embedder.close()
