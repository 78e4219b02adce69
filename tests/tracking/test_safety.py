"""An MLflow that is not there, hangs, dies or comes back; exporters that are killed; programs that fork or end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import tracking
from dspy_prod.errors import ConfigError
from dspy_prod.tracking import setup
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import until
from tests.ports import free_port
from tests.registry.processes import MlflowServer
from tests.stopwatch import Stopwatch
from tests.tracking.conftest import EXPERIMENT, assert_same_costs, traces_in

PROGRAM = """
import sys, time
import dspy_prod
from dspy_prod import tracking
from dspy_prod.testing import ScriptedEngine

uri, calls, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
tracking.enable("tracked", tracking_uri=uri, exit_timeout=patience)
lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine("yes"), store="memory://", cache=False)
slowest = 0.0
for number in range(calls):
    began = time.perf_counter()
    lm(f"question {number}")
    slowest = max(slowest, time.perf_counter() - began)
print(slowest, flush=True)
"""


def run(uri: str, calls: int, patience: float = 30.0) -> tuple[float, str, float]:
    """A program that calls and ends: (seconds from its last call to its end, what it logged, its slowest call)."""
    with tempfile.TemporaryFile("w+") as log:
        program = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), uri, str(calls), str(patience)],
            stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(dspy_prod.__file__).parent.parent)},
        )  # fmt: skip
        assert program.stdout is not None
        with program.stdout:
            said = program.stdout.readline()
            with Stopwatch() as took:
                program.wait(280)
        log.seek(0)
        logged = log.read()
    assert program.returncode == 0, logged
    return took.seconds, logged, float(said)


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    for connection in kept:
        connection.close()


def nobody() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def test_nothing_is_lost_at_the_end_of_a_program(uri: str) -> None:
    """It ends when its traces are in MLflow, without a call of `flush`, and not when its patience does."""
    took, logged, _ = run(uri, 100, patience=250)
    assert len(traces_in(uri)) == 100, logged
    assert "did not reach" not in logged
    assert took < 200


def test_a_program_ends_although_mlflow_was_never_there() -> None:
    """Soon, and it says how many traces are lost and where the costs are."""
    took, logged, slowest = run(nobody(), 50)
    assert "50 traces did not reach MLflow" in logged
    assert "The ledger has their costs" in logged
    assert slowest < 5, "no call waited for MLflow's seven tries"
    assert took < 15


@pytest.mark.parametrize("patience", [2.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_a_program_ends_although_mlflow_hangs(mute: str, patience: float) -> None:
    """Within its bound; the calls do not notice."""
    took, logged, slowest = run(mute, 50, patience=patience)
    assert "50 traces did not reach MLflow" in logged
    assert slowest < 5
    assert took < patience + 4


def test_calls_go_on_while_the_server_is_away_and_their_traces_follow(
    serve: MakeProvider, connect: MakeLM, database: Path
) -> None:
    """A server is killed between calls and comes back: nothing is lost, and health says so meanwhile."""
    server = MlflowServer(database)
    server.start()
    try:
        tracking.enable(EXPERIMENT, tracking_uri=server.uri, content="full")
        lm = connect(serve())
        for number in range(20):
            lm(f"before {number}")
        assert tracking.flush(60)
        server.kill()
        for number in range(20):
            lm(f"meanwhile {number}")
        until(lambda: dspy_prod.health().tracking.failing is not None, 30, "the failure")
        health = dspy_prod.health()
        assert health.status != "healthy"
        assert any("MLflow" in reason for reason in health.reasons)
        server.start()
        assert tracking.flush(90)
        health = dspy_prod.health()
        assert (health.tracking.exported, health.tracking.lost, health.tracking.failing) == (40, 0, None)
        records = lm.ledger.records()
    finally:
        tracking.disable()
        server.kill()
    assert_same_costs(f"sqlite:///{database}", records)


def test_a_killed_exporter_is_replaced_and_nothing_is_lost(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """Whether it was killed while idle or while it had work."""
    track()
    lm = connect(serve())
    for turn in range(2):
        for number in range(30):
            lm(f"{turn} {number}")
        active = setup._active
        assert active is not None
        until(lambda: active.courier.delivery._exporter is not None and active.courier.delivery._exporter.alive, 20)  # noqa: B023
        exporter: Any = active.courier.delivery._exporter
        os.kill(exporter._process.pid, signal.SIGKILL)
        exporter._process.wait(10)
    lm("after")
    assert tracking.flush(90)
    status = tracking.status()
    assert status is not None
    assert (status.exported, status.lost) == (61, 0)
    assert_same_costs(uri, lm.ledger.records())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_tracks_by_itself(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """It has an exporter of its own, ships none of its parent's traces, and leaves its parent's exporter alone."""
    track()
    lm = connect(serve())
    lm("parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            lm("child")
            status = tracking.status()
            code = 0 if tracking.flush(60) and status is not None and status.waiting + status.exported == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lm("parent again")
    assert tracking.flush(60)
    assert len(traces_in(uri)) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sample": 1.5}, "sample"),
        ({"sample": True}, "sample"),
        ({"content": "some"}, "content"),
        ({"queue_size": 0}, "queue_size"),
        ({"exit_timeout": -1}, "exit_timeout"),
        ({"tracking_uri": "./mlruns"}, "sqlite:///mlflow.db"),
        ({"content": "full", "redact": {"a": "b"}}, "redact"),
        ({"redact": {"ticket": "("}}, "ticket"),
    ],
)
def test_an_impossible_option_is_named(options: dict[str, Any], named: str) -> None:
    """At once, and tracking stays off."""
    with pytest.raises(ConfigError, match=named.replace("/", "\\/")):
        tracking.enable(**options)
    assert tracking.status() is None


@pytest.mark.slow
def test_enabling_twice_replaces_and_disabling_twice_does_nothing(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """The first one's traces are delivered before; its own `disable` does not touch the second."""
    off = tracking.enable("first", tracking_uri=uri)
    lm = connect(serve())
    lm("one")
    track()
    off()
    assert tracking.status() is not None
    lm("two")
    tracking.disable()
    tracking.disable()
    lm("three")
    assert (len(traces_in(uri, "first")), len(traces_in(uri))) == (1, 1)
    assert tracking.status() is None
    assert not tracking.flush(0.1)
