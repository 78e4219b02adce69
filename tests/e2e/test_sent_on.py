"""What an answer that points elsewhere says of the question: that nobody has worked on it, or that it was taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from dspy.utils.exceptions import LMError

from dspy_prod import Budget, Embedder, Price, RateLimit, RateLimitedError
from tests.e2e.support import MODEL, fresh_memory, make_lm
from tests.e2e.test_deadline import ENGINES, WAYS, Way
from tests.e2e.test_unreached import ask, booked
from tests.listening import Listening, Silent


class Sender(Listening):
    """Sends on whatever it is asked, and may be gone when somebody comes there."""

    def __init__(self, status: int, location: str = "/v1/there", leaves: bool = False) -> None:
        self.posts = 0
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                outer.posts += 1
                self.rfile.read(int(self.headers.get("content-length", 0)))
                if leaves:
                    outer.deafen()
                self.send_response(status)
                self.send_header("location", location)
                self.send_header("content-length", "2")
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST

        super().__init__(Handler)

    def deafen(self) -> None:
        """Have nobody reach it any more."""
        self._server.shutdown()
        self._server.socket.close()


MakeSender = Callable[..., Sender]


@pytest.fixture
def sender() -> Iterator[MakeSender]:
    started: list[Sender] = []

    def start(*args: Any, **options: Any) -> Sender:
        started.append(Sender(*args, **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [307, 308])
def test_an_address_that_sends_on_to_nobody_costs_nothing(sender: MakeSender, way: Way, status: int) -> None:
    """LiteLLM follows; what was answered is no answer of a model's, and the second request went nowhere.

    It counts as a request all the same: the first one went out.
    """
    server = sender(status, leaves=True)
    lm = make_lm(
        f"{server.url}/v1", engine="litellm", timeout=30.0, budget=Budget(usd=1, name="all"),
        limit=RateLimit(rpm=1, max_wait=0.01),
    )  # fmt: skip
    assert isinstance(ask(lm, way), LMError)
    assert booked(lm) == [("error", 0.0, False)]
    assert isinstance(ask(lm, way), RateLimitedError)
    lm.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [301, 302, 303])
def test_an_answer_that_is_elsewhere_where_nobody_is_costs_its_bound(sender: MakeSender, way: Way, status: int) -> None:
    """With a 303 the question was taken, and may have been worked on: it is not asked again there, but its answer is
    fetched. httpx makes the same of a 301 and a 302."""
    lm = make_lm(
        f"{sender(status, leaves=True).url}/v1", engine="litellm", timeout=30.0, budget=Budget(usd=1, name="all")
    )
    assert isinstance(ask(lm, way), LMError)
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("error", True)
    assert cost > 0
    lm.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_is_on_another_server_costs_its_bound(sender: MakeSender, engine: str, way: Way) -> None:
    """Nobody goes there with a key, and the question was taken."""
    server = sender(303, "http://elsewhere.invalid/")
    lm = make_lm(f"{server.url}/v1", engine=engine, timeout=30.0, budget=Budget(usd=1, name="all"))
    assert isinstance(ask(lm, way), LMError)
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("error", True)
    assert cost > 0
    lm.close()


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_request_that_is_sent_on_counts_for_its_limit(
    sender: MakeSender, monkeypatch: pytest.MonkeyPatch, way: Way, follows: bool
) -> None:
    """Twenty went out where five are allowed: each was taken for one that had not, and given back."""
    import litellm

    server = sender(307)
    lm = make_lm(f"{server.url}/v1", engine="litellm", timeout=30.0, limit=RateLimit(rpm=3, burst=3, max_wait=0.01))
    if not follows:  # as httpx's own clients do not
        monkeypatch.setattr(litellm, "client_session", httpx.Client())
        monkeypatch.setattr(litellm, "aclient_session", httpx.AsyncClient())
    ended = [type(ask(lm, way)) for _ in range(6)]
    assert ended.count(RateLimitedError) == 3
    if not follows:
        assert server.posts == 3
    assert [record.cost_usd for record in lm.ledger.records() if record.outcome != "refused"] == [0.0] * 3
    lm.close()


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("status", [200, 504])
def test_an_answer_that_no_transport_has_told_of_was_sent_for(
    monkeypatch: pytest.MonkeyPatch, way: Way, status: int
) -> None:
    """Where a transport's method is replaced, as recorders do: nothing was heard on the way, but an answer came."""
    import litellm

    def answers(_: Any, asked: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=b"<html>no answer", request=asked)

    async def aanswers(_: Any, asked: httpx.Request) -> httpx.Response:
        return answers(_, asked)

    monkeypatch.setattr(litellm, "disable_aiohttp_transport", True)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answers)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", aanswers)
    lm = make_lm("http://127.0.0.1:9/v1", engine="litellm", timeout=30.0, budget=Budget(usd=1, name="all"))
    assert isinstance(ask(lm, way), LMError)
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("error" if status == 200 else "timeout", True)
    assert cost > 0
    lm.close()


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(("status", "owed"), [(307, False), (303, True)])
def test_texts_for_vectors_that_are_sent_on_are_no_others(
    sender: MakeSender, way: str, status: int, owed: bool
) -> None:
    """An embedder has the same flow and an engine of its own."""
    embedder = Embedder(
        MODEL, api_base=f"{sender(status, leaves=True).url}/v1", api_key="test", timeout=30.0, retry=False,
        caching=False, prices={MODEL: Price(input=1, output=0)}, budget=Budget(usd=1, name="all"), store=fresh_memory(),
    )  # fmt: skip
    with pytest.raises(LMError):
        embedder(["hello"]) if way == "sync" else asyncio.run(embedder.acall(["hello"]))
    [(outcome, cost, estimated)] = booked(embedder)
    assert (outcome, cost > 0, estimated) == ("error", owed, owed)
    embedder.close()
