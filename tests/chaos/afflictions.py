"""What befalls a process while it calls: its clock, threads, descriptors and disk, and its death at any statement.

Each is a context of the worker's; `AFFLICTIONS` names them all. They are made where the operating system would: at
`Thread.start`, at the limits of the process, at the connections to the file.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

DAY: Final = 86_400.0
JUMPS: Final = (3_600.0, -3_600.0, DAY, -DAY, 3_650 * DAY, -3_650 * DAY)
"""Seconds by which the wall clock jumps."""


class JumpyClock:
    """The machine's clocks, of which that of the wall jumps when it is told to."""

    def __init__(self) -> None:
        self.off = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time() + self.off


CLOCK: Final = JumpyClock()


class _Now:
    """Whether it goes wrong now: for short spans, one after another, drawn by chance."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._over = threading.Event()
        self.wrong = False

    def spans(self, begin: Callable[[], None], end: Callable[[], None]) -> Any:
        """A thread that begins and ends the spans."""

        def live() -> None:
            while not self._over.wait(self._dice.uniform(0.02, 0.3)):
                self.wrong = True
                begin()
                self._over.wait(self._dice.uniform(0.02, 0.3))
                self.wrong = False
                end()

        thread = threading.Thread(target=live, name="affliction", daemon=True)
        thread.start()
        return thread

    def stop(self, thread: Any) -> None:
        self._over.set()
        thread.join()


def _nothing() -> None:
    pass


@contextmanager
def _spans(dice: random.Random, begin: Callable[[], None], end: Callable[[], None]) -> Iterator[_Now]:
    now = _Now(dice)
    thread = now.spans(begin, end)
    try:
        yield now
    finally:
        now.stop(thread)


@contextmanager
def clock(dice: random.Random) -> Iterator[None]:
    """The wall clock jumps by an hour, a day, ten years, forth and back."""

    def jump() -> None:
        CLOCK.off = dice.choice(JUMPS)

    def back() -> None:
        CLOCK.off = 0.0

    with _spans(dice, jump, back):
        yield
    CLOCK.off = 0.0


@contextmanager
def threads(dice: random.Random) -> Iterator[None]:
    """No thread can be started."""
    start = threading.Thread.start
    with _spans(dice, _nothing, _nothing) as now:

        def refused(self: threading.Thread) -> None:
            if now.wrong and self.name.startswith("dspy_prod"):
                raise RuntimeError("can't start new thread")
            start(self)

        threading.Thread.start = refused  # type: ignore[method-assign]
        try:
            yield
        finally:
            threading.Thread.start = start  # type: ignore[method-assign]


@contextmanager
def _limited(dice: random.Random, what: int, to: Callable[[], int]) -> Iterator[None]:
    before, hard = resource.getrlimit(what)
    with _spans(
        dice,
        lambda: resource.setrlimit(what, (to(), hard)),
        lambda: resource.setrlimit(what, (before, hard)),
    ):
        yield
    resource.setrlimit(what, (before, hard))


@contextmanager
def descriptors(dice: random.Random) -> Iterator[None]:
    """No file or socket can be opened."""
    with _limited(dice, resource.RLIMIT_NOFILE, lambda: len(os.listdir("/proc/self/fd")) - 1):
        yield


@contextmanager
def full(dice: random.Random) -> Iterator[None]:
    """No file can grow: what a full disk does, but for its error's number."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with _limited(dice, resource.RLIMIT_FSIZE, lambda: 1):
        yield


@contextmanager
def _connections(told: Callable[[str], None]) -> Iterator[None]:
    """Have every statement of a connection that is opened from now on told before it runs."""

    class Watched(sqlite3.Connection):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.set_trace_callback(told)

    connect = sqlite3.connect
    sqlite3.connect = lambda *a, **n: connect(*a, **{**n, "factory": Watched})  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.connect = connect  # type: ignore[assignment]


@contextmanager
def readonly(dice: random.Random) -> Iterator[None]:
    """Nothing can be written, though the file is open."""

    class Refusing(sqlite3.Connection):
        """Says what SQLite says of a disk that was mounted again for reading."""

        def execute(self, sql: str, *arguments: Any) -> Any:
            _refuse(now, sql)
            return super().execute(sql, *arguments)

        def executemany(self, sql: str, *arguments: Any) -> Any:
            _refuse(now, sql)
            return super().executemany(sql, *arguments)

    connect = sqlite3.connect
    with _spans(dice, _nothing, _nothing) as now:
        sqlite3.connect = lambda *a, **n: connect(*a, **{**n, "factory": Refusing})  # type: ignore[assignment]
        try:
            yield
        finally:
            sqlite3.connect = connect  # type: ignore[assignment]


def _refuse(now: _Now, sql: str) -> None:
    if now.wrong and sql.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE", "REPLAC", "CREATE", "ALTER "):
        raise sqlite3.OperationalError("attempt to write a readonly database")


@contextmanager
def killed(dice: random.Random) -> Iterator[None]:
    """The process dies at a statement of its writer, by the hand of the operating system."""
    left = dice.choice((dice.randrange(1, 60), dice.randrange(1, 2_000)))

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with _connections(count):
        yield


@contextmanager
def _signalled(dice: random.Random, number: int) -> Iterator[None]:
    timer = threading.Timer(dice.uniform(0.05, 2.0), os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def interrupted(dice: random.Random) -> Iterator[None]:
    """Somebody presses Ctrl-C."""
    with _signalled(dice, signal.SIGINT):
        yield


@contextmanager
def terminated(dice: random.Random) -> Iterator[None]:
    """Somebody stops the service."""
    with _signalled(dice, signal.SIGTERM):
        yield


AFFLICTIONS: Final[dict[str, Callable[[random.Random], Any]]] = {
    "clock": clock,
    "threads": threads,
    "descriptors": descriptors,
    "full disk": full,
    "read-only disk": readonly,
    "killed": killed,
    "Ctrl-C": interrupted,
    "SIGTERM": terminated,
}
"""Those of a worker process, by name."""

FILES: Final = ("file deleted", "file truncated", "file replaced")
"""Those of the file that all workers share: what was in it is lost, so that its books prove nothing."""


def befall(path: str, what: str, dice: random.Random) -> None:
    """Do something to the file beneath its users."""
    if what == "file deleted":
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(path + suffix):
                os.unlink(path + suffix)
    elif what == "file truncated":
        if os.path.exists(path):
            os.truncate(path, dice.choice((0, 100, os.path.getsize(path) // 2)))
    else:
        other = path + ".other"
        with open(other, "wb") as file:
            file.write(dice.choice((b"", b"garbage" * 1_000, b"SQLite format 3\x00" + bytes(4_080))))
        os.chmod(other, 0o600)
        os.replace(other, path)


@contextmanager
def afflicted(names: list[str], dice: random.Random) -> Iterator[None]:
    """All of these at once."""
    with ExitStack() as stack:
        for name in names:
            if name in AFFLICTIONS:
                stack.enter_context(AFFLICTIONS[name](dice))
        yield
