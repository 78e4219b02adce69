"""What tracking costs: CPU beside MLflow's autologging, tails and an experiment's calls while MLflow is away, and what
an exit loses.

    python -m benchmarks.tracking

Ends with an error where calls of an experiment are slower while MLflow is away than with tracking off.
"""

from __future__ import annotations

import gc
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy

import dspy_prod
from benchmarks.bars import exit_code
from benchmarks.common import ConstantEngine, guarded, interleaved, paired
from dspy_prod import tracking
from dspy_prod.telemetry.tap import TAP

ANSWERED = """
import sys
from benchmarks.common import guarded
from dspy_prod import tracking
import dspy
tracking.enable("exit", tracking_uri=sys.argv[1], exit_timeout=300)
program = dspy.Predict("question -> answer")
with dspy.context(lm=guarded(cache=False)):
    for number in range(int(sys.argv[2])):
        program(question=f"question {number}")
"""


def _predicts(lm: dspy.LM, before: Callable[[], Any]) -> Callable[[int], None]:
    program = dspy.Predict("question -> answer")
    numbers = iter(range(10**9))

    def make(count: int) -> None:
        before()
        with dspy.context(lm=lm):
            for _ in range(count):
                program(question=f"question {next(numbers)}")

    return make


def request_path(rounds: int = 20, count: int = 60) -> dict[str, Any]:
    """CPU of a `Predict` on its caller's thread: tracking off, the lean mode, MLflow's own autologging."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        tracking.enable("bench", tracking_uri=uri)  # before MLflow is imported: its autologging stays its own
        tap = TAP.active
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("bench")
        mlflow.dspy.autolog()
        callbacks = list(dspy.settings.callbacks)

        def switch(on: Any, calls: list[Any]) -> Callable[[], None]:
            def use() -> None:
                TAP.active = on
                dspy.configure(callbacks=calls)

            return use

        subjects = {
            "off": _predicts(guarded(cache=False), switch(None, [])),
            "lean": _predicts(guarded(cache=False), switch(tap, [])),
            "autolog": _predicts(guarded(cache=False), switch(None, callbacks)),
        }
        times = interleaved(subjects, rounds=rounds, count=count, clock=time.thread_time)
        TAP.active = tap
        dspy.configure(callbacks=[])
        mlflow.dspy.autolog(disable=True)
        lean, _ = paired(times, "lean", "off")
        auto, _ = paired(times, "autolog", "off")
        mlflow.flush_trace_async_logging(terminate=True)
        tracking.disable()
    return {"off_us": statistics.median(times["off"]) * 1e6, "lean_us": lean * 1e6, "autolog_us": auto * 1e6}


@contextmanager
def _mute() -> Iterator[str]:
    """A server that takes connections and never answers."""
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


@contextmanager
def _gone() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    yield address


@contextmanager
def _there() -> Iterator[str]:
    """A SQLite store that takes everything."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/mlflow.db"


def tails(calls: int = 6000, block: int = 250) -> dict[str, Any]:
    """p99.9 of one `Predict` in ms, tracking off and on in turns, while MLflow is gone, mute, and there."""
    result: dict[str, Any] = {}
    program = dspy.Predict("question -> answer")
    for name, place in (("gone", _gone), ("mute", _mute), ("there", _there)):
        with place() as uri:
            tracking.enable("bench", tracking_uri=uri, exit_timeout=5)
            tap = TAP.active
            spent: dict[str, list[float]] = {"off": [], "on": []}
            with dspy.context(lm=guarded(cache=False)):
                for turn in range(2 * calls // block):
                    kind = ("off", "on")[turn % 2]
                    TAP.active = tap if kind == "on" else None
                    for number in range(block):
                        began = time.perf_counter()
                        program(question=f"{name} {turn} {number}")
                        spent[kind].append(time.perf_counter() - began)
            TAP.active = tap
            tracking.disable()
        gc.collect()
        for kind, values in spent.items():
            result[f"{name}_{kind}_ms"] = sorted(values)[int(len(values) * 0.999)] * 1e3
    return result


class _Takes(ConstantEngine):
    """Answers after 10 ms, which is less than any provider takes."""

    def complete(self, request: Any) -> Any:
        time.sleep(0.01)
        return super().complete(request)


SLOWER = 1.05
"""So many times what a call takes with tracking off may one take while MLflow is away, at the median."""


def experiments(rounds: int = 20, count: int = 20) -> dict[str, float]:
    """What an experiment's calls take while MLflow is gone, mute, and there, as a ratio to tracking off: the median of
    the ratios of rounds that take turns, and of the slowest calls of each.
    """
    result: dict[str, float] = {}
    predicts = {name: dspy.Predict("question -> answer") for name in ("control", "new")}
    for name, place in (("gone", _gone), ("mute", _mute), ("there", _there)):
        with place() as uri, dspy.context(lm=guarded(cache=False, engine=_Takes())):
            tracking.enable("bench", tracking_uri=uri, exit_timeout=5)
            tap, users = TAP.active, iter(range(10**9))
            exp = dspy_prod.Experiment(
                name, variants=predicts, metrics=[dspy_prod.Metric("resolved")], store="memory://"
            )
            exp.start()
            times: dict[str, list[list[float]]] = {"off": [], "on": []}
            for turn in range(2 * (rounds + 1)):
                kind, spent = ("off", "on")[turn % 2], list[float]()
                TAP.active = tap if kind == "on" else None
                for _ in range(count):
                    user = f"u{next(users)}"
                    began = time.perf_counter()
                    with dspy_prod.call_context(user=user):
                        exp(question=user)
                    exp.record(user, resolved=1.0)
                    spent.append(time.perf_counter() - began)
                times[kind].append(spent)
            TAP.active = tap
            exp.stop()
            tracking.disable()
        for figure, of in (("median", statistics.median), ("slowest", max)):
            pairs = zip(times["on"][1:], times["off"][1:], strict=True)  # the first ones import and connect
            result[f"{name}_{figure}_ratio"] = statistics.median(of(on) / of(off) for on, off in pairs)
    return result


def missed(figures: dict[str, float]) -> list[str]:
    """Where calls are slower while MLflow is away, in words."""
    return [
        f"an experiment's call while MLflow is {name}: {figures[f'{name}_median_ratio']:.3f} x tracking off, "
        f"not <= {SLOWER}"
        for name in ("gone", "mute")
        if not figures[f"{name}_median_ratio"] <= SLOWER
    ]


def at_exit(calls: int = 10_000) -> dict[str, Any]:
    """How many of so many traces are in MLflow after a program that made them as fast as it could has ended."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        root = str(Path(__file__).parent.parent)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", ANSWERED, uri, str(calls)], check=True, env={**os.environ, "PYTHONPATH": root}
        )
        took = time.perf_counter() - began
        import sqlite3

        connection = sqlite3.connect(f"{folder}/mlflow.db")
        found = connection.execute("select count(*) from trace_info").fetchone()[0]
        connection.close()
    return {"calls": calls, "found": found, "seconds": took}


def main() -> int:
    """Measure, print, and tell whether calls wait for MLflow."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    print(request_path())
    print(tails())
    found = experiments()
    print(found)
    print(at_exit())
    return exit_code(missed(found))


if __name__ == "__main__":
    sys.exit(main())
