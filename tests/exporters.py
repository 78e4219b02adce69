"""Exporter processes that need not import MLflow: each is forked from one that has.

They are processes as any other, children of the one that asks for them, and can be killed and waited for. Where that
cannot be had (it takes Linux), in forked children and for every other command `Popen` is the one of `subprocess`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from dspy_prod.tracking.process import _BODY

ROOT: Final = Path(__file__).parents[1]
_SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans below this process become its own children."""
_OUT_OF_THE_WAY: Final = 200


class Exporters:
    """Where they come from. Looks like the module `subprocess`, as far as that is needed to start them."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._here, there = socket.socketpair()
        self._here.settimeout(120)
        self._ready = False
        with there:
            self._mother = subprocess.Popen(
                [sys.executable, "-c", "from tests.exporters import bear; bear()", str(there.fileno())],
                cwd=ROOT, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip

    def wait(self) -> None:
        """Until they can be had at once: a test that measures time must not be the one that waits for MLflow."""
        with self._lock:
            if not self._ready:
                self._ready = _line(self._here) == b"ready\n"

    def Popen(self, command: list[str], **options: Any) -> Any:
        """A process that runs the command."""
        if command[1:3] != ["-c", _BODY] or os.getpid() != self._owner or sys.platform != "linux":
            return subprocess.Popen(command, **options)
        self.wait()
        with contextlib.ExitStack() as done:
            done.enter_context(self._lock)
            theirs, stdin = os.pipe()
            stdout, theirs_too = os.pipe()
            errors = os.open(os.devnull, os.O_WRONLY) if options["stderr"] == subprocess.DEVNULL else os.dup(2)
            for file in (theirs, theirs_too, errors):
                done.callback(os.close, file)
            asked = {"module": command[-1], "env": options["env"], "files": [0, 1, 2, *options["pass_fds"]]}
            files = array.array("i", [theirs, theirs_too, errors, *options["pass_fds"]])
            _adopts(True)
            done.callback(_adopts, False)
            self._here.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            self._here.sendall(json.dumps(asked).encode() + b"\n")
            pid = int(_line(self._here))  # without which there is nothing to wait for: the test fails here
        born = subprocess.Popen.__new__(subprocess.Popen)
        born.__dict__.update(
            args=command, pid=pid, returncode=None, stdin=os.fdopen(stdin, "wb"), stdout=os.fdopen(stdout, "rb"),
            stderr=None, _child_created=True, _waitpid_lock=threading.Lock(), _communication_started=False, _input=None,
        )  # fmt: skip
        return born

    def close(self) -> None:
        """No more of them."""
        self._here.close()
        self._mother.wait(20)


def _adopts(on: bool) -> None:
    ctypes.CDLL(None).prctl(_SUBREAPER, int(on), 0, 0, 0)


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            return b""
        line += more
    return line


def bear() -> None:
    """Body of the process that has imported MLflow: give birth until nobody asks any more."""
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    connection = socket.socket(fileno=int(sys.argv[1]))
    gc.collect()
    gc.freeze()  # a child that looked at it would copy it
    connection.sendall(b"ready\n")
    while (asked := socket.recv_fds(connection, 1, 16))[0]:
        wanted = json.loads(_line(connection))
        told, telling = os.pipe()
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            child = os.fork()
            if child:
                os.write(telling, b"%d" % child)
                os._exit(0)  # who asked is the child's parent now
            for file in (told, telling):
                os.close(file)
            connection.close()
            _live(SimpleNamespace(**wanted), asked[1], middle)
        os.waitpid(middle, 0)
        connection.sendall(os.read(told, 20) + b"\n")
        for file in (told, telling, *asked[1]):
            os.close(file)


def _live(wanted: SimpleNamespace, files: list[int], middle: int) -> None:
    code = 1
    try:
        while os.getppid() == middle:
            time.sleep(0.001)
        os.setsid()
        away = [os.dup2(file, _OUT_OF_THE_WAY + number) for number, file in enumerate(files)]
        for file in files:
            os.close(file)
        for file, number in zip(away, wanted.files, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(wanted.env)
        importlib.import_module(wanted.module).main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # taking the packages apart would take longer
