"""Identical concurrent calls of several processes share one upstream call, through the store."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from dspy_prod.testing import Provider, Status
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import until
from tests.integration.askers import QUESTION, ask_the_same
from tests.stores.redis.servers import started_valkey

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.integration.askers"])


class Crowds:
    """Processes of some callers each, all of which ask the same."""

    def __init__(self, store: str) -> None:
        self.store = store
        self.processes: list[Any] = []
        self._ready, self._results = SERVER.Queue(), SERVER.Queue()

    def start(self, provider: Provider, processes: int = 1, callers: int = 16, **options: Any) -> None:
        """Begin, and wait until all callers have asked."""
        begun = [
            SERVER.Process(
                target=ask_the_same,
                args=(provider.url, self.store, callers, options, self._ready, self._results),
                daemon=True,
            )
            for _ in range(processes)
        ]
        self.processes += begun
        for process in begun:
            process.start()
        for _ in begun:
            self._ready.get(timeout=60)

    def outcomes(self, processes: int) -> Counter[str]:
        """What the callers of so many processes got."""
        found: Counter[str] = Counter()
        for _ in range(processes):
            for each in self._results.get(timeout=60):
                found[each if isinstance(each, str) else each[0]] += 1
        return found

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    """The URL of a server for all of these tests."""
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store that processes share, with nothing in it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state.db"
        return
    url = request.getfixturevalue("valkey")
    yield f"{url}/0"
    with closing(redis.Redis.from_url(url)) as client:
        client.flushall()


@pytest.fixture
def crowds(shared_url: str) -> Iterator[Crowds]:
    made = Crowds(shared_url)
    yield made
    made.end()


def test_crowds_in_four_processes_make_one_upstream_call(serve: MakeProvider, crowds: Crowds) -> None:
    """64 identical calls in four processes are one call at the provider, and everybody gets its answer."""
    provider = serve(answer="the answer")
    provider.hold()
    crowds.start(provider, 4)
    provider.release()
    assert crowds.outcomes(4) == {"the answer": 64}
    assert len(provider.calls) == 1


@pytest.mark.chaos
def test_a_killed_leader_is_followed_by_one_other(serve: MakeProvider, crowds: Crowds) -> None:
    """When the leading process is killed, one of the others asks once more, soon; everybody there is answered."""
    provider = serve(answer="the answer")
    provider.hold()
    crowds.start(provider)
    until(lambda: len(provider.calls) == 1)
    crowds.start(provider, 3)
    (leader, *_) = crowds.processes
    assert len(provider.calls) == 1
    os.kill(leader.pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(provider.calls) == 2, 20)
    assert time.monotonic() - killed < 10
    provider.release()
    assert crowds.outcomes(3) == {"the answer": 48}
    assert len(provider.calls) == 2


@pytest.mark.slow
def test_a_leader_out_of_time_passes_the_lead_to_one_process(serve: MakeProvider, crowds: Crowds) -> None:
    """A deadline is its own callers' fate: one other process asks once more, and the others go on waiting."""
    provider = serve(answer="the answer")
    provider.hold()
    crowds.start(provider, callers=1, deadline=2.0)
    until(lambda: len(provider.calls) == 1)
    crowds.start(provider, 2)
    assert crowds.outcomes(1) == {"DeadlineExceededError": 1}
    until(lambda: len(provider.calls) == 2)
    provider.release()
    assert crowds.outcomes(2) == {"the answer": 32}
    assert len(provider.calls) == 2


@pytest.mark.slow
def test_an_upstream_s_verdict_makes_each_process_ask_once(serve: MakeProvider, crowds: Crowds) -> None:
    """An error is not shared between processes: each has one caller ask, whose error its other callers share."""
    provider = serve(faults=Status(400, delay=3.0))
    crowds.start(provider, 3)
    until(lambda: len(provider.calls) == 1)
    ((error, number),) = crowds.outcomes(3).items()
    assert number == 48
    assert error not in (QUESTION, "the answer")
    assert 2 <= len(provider.calls) <= 3
