"""A service that ends writes out what is known, in bounded time, and says from when on it is ending."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import metrics
from starlette.applications import Starlette

import dspy_prod
from dspy_prod import ConfigError
from dspy_prod.asgi import install, lifespan
from dspy_prod.asgi.serving import serving
from dspy_prod.testing import Provider
from tests.e2e.support import PRICES, make_lm, until, upstream
from tests.ports import free_port

ROOT = Path(__file__).parents[2]


async def live(app: Any, meanwhile: Any = None) -> list[str]:
    """Run an application's lifespan as a server does; the kinds of what it sent."""
    sent: list[str] = []
    started, ending = asyncio.Event(), asyncio.Event()
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "lifespan.startup"}
        await ending.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        started.set()

    task = asyncio.create_task(app({"type": "lifespan", "state": {}, "app": app}, receive, send))
    await asyncio.wait_for(started.wait(), 10)
    if meanwhile is not None:
        await meanwhile()
    ending.set()
    await asyncio.wait_for(task, 30)
    return sent


def test_the_ledger_is_written_and_connections_are_closed(tmp_path: Path) -> None:
    """Everything is in the file once the server is told that the end is complete."""
    with Provider() as provider:
        url = f"sqlite:///{tmp_path}/state.db"
        lm = make_lm(provider.url, store=url)

        async def call() -> None:
            await lm.acall("q")

        sent = asyncio.run(live(install(Starlette()), call))
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert lm.pipeline.store.unwritten() == 0
        assert len(upstream(lm)) == 1
        lm.close()


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
def test_a_service_keeps_its_own_lifespan(kind: Any) -> None:
    """It begins after ours and ends before, so what it ends with is still written out; and its state is given on."""
    steps: list[str] = []

    @asynccontextmanager
    async def mine(app: Any) -> AsyncIterator[dict[str, int]]:
        steps.append("begin")
        yield {"number": 1}
        steps.append("end")

    def ours(seconds: float) -> None:
        steps.append("ours" if 0 < seconds <= 5 else f"{seconds} seconds")

    app = install(kind(lifespan=mine), timeout=5.0, flush=[ours])
    asyncio.run(live(app))
    assert steps == ["begin", "end", "ours"]


def test_it_can_stand_within_one_s_own() -> None:
    """And is called as any lifespan is."""
    steps: list[str] = []

    @asynccontextmanager
    async def mine(app: Any) -> AsyncIterator[None]:
        async with lifespan(app, flush=[lambda seconds: steps.append("flushed")]):
            yield

    app = Starlette(lifespan=mine)
    asyncio.run(live(app))
    assert steps == ["flushed"]
    assert serving(app).draining


def test_a_part_that_hangs_or_fails_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Each has the time that is left; what was not done is told."""
    done: list[str] = []

    def hangs(seconds: float) -> None:
        time.sleep(0.8)

    def fails(seconds: float) -> None:
        raise OSError("no such host")

    began = time.monotonic()
    app = install(Starlette(), timeout=0.3, flush=[hangs, fails, lambda seconds: done.append("last")])
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        asyncio.run(live(app))
    assert done == ["last"]
    assert "hangs took longer" in caplog.text
    assert "fails failed: OSError" in caplog.text
    assert time.monotonic() - began < 5


def test_metrics_of_opentelemetry_are_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its SDK is in use, within the seconds that are left."""
    import opentelemetry.sdk.metrics  # noqa: F401

    asked: list[float] = []

    class Meters:
        def force_flush(self, timeout_millis: float) -> bool:
            asked.append(timeout_millis)
            return True

    monkeypatch.setattr(metrics, "get_meter_provider", Meters)
    asyncio.run(live(install(Starlette(), timeout=4.0)))
    assert len(asked) == 1
    assert 0 < asked[0] <= 4_000


def test_requests_in_flight_are_awaited_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """A server that cancels them does so just before, and their calls are still to be settled."""

    async def begin() -> None:
        async def one() -> None:
            with serving(app).one():
                await asyncio.sleep(0.05)
            ends.append(time.monotonic())

        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(0)

    ends: list[float] = []
    tasks: list[Any] = []
    app = install(Starlette(), flush=[lambda seconds: ends.append(time.monotonic())])
    asyncio.run(live(app, begin))
    assert len(ends) == 2
    assert ends == sorted(ends)
    assert "in flight" not in caplog.text


