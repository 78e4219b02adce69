"""Other processes: a server to kill, a door to shut, others to race with, and a nursery for those who die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from dspy_prod.registry.published import copies, loading
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
END = "---"
"""The line after which another process waits for more."""


def forget() -> None:
    """What a new process knows: nothing."""
    copies.MEMORY.clear()
    loading._failed_at.clear()


def wait_until(condition: Any, seconds: float = 20.0) -> Any:
    """What the condition gives once it is true; fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found


class MlflowServer:
    """An `mlflow server` on loopback."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.frozen = False

    def launch(self) -> None:
        """Start it, and do not wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        # Off line, LiteLLM's price fetch and MLflow's import hooks can deadlock each other while the server starts.
        quick = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--no-serve-artifacts"],
            env={**os.environ, **quick}, cwd=self.database.parent, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self.process is None:
            self.launch()
        assert self.process is not None
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
        """End it and its workers at once; then nobody listens at its port."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait(timeout=20)
            self.process, self.frozen = None, False
            wait_until(self._refuses)  # its workers may die a little later

    def _refuses(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def freeze(self) -> None:
        """Let it accept connections and never answer."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let it answer again."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.frozen = False


class Door:
    """A way to a server that can be shut: connections are refused then and open ones end, as when it is gone."""

    def __init__(self, target: int) -> None:
        self._target, self.port = target, 0
        self._open: list[socket.socket] = []
        self.open()

    @property
    def uri(self) -> str:
        """The server's address through this door."""
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Let connections through."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse connections, and end those there are."""
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Other:
    """Another process, in which `run` executes code. It remembers nothing between two runs but its imports."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._busy = False
        code = "from tests.registry.processes import obey; obey()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )

    def begin(self, code: str, *arguments: str) -> None:
        """Let it execute code, which finds its arguments in `sys.argv[1:]`."""
        assert self.process.stdin is not None
        self._busy = True
        self.process.stdin.write(json.dumps([code, *arguments]) + "\n")
        self.process.stdin.flush()

    def said(self) -> list[str]:
        """What the code printed, once it has ended."""
        assert self.process.stdout is not None
        lines = list(iter(lambda: self.process.stdout.readline().rstrip("\n"), END))  # type: ignore[union-attr]
        assert self.process.poll() is None, lines
        self._busy = False
        return lines

    def run(self, code: str, *arguments: str) -> list[str]:
        """What the code prints."""
        self.begin(code, *arguments)
        return self.said()

    def rest(self) -> None:
        """After a test that was broken off: what it began must not go on beside the next one."""
        if self._busy:
            self.end()
            self._start()

    def end(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(20)


def obey() -> None:
    """Execute what `Other` sends, in the other process."""
    for line in sys.stdin:
        code, *arguments = json.loads(line)
        sys.argv = ["-c", *arguments]
        forget()
        exec(code, {})
        print(END, flush=True)


LONELY = """
import os, sys
pid = os.fork()
if pid == 0:
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        from dspy_prod.cli import main
        code = main(sys.argv[2:])
    finally:
        os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Gives birth to processes that run the command line, and may be killed: quick, since all imports are made."""

    def __init__(self, uri: str) -> None:
        self._other = Other()
        code = (
            "import sys, dspy, dspy_prod, dspy_prod.registry.deployment, dspy_prod.cli.eval_file\n"
            "dspy_prod.registry.programs(tracking_uri=sys.argv[1])"
        )
        self._other.begin(code, uri)
        self._ready = False

    def main(self, folder: Path, *arguments: str) -> int:
        """The exit code of a command in a folder; -9 when it was killed. What it prints is in the file `output`."""
        if not self._ready:
            self._ready = self._other.said() == []
        (status,) = self._other.run(f"import os, sys; os.chdir(sys.argv[1]){LONELY}", str(folder), *arguments)
        return int(status)

    def close(self) -> None:
        """End it."""
        self._other.end()
