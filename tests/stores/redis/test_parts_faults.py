"""Programs, runs and experiments on a server that goes away, forgets its scripts and cuts connections; and deaths."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.trials import Tally
from tests.stores.redis.servers import started_valkey
from tests.stores.sqlite.test_processes import SERVER, run_processes
from tests.stores.test_programs import call as program_call
from tests.stores.trial_support import call, expose, made, outcome

pytestmark = pytest.mark.chaos

UNITS = 600
CALLS = 3
WINDOWS: dict[str | None, float] = {None: 3_600.0, "resolved": 3_600.0}


@pytest.fixture
def own() -> Iterator[str]:
    """The URL of a server that a test may treat badly."""
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


def work(url: str, namespace: str, barrier: Any, results: Any) -> None:
    """Calls for the same units as others, a program's call and now and then an answer, until all is written."""
    store = RedisStore(url, namespace)
    made(store, windows=WINDOWS)
    barrier.wait(60)
    me, kept = str(os.getpid()), []
    for number in range(UNITS):
        expose(store, f"u{number}", me)
        for _ in range(CALLS):
            call(store, f"u{number}", list_nano=1)
        outcome(store, f"u{number}", 1.0, id=me)
        store.programs.append(program_call(f"{me} {number}", cost_nano=7))
        if number % 10 == 0:
            kept.append(store.runs.keep("it", b"key", b"x", "m", True))
            time.sleep(0.02)  # something is to befall it
    deadline = time.monotonic() + 60
    while not store.flush(1):
        assert time.monotonic() < deadline
    results.put([told for future in kept if (told := ordinal(future)) is not None])
    store.close()


def ordinal(kept: Future[int]) -> int | None:
    """Of an answer; None where the store could not be used just then, and whoever asked was told so."""
    try:
        return kept.result(60)
    except (OSError, StoreUnavailableError):
        return None


class Trouble(threading.Thread):
    """Cuts connections, makes the server forget its scripts, and has it stand still for longer than is waited for."""

    def __init__(self, url: str, namespace: str) -> None:
        super().__init__()
        self.cuts = 0
        self.ended = threading.Event()
        self._connection = Connection(url, namespace)

    def run(self) -> None:
        client, begun = self._connection.client(), self._connection.key("trial", "e", "values")
        while not (client.exists(begun) or self.ended.wait(0.01)):
            pass
        while not self.ended.wait(0.1):
            client.client_kill_filter(_type="normal", skipme=True)
            self.cuts += 1
            if self.cuts % 7 == 0:
                client.script_flush()
            if self.cuts == 5:
                with contextlib.suppress(*Connection.failures()):
                    client.execute_command("DEBUG", "SLEEP", "1.6")


def test_nothing_is_lost_or_counted_twice(own: str) -> None:
    namespace = uuid.uuid4().hex
    trouble = Trouble(own, namespace)
    trouble.start()
    try:
        told = [ordinal for some in run_processes(work, (own, namespace), 2) for ordinal in some]
    finally:
        trouble.ended.set()
        trouble.join(30)
    assert trouble.cuts >= 5
    with contextlib.closing(RedisStore(own, namespace)) as store:
        assert store.trials.tally("e") == Tally(UNITS, mixed=UNITS)
        assert calls_of(own, namespace) == {b"%d" % (2 * CALLS)}
        [sums] = store.programs.sums()
        assert (sums.totals.calls, sums.totals.cost_nano) == (2 * UNITS, 2 * UNITS * 7)
        assert len(store.programs.calls()) == 2 * UNITS
        answers = store.runs.answers("it")
        assert answers == [(b"key", number) for number in range(len(answers))]
        assert 0 < len(told) == len(set(told)) <= len(answers) <= 2 * UNITS // 10
        assert set(told) <= set(range(len(answers)))


def calls_of(url: str, namespace: str) -> set[bytes]:
    """How many calls units had: the sum of the nano-USD of as many, or the difference is told."""
    with contextlib.closing(Connection(url, namespace)) as connection:
        rows = [row.split(b" ") for row in connection.client().hvals(connection.key("trial", "e", "calls"))]
    assert all(row[0] == row[4] for row in rows), "each call costs one"
    return {row[0] for row in rows}


def expose_until_killed(url: str, namespace: str, ready: Any) -> None:
    """Expose without end; tell now and then how many are known to be durable."""
    store = RedisStore(url, namespace)
    made(store, windows=WINDOWS)
    for number in itertools.count(1):
        expose(store, f"u{number}", f"arm{number % 3}")
        call(store, f"u{number}", list_nano=1)
        if number % 200 == 0 and store.flush(10):
            ready.put(number)


def test_a_killed_process_loses_the_last_moment_and_counts_nothing_twice(own: str) -> None:
    namespace, told = uuid.uuid4().hex, 0
    for _ in range(2):  # the second one begins with the units of the first
        ready = SERVER.Queue()  # who is killed may hold its lock
        worker = SERVER.Process(target=expose_until_killed, args=(own, namespace, ready), daemon=True)
        worker.start()
        for _ in range(3):
            told = max(told, ready.get(timeout=60))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with contextlib.closing(RedisStore(own, namespace)) as store:
        units = store.trials.tally("e").units
        assert units >= told
        assert sum(arm.first for arm in store.trials.counts("e")) == units
        assert calls_of(own, namespace) <= {b"1", b"2"}, "each process made one call for a unit"