def test_sigterm_is_noted_and_passed_on() -> None:
    """The worker is not ready from then on; the server ends it as it would without us, and has its signal back."""
    heard: list[int] = []
    states: list[bool] = []
    app = install(Starlette())

    async def end() -> None:
        states.append(serving(app).draining)
        signal.raise_signal(signal.SIGTERM)
        states.append(serving(app).draining)

    def server(number: int, frame: Any) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, server)
    try:
        asyncio.run(live(app, end))
        assert signal.getsignal(signal.SIGTERM) is server
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (heard, states) == ([signal.SIGTERM], [False, True])


@pytest.mark.parametrize("timeout", [0, -1, True, float("inf"), "5"])
def test_an_impossible_time_is_refused(timeout: Any) -> None:
    """When the service begins, naming it."""

    async def main() -> None:
        async with lifespan(Starlette(), timeout=timeout):
            raise AssertionError

    with pytest.raises(ConfigError, match="timeout"):
        asyncio.run(main())


def test_only_an_application_can_be_installed_on() -> None:
    """And what is wrong with an argument is told then, not at the first request."""
    with pytest.raises(ConfigError, match="Starlette or FastAPI application, got dict"):
        install({})
    with pytest.raises(ConfigError, match="deadline"):
        install(Starlette(), deadline=-1)
    with pytest.raises(ConfigError, match="no reason"):
        install(Starlette(), statuses={"x": 500})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": {"user": "X Y"}}, "headers: 'user'"),
        ({"headers": 5}, "headers=5"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": "a"}, "timeout='a'"),
        ({"flush": 3}, "flush=3"),
        ({"flush": [3]}, "flush="),
        ({"deadline": "5"}, "deadline='5'"),
        ({"statuses": 3}, "statuses=3"),
        ({"alive": "healthz"}, "alive='healthz'"),
        ({"ready": 5}, "ready=5"),
        ({"alive": "/up", "ready": "/up"}, "path of its own"),
        ({"unready": 5}, "unready=5"),
        ({"unready": ["circuit"]}, "'circuit' is unknown"),
        ({"identify": 5}, "identify=5"),
        ({"cancel": None}, "cancel=None"),
    ],
)
def test_an_argument_that_cannot_be_is_told_at_once(options: Any, words: str) -> None:
    """Some were told when the service began, some never, and some by Starlette's own assertions."""
    app = Starlette()
    before = (list(app.user_middleware), dict(app.exception_handlers), list(app.router.routes))
    with pytest.raises(ConfigError, match=re.escape(words)):
        install(app, **options)
    assert (app.user_middleware, app.exception_handlers, app.router.routes) == before


def test_own_handlers_stay() -> None:
    """A service that answers refusals itself goes on doing so."""

    async def mine(request: Any, error: Exception) -> Any:
        raise NotImplementedError

    app = install(Starlette(exception_handlers={dspy_prod.asgi.refusing.LMError: mine}))
    assert app.exception_handlers[dspy_prod.asgi.refusing.LMError] is mine


SERVICE = """
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from dspy_prod import asgi
from tests.e2e.support import make_lm

lm = make_lm(sys.argv[1], store=sys.argv[2], engine="lm15")

async def ask(request):
    return PlainTextResponse((await lm.acall("q"))[0])

app = Starlette(routes=[Route("/", ask)])
asgi.install(app)
uvicorn.run(app, port=int(sys.argv[3]), log_level="error")
"""


@pytest.mark.long
def test_sigterm_ends_a_server_only_when_all_is_written(tmp_path: Path) -> None:
    """uvicorn dies of the signal, so nothing is done at exit; a file that is locked meanwhile is waited for."""
    with Provider(prices=PRICES) as provider:
        url, port = f"sqlite:///{tmp_path}/state.db", free_port()
        command = [sys.executable, "-c", SERVICE, provider.url, url, str(port)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 60)
            assert answers(f"http://127.0.0.1:{port}/")
            with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
                until(lambda: other.execute("SELECT count(*) FROM records").fetchone() == (1,))
                other.execute("BEGIN IMMEDIATE")
                assert answers(f"http://127.0.0.1:{port}/")
                process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1.0)
                other.execute("ROLLBACK")
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()
            process.wait()
        lm = make_lm(provider.url, store=url)
        assert [record.cost_nano for record in upstream(lm)] == [row.nano for row in provider.bill.rows]
        assert len(provider.bill.rows) == 2
        lm.close()


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False
