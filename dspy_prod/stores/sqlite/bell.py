"""A few bytes beside the store's file, mapped into memory by all its processes: they change whenever a board does.

A look at them costs no system call: one that lets the interpreter's lock go, as reading a file does, would hand it to
the store's writer at every call. (Who truncates a mapped file ends those that look at it, as with SQLite's own `-shm`.
Nobody else may open it.)
Before a change is committed they say that one is under way, and after it who made it: so whoever reads the tables in
between, or after a process died in between, reads them again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path
from typing import Final

from dspy_prod.runtime import private

SIZE: Final = 64
_UNDER_WAY: Final = b"\x01"
_DONE: Final = b"\x02"
_LENGTH: Final = 17
LOOK: Final = 0.5
"""Seconds between two looks at whether the file is still there, and between two readings where there can be none."""
STALE: Final = 0.05
"""Seconds between two readings while a change is under way."""
GIVEN_UP: Final = 5.0
"""Seconds after which a change that is still under way is taken for that of a process that died."""


class Bell:
    """The bytes beside one file. Thread-safe: they are read and written as a whole.

    Args:
        path: the store's file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(f"{path}-board")
        self._map: mmap.mmap | None = None
        self._identity: tuple[int, int] | None = None
        self._look_at = 0.0
        self._since: tuple[bytes, float] = (b"", 0.0)

    @property
    def token(self) -> object:
        """What they say. While that is not to be relied on it changes with time."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look(now)
        found = self._map
        if found is None:
            return int(now / LOOK)
        said = found[:_LENGTH]
        return said if said[:1] != _UNDER_WAY else self._unsure(said, now)

    def _look(self, now: float) -> None:
        """See to it that the file is there, and is still the same."""
        self._look_at = now + LOOK
        try:
            status = os.stat(self.path)
            whole = (status.st_dev, status.st_ino) == self._identity and status.st_size >= SIZE
            if self._map is None or not whole:
                self._open()
        except (OSError, ValueError):
            self._map = None
            with contextlib.suppress(OSError, ValueError):
                private.own_file(self.path)
                self._open()

    def _open(self) -> None:
        self._map = None
        private.check(self.path)
        private.restrict(self.path.parent, self.path)
        handle = os.open(self.path, os.O_RDWR)
        try:
            status = os.fstat(handle)
            if status.st_size < SIZE:
                os.ftruncate(handle, SIZE)
            self._identity = status.st_dev, status.st_ino
            self._map = mmap.mmap(handle, SIZE)
        finally:
            os.close(handle)

    def _unsure(self, said: bytes, now: float) -> object:
        """A change is under way: the tables are to be read, but not for every call."""
        before, since = self._since
        if before != said:
            self._since = said, now
        elif now - since > GIVEN_UP:
            self.ring()
        return said, int(now / STALE)

    def begin(self) -> None:
        """A change is about to be committed."""
        self._write(_UNDER_WAY)

    def ring(self) -> None:
        """A change was committed, or may have been."""
        self._write(_DONE)

    def _write(self, kind: bytes) -> None:
        if self._map is None:
            self._look(time.monotonic())
        found = self._map
        if found is not None:
            found[:_LENGTH] = kind + os.urandom(16)
