"""Real MLflow stores: a SQLite file per test (copied, since making the tables takes seconds), and a server to kill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod.registry import copies, loading


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with tables and nothing else."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_prompts()
    return path


@pytest.fixture
def database(schema: Path, tmp_path: Path) -> Path:
    """The file of a fresh MLflow store."""
    return Path(shutil.copy(schema, tmp_path / "mlflow.db"))


@pytest.fixture
def store(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh MLflow store, which is MLflow's current one; copies are kept below the test's directory."""
    uri = f"sqlite:///{database}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


@pytest.fixture
def client(store: str) -> MlflowClient:
    """MLflow's own view of the store."""
    return MlflowClient(tracking_uri=store, registry_uri=store)


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """No test finds what another one loaded."""
    forget()
    yield
    forget()


def forget() -> None:
    """What a new process knows: nothing."""
    copies.MEMORY.clear()
    loading._failed_at.clear()


@pytest.fixture
def events() -> Iterator[list[dspy_prod.Event]]:
    """What happened."""
    seen: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(seen.append)
    yield seen
    remove()


class MlflowServer:
    """An `mlflow server` on loopback."""

    def __init__(self, database: Path) -> None:
        self.database = database
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        # Off line, LiteLLM's price fetch and MLflow's import hooks can deadlock each other while the server starts.
        quick = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--no-serve-artifacts"],
            env={**os.environ, **quick}, cwd=self.database.parent, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.kill()
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        """End it and its workers at once."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait(timeout=20)
            self.process = None

    def freeze(self) -> None:
        """Let it accept connections and never answer."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)


@pytest.fixture
def server(database: Path) -> Iterator[MlflowServer]:
    """A running server on a fresh store."""
    running = MlflowServer(database)
    running.start()
    yield running
    running.kill()


def wait_until(condition: Any, seconds: float = 20.0) -> Any:
    """What the condition gives once it is true; fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found
