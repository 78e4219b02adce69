"""What of its shares a process uses, noted where its death does not take it along.

A file beside the store's, one for each process, mapped into memory: a note costs no system call, and after a
`kill -9` the system still has it. It says nothing after the machine went down, because it is never synced; then, as
when the file is gone, whatever the process had drawn counts as used.
"""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Final

from dspy_prod.runtime import private
from dspy_prod.runtime.boot import boot, is_this_boot
from dspy_prod.stores.durable.tables import CELLS

_HEADER: Final = struct.Struct("<8s40s")
_MAGIC: Final = b"dspyprod"
_FIRST: Final = 64
_CELL: Final = struct.Struct("<qqq")
_STRIDE: Final = 32
_SIZE: Final = _FIRST + CELLS * _STRIDE


class Cells:
    """The cells of one process, in a file that is made when the first is taken; see `durable.tables.Cells`.

    Args:
        path: the store's file.
        owner: the process's id in it.
    """

    def __init__(self, path: str, owner: str) -> None:
        self.path = place(path, owner)
        self.calls = 512
        self._map: mmap.mmap | None = None
        self._free = list(range(CELLS - 1, -1, -1))

    def take(self) -> int | None:
        """A cell of one's own; None when there is none, or there can be no file.

        What it said last stays, for `Share` counts on from there.
        """
        if self._map is None or not self.path.exists():
            try:
                self._open(None if self._map is None else bytes(self._map))
            except (OSError, ValueError):
                return None
        return self._free.pop() if self._free else None

    def leave(self, cell: int) -> None:
        """The cell is free."""
        self._free.append(cell)

    def note(self, cell: int, charged: int, in_flight: int, calls: int) -> None:
        """Write a cell: what ended calls cost since it was first used, what calls in flight may cost, how many.

        In this order, so that a call that ends is never missing from both sums.
        """
        assert self._map is not None
        _CELL.pack_into(self._map, _FIRST + cell * _STRIDE, charged, in_flight, calls)

    def read(self, cell: int) -> tuple[int, int, int]:
        """What `note` wrote."""
        assert self._map is not None
        charged, in_flight, calls = _CELL.unpack_from(self._map, _FIRST + cell * _STRIDE)
        return charged, in_flight, calls

    def forget(self) -> None:
        """All of them were read by others, and count no more."""
        self._map = None
        self._free = list(range(CELLS - 1, -1, -1))

    def lost(self) -> None:
        """The store's file was deleted or replaced, perhaps with all that lay beside it: write another one."""
        if self._map is not None and not self.path.exists():
            with contextlib.suppress(OSError, ValueError):
                self._open(bytes(self._map))

    def close(self, delete: bool) -> None:
        """No share is begun any more; deleted when nothing of what was drawn is left.

        Else calls in flight still note their ends here: nothing else tells what they cost.
        """
        if delete:
            remove(self.path)

    def _open(self, content: bytes | None = None) -> None:
        private.own_file(self.path)
        handle = os.open(self.path, os.O_RDWR)
        try:
            # Written, not only made longer: a full disk must fail here, and not when memory is written to.
            os.write(handle, content or _header().ljust(_SIZE, b"\0"))
            self._map = mmap.mmap(handle, _SIZE)
        finally:
            os.close(handle)


def place(path: str, owner: str) -> Path:
    """Where a process's cells are."""
    return Path(f"{path}-{owner}.drawn")


def left_by(path: str, owner: str) -> dict[int, tuple[int, int, int]] | None:
    """What a process left in its cells; None when that says nothing."""
    file = place(path, owner)
    try:
        private.check(file)
        private.restrict(file.parent, file)
        content = file.read_bytes()
        magic, run = _HEADER.unpack_from(content)
        if magic != _MAGIC or len(content) < _SIZE or not is_this_boot(run.rstrip(b"\0").decode()):
            return None
    except (OSError, ValueError, struct.error):
        return None
    return {cell: _CELL.unpack_from(content, _FIRST + cell * _STRIDE) for cell in range(CELLS)}


def orphans(path: str, owners: Collection[str]) -> list[Path]:
    """The cells of processes that hold nothing: they died before they did, or after all was given back."""
    store = Path(path)
    known = {place(path, owner).name for owner in owners}
    return [file for file in store.parent.glob(f"{glob.escape(store.name)}-*.drawn") if file.name not in known]


def remove(file: Path) -> None:
    """Delete a file of cells."""
    with contextlib.suppress(OSError):
        file.unlink()


def _header() -> bytes:
    return _HEADER.pack(_MAGIC, boot().encode()[:40])
