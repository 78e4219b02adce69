"""A process that gives cached answers without a pause is killed: what is missing of their records is bounded."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from dspy_prod.records import Totals
from dspy_prod.stores.durable import inbox
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import DAY, record, until

SERVER = multiprocessing.get_context("forkserver")

MISSING = 300
"""Records that a killed process may take along."""


class Count:
    """A number in a file, which outlives who counts."""

    def __init__(self, path: Path) -> None:
        path.touch()
        with path.open("r+b") as file:
            file.truncate(8)
            self._map = mmap.mmap(file.fileno(), 8)

    @property
    def number(self) -> int:
        return int(struct.unpack("q", self._map)[0])

    @number.setter
    def number(self, number: int) -> None:
        self._map[:] = struct.pack("q", number)


def serve(path: str, count: Path, busy: float) -> None:
    """Give cached answers until killed, so many seconds of work apart that never lets go of the interpreter."""
    told = Count(count)
    kind = SqliteStore(path).kind(record("", call_id="", started_at=0.0, cached=True, outcome="cached"))
    while True:
        kind.served(DAY)
        told.number += 1
        free_at = time.perf_counter() + busy
        while time.perf_counter() < free_at:
            pass


@pytest.mark.parametrize("busy", [0.0, 0.0003])
def test_few_records_are_missing_after_a_kill(path: str, tmp_path: Path, busy: float) -> None:
    """As fast as one thread can, and as fast as a `Predict` does."""
    count = Count(tmp_path / "count")
    process = SERVER.Process(target=serve, args=(path, tmp_path / "count", busy))
    process.start()
    assert process.pid is not None
    until(lambda: count.number >= 2_500)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with contextlib.closing(SqliteStore(path)) as store:
        [(*_, sums)] = store.totals()
        found = store.records()
    assert sums == Totals(cached=sums.cached)
    assert 0 <= count.number + 1 - sums.cached <= MISSING + 1, "the last one may not have been counted"
    assert len({row.id for row in found}) == len(found) == sums.cached
    assert [row.id for row in found] == sorted((row.id for row in found), reverse=True)


def test_the_bounds_leave_room_for_those_under_way() -> None:
    """A batch is begun before callers are slowed down, and what one thread may have posted then is no more than is
    promised."""
    assert inbox.ENOUGH_FREE + inbox._AGAIN <= inbox.FULL <= MISSING - inbox._AGAIN
