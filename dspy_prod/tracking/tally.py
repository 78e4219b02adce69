"""How many traces are due, in memory that the exporter process shares: a program that is killed tells nobody."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from typing import Final

ADMITTED: Final = 0
"""Index of the traces that were begun and not turned away."""
LEFT_OUT: Final = 1
"""Index of those that sampling left out."""
SETTLED: Final = 2
"""Index of those in MLflow, or known to be lost, when the exporter that runs now was started."""

_BYTES: Final = 3 * 8


class Tally:
    """Three numbers, each written by one side of the courier.

    Attributes:
        numbers: by the indices above.
        file: descriptor of the memory; None where no other process can have it.
    """

    def __init__(self) -> None:
        self.file: int | None = None
        self.renew()

    def renew(self) -> None:
        """Begin at zero in other memory: in a forked child, this is the parent's."""
        self.close()
        memory = mmap.mmap(-1, _BYTES)
        if os.name == "posix":
            with contextlib.suppress(OSError):  # nowhere to put it: then nobody else can look
                self.file = _file()
                self._identity = _identity(self.file)
                memory = mmap.mmap(self.file, _BYTES)
        self.numbers = memoryview(memory).cast("q")

    def close(self) -> None:
        """Let nobody else look any more."""
        file, self.file = self.shared(), None
        if file is not None:
            os.close(file)

    def shared(self) -> int | None:
        """The descriptor, unless the program has closed it (a daemon closes all) and it is somebody else's now."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                if _identity(self.file) == self._identity:
                    return self.file
        return None


def due(file: int | None) -> int | None:
    """How many traces an exporter process has to bring to MLflow in all; None when it cannot be known."""
    if file is None:
        return None
    numbers = memoryview(mmap.mmap(file, _BYTES)).cast("q")
    return numbers[ADMITTED] - numbers[LEFT_OUT] - numbers[SETTLED]


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _file() -> int:
    """The descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        file: int = os.memfd_create("dspy_prod-tally")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.truncate(file, _BYTES)
    return file
