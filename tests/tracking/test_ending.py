"""A server that is ended, by whatever signal: its traces are in MLflow, or those that are missing are told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dspy_prod
from tests.e2e.support import until
from tests.tracking.conftest import traces_in
from tests.tracking.test_safety import nobody

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

REQUESTS = 100
SERVER = """
import sys
import uvicorn
import dspy_prod
from dspy_prod import tracking
from dspy_prod.testing import ScriptedEngine

uri, port, closes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "closes"
tracking.enable("tracked", tracking_uri=uri, exit_timeout=30.0)
script = ScriptedEngine("yes")
options = {"store": "memory://", "cache": False}
lm = dspy_prod.LM("openai/gpt-4o-mini", engine=script, async_engine=script.asynchronous, **options)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and closes:
                await lm.aclose()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await lm.acall("a question")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})

uvicorn.run(app, port=port, log_level="warning")
"""


class Served:
    """An app under uvicorn; `log` is its standard error, which its exporter may outlive it to write to."""

    def __init__(self, uri: str, log: Path, closes: bool) -> None:
        port = nobody().rpartition(":")[2]
        self._url = f"http://127.0.0.1:{port}/"
        self._log = log
        with log.open("w") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, uri, port, "closes" if closes else "ends"], stderr=written,
                env={**os.environ, "PYTHONPATH": str(Path(dspy_prod.__file__).parent.parent)},
            )  # fmt: skip

    def get(self, number: int) -> None:
        """One request."""
        with urllib.request.urlopen(self._url, timeout=30) as answer:
            assert answer.read() == b"ok"

    def up(self) -> bool:
        """Whether it takes requests; asking is none, for the port alone is tried."""
        import socket

        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self._url[17:-1])), 1.0):
            return True
        return False

    def told(self) -> int:
        """How many traces were said to be missing."""
        found = re.findall(r"(\d+) traces did not reach MLflow", self._log.read_text())
        assert len(found) <= 1, "nothing is told twice"
        return int(found[0]) if found else 0


@pytest.fixture
def served(uri: str, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts a server and asks it a hundred times."""
    running: list[Served] = []

    def start(closes: bool = False, uri: str = uri) -> Served:
        server = Served(uri, tmp_path / "stderr", closes)
        running.append(server)
        until(server.up, 60, "the server")
        asked = 0
        if closes:  # it waits for MLflow only while something moves there, and to begin takes that long
            server.get(0)
            until(lambda: len(traces_in(uri)) == 1, 90, "the first trace")
            asked = 1
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(server.get, range(asked, REQUESTS)))
        return server

    yield start
    for server in running:
        server.process.kill()
        server.process.wait(10)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_server_that_is_ended_loses_no_trace_without_a_word(
    served: Callable[..., Served], uri: str, how: signal.Signals
) -> None:
    """After the hundredth answer came the signal: MLflow had none of the hundred traces, and nobody was told."""
    server = served()
    server.process.send_signal(how)
    server.process.wait(60)
    until(lambda: len(traces_in(uri)) + server.told() == REQUESTS, 60, "all traces, or a word about them")


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_server_that_closes_its_lm_loses_no_trace(
    served: Callable[..., Served], uri: str, how: signal.Signals
) -> None:
    """`await lm.aclose()` in its shutdown returns when the traces are in MLflow: none is left to be lost."""
    server = served(closes=True)
    server.process.send_signal(how)
    server.process.wait(60)
    assert len(traces_in(uri)) == REQUESTS
    assert server.told() == 0


def test_what_is_missing_is_told_although_mlflow_is_not_there(served: Callable[..., Served]) -> None:
    """A killed server whose MLflow is away: all of its traces are lost, and its errors say so."""
    server = served(uri=nobody())
    server.process.kill()
    server.process.wait(10)
    until(lambda: server.told() == REQUESTS, 60, "the word")


WORKER = """
import multiprocessing, sys
import dspy_prod
from dspy_prod import tracking
from dspy_prod.testing import ScriptedEngine

def work(lm, uri):
    if uri is not None:
        tracking.enable("tracked", tracking_uri=uri)
    for number in range(20):
        lm(f"question {number}")

uri, whose = sys.argv[1:]
lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine("yes"), store="memory://", cache=False)
if whose == "parent":
    tracking.enable("tracked", tracking_uri=uri)
worker = multiprocessing.get_context("fork").Process(target=work, args=(lm, None if whose == "parent" else uri))
worker.start()
worker.join()
"""


@pytest.mark.parametrize("whose", ["worker", pytest.param("parent", marks=pytest.mark.slow)])
def test_a_worker_of_multiprocessing_delivers_at_its_end(uri: str, tmp_path: Path, whose: str) -> None:
    """It leaves without `atexit`: of twenty calls in a worker, MLflow had no trace, whoever had turned tracking on."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(Path(dspy_prod.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), uri, whose], env=env, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, "did not reach" in done.stderr) == (0, False), done.stderr
    assert len(traces_in(uri)) == 20
