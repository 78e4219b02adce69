"""The exporter process, seen from the process that makes the calls.

Writing a trace costs MLflow milliseconds of CPU, and seconds when its server is slow. In a process of its own that
delays nobody, has time-outs of its own, and can be ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Final

import orjson

from dspy_prod.runtime.threads import begin
from dspy_prod.tracking.attributes import dumped
from dspy_prod.tracking.batches import Batch

_log = logging.getLogger("dspy_prod")

_STOP_PATIENCE: Final = 1.0
_PIPE: Final = 1 << 20
_BODY: Final = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; root = sys.argv[1]; "
    "root in sys.path or sys.path.append(root); import importlib; importlib.import_module(sys.argv[2]).main()"
)
"""Neither the working directory nor this package's folder may shadow a module."""


class Exporter:
    """A running exporter process.

    Args:
        config: its first line: where to write, see `exporter.main`.
        tally: descriptor of the `Tally`'s memory.
        heard: told what it says, see `Delivery._heard`.
        environment: variables on top of this process's own.
        module: its `main` is what it runs.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        heard: Callable[..., None],
        environment: Mapping[str, str] | None = None,
        tally: int | None = None,
        module: str = "dspy_prod.tracking.exporter",
    ) -> None:
        self._heard = heard
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self.alive = True
        self._forgotten = False
        self._process: subprocess.Popen[bytes] | None = None
        aloud = _stderr()
        try:
            self._process = subprocess.Popen(
                [_python(), "-c", _BODY, str(Path(__file__).parents[2]), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("DSPY_PROD_TRACKING_DEBUG") else subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the program; what it did is still to be written
                pass_fds=[file for file in (tally, aloud) if file is not None],
            )
        except OSError as error:
            self.alive = False
            heard(failing=f"the exporter process cannot be started: {error}", died=True)
            return
        finally:
            if aloud is not None:
                os.close(aloud)
        pipes: list[Any] = [self._process.stdin, self._process.stdout]
        self._pipes = {pipe.fileno(): os.fstat(pipe.fileno())[:3] for pipe in pipes}
        _widen(pipes[0])
        self._lines.put(orjson.dumps({**config, "parent": os.getpid(), "tally": tally, "aloud": aloud}) + b"\n")
        for pipe, work, name in zip(pipes, (self._write, self._read), ("writer", "reader"), strict=True):
            if begin(f"dspy_prod-tracking-{name}", work, pipe) is None:
                self.stop()
                heard(failing="the exporter cannot be talked to: this process has as many threads as it may", died=True)
                return

    def send(self, batch: Batch) -> None:
        """Hand a batch over. Does not wait."""
        message = {"batch": batch.number, "traces": batch.traces, "spans": batch.spans, "infos": batch.infos}
        message.update(places=batch.places, runs=batch.runs, lines=batch.lines)
        if batch.messages:
            message.update(messages=batch.messages, again=batch.tries > 1)
        self.tell(message)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Hand any message over. Does not wait."""
        self._lines.put(dumped(message).encode() + b"\n")

    def finish(self) -> None:
        """Nothing more is to come: it ends once it has written everything."""
        self._lines.put(None)

    def hurry(self) -> None:
        """Tell it that the program is ending: what cannot be delivered now is not tried for long."""
        self._lines.put(b'{"hurry":true}\n')

    def stop(self) -> None:
        """End it now, before it can take the end of its input for the end of the program."""
        process = self._process
        if process is not None and not self._forgotten:
            self.alive = False
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait(_STOP_PATIENCE)
        self._lines.put(None)

    def forget(self) -> None:
        """In a forked child: let go of the parent's exporter, and touch nothing that a thread of the parent held."""
        self._forgotten = True
        self.alive = False
        if self._process is None:
            return
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number, identity in self._pipes.items():
            try:
                if os.fstat(number)[:3] == identity:  # else it was closed, and the number is somebody else's now
                    os.dup2(nowhere, number)
            except OSError:
                pass
        os.close(nowhere)
        self._process.returncode = 0  # the parent's to wait for

    def _write(self, pipe: IO[bytes]) -> None:
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()
            pipe.close()
        except (OSError, ValueError):
            pass  # it is gone; the reader notices

    def _read(self, pipe: IO[bytes]) -> None:
        try:
            for line in pipe:
                said = orjson.loads(line)
                more = {name: said[name] for name in ("ready", "ids", "links", "result") if name in said}
                self._heard(said.get("batch"), said.get("lost", 0), said.get("failing"), **more)
        except (OSError, ValueError):
            pass
        if self.alive:
            self.alive = False
            self._heard(failing="the exporter process ended", died=True)
        self._lines.put(None)


def _stderr() -> int | None:
    """Where the program's errors are read, to be inherited; the exporter's own `stderr` is full of others' words."""
    if os.name != "posix":
        return None
    try:
        return os.dup(2)
    except OSError:  # closed, as a daemon's may be
        return None


def _widen(pipe: IO[bytes]) -> None:
    """Let the pipe hold more than 64 kB, as far as the system allows: what is in it outlives this process."""
    try:
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, AttributeError, OSError):
        pass


def _python() -> str:
    """The interpreter; a server that embeds Python calls itself `sys.executable`."""
    if "python" in os.path.basename(sys.executable or "").lower():
        return sys.executable
    names = ("bin/python3", "bin/python", "python.exe", "Scripts/python.exe")
    found = (Path(prefix, name) for prefix in (sys.prefix, sys.base_prefix) for name in names)
    return next((str(path) for path in found if path.exists()), sys.executable)
