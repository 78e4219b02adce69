"""Four worker processes on one store: one circuit a route, and operators whom all of them obey."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import CircuitBreaker
from dspy_prod.cli import main
from dspy_prod.status.controls import Controls
from dspy_prod.testing import Provider, Status
from tests.e2e import fleet_workers
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import MODEL, until
from tests.stores.redis.servers import started_valkey

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.e2e.fleet_workers"])

WORKERS, CALLERS = 4, 3
BREAKER: dict[str, Any] = {"failure_threshold": 3, "recovery_timeout": 1.5, "jitter": 0.0, "success_threshold": 3}
QUIET = 0.6
"""Seconds in which nothing may be sent."""


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.chaos)])
def url(request: pytest.FixtureRequest, sqlite_url: str) -> Iterator[str]:
    """Of a store that processes share."""
    if request.param == "sqlite":
        yield sqlite_url
        return
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


class Fleet:
    """The workers, and what they tell when they have ended."""

    def __init__(self, provider: Provider, store: str) -> None:
        self.provider, self.store = provider, store
        self.end, self.ready, self.told = SERVER.Event(), SERVER.Queue(), SERVER.Queue()
        self.processes: dict[str, Any] = {}

    def start(self, *names: str) -> None:
        """Start workers, and wait until they call."""
        for name in names:
            arguments = (self.provider.url, self.store, name, CALLERS, BREAKER, self.ready, self.end, self.told)
            self.processes[name] = SERVER.Process(target=fleet_workers.work, args=arguments, daemon=True)
            self.processes[name].start()
        for _ in names:
            self.ready.get(timeout=60)

    def calls(self, of: str = "") -> int:
        """How many calls of a worker, or of all, the provider has got."""
        return sum(call.last_message.startswith(of or "worker") for call in self.provider.calls)

    def answered(self) -> None:
        """Wait until every worker has been answered again."""
        before = {name: self.calls(name) for name in self.processes}
        until(lambda: all(self.calls(name) > before[name] + CALLERS for name in before), 30)

    def ended(self) -> dict[str, tuple[dict[str, int], list[str]]]:
        """Have all end; how the calls of each worker ended, and what its listeners heard."""
        self.end.set()
        living = [process for process in self.processes.values() if process.is_alive()]
        return {name: (ended, heard) for name, ended, heard in [self.told.get(timeout=60) for _ in living]}


@pytest.fixture
def fleet(serve: MakeProvider, url: str) -> Iterator[Fleet]:
    """Four workers that are being answered. What is called poison fails."""
    provider = serve(latency=0.02, faults=lambda call: Status(503) if "poison" in call.last_message else None)
    fleet = Fleet(provider, url)
    fleet.start(*(f"worker{number}" for number in range(WORKERS)))
    fleet.answered()
    yield fleet
    fleet.end.set()
    for process in fleet.processes.values():
        process.kill()
        process.join(10)


def silence(fleet: Fleet, since: float) -> list[float]:
    """When calls came that came after a moment (monotonic), once nothing has come for a while."""
    until(lambda: time.monotonic() - max([since, *(call.received_at for call in fleet.provider.calls)]) > QUIET, 20)
    return [call.received_at - since for call in fleet.provider.calls if call.received_at > since]


def test_four_workers_have_one_circuit_and_obey_an_operator(
    fleet: Fleet, connect: MakeLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own calls are answered all the time: they hear of it from the one that failed, and from nobody else.

    Of a stop they hear from a shell, also those that begin later, until they are told that they may go on.
    """
    lm = connect(fleet.provider, store=fleet.store, breaker=CircuitBreaker(**BREAKER))
    for _ in range(3):
        with pytest.raises(LMServerError):
            lm("poison")
    assert lm.pipeline.store.flush(10)
    opened = time.monotonic()
    late = silence(fleet, opened)
    assert len(late) <= WORKERS * CALLERS, late  # what was under way, and nothing more
    assert lm.health().breakers[0].state != "closed"  # half-open by now where the machine is busy

    resumed = len(fleet.provider.calls)
    fleet.answered()
    for one, following in pairwise(fleet.provider.calls[resumed : resumed + 3]):
        assert one.finished_at is not None
        assert following.received_at >= one.finished_at, "two probes were out"

    where = ["--store", fleet.store, "--namespace", "e2e"]
    assert main(["stop", "--program", "triage", "--reason", "wrong answers", *where]) == 0
    said = time.monotonic()
    assert "program 'triage' is stopped: wrong answers" in capsys.readouterr().out
    late = silence(fleet, said)
    assert max(late, default=0.0) < 2.0

    fleet.processes.pop("worker0").kill()
    fleet.start("worker9")
    assert fleet.calls("worker9") == 0
    assert main(["resume", "--program", "triage", *where]) == 0
    fleet.answered()
    newcomer, *others = sorted(fleet.ended().items(), reverse=True)
    assert set(newcomer[1][0]) == {"answer", "stopped"}
    for _, (ended, heard) in others:
        assert set(ended) == {"answer", "circuit_open", "stopped"}
        counts = Counter(heard)
        assert (counts["breaker_opened"], counts["breaker_closed"]) == (1, 1)
        assert (counts["calls_stopped"], counts["calls_resumed"]) == (1, 1)


@pytest.mark.parametrize(
    ("stop", "what"), [({"model": MODEL}, "model"), ({"tenant": "worker1"}, "tenant"), ({"everything": True}, "all")]
)
def test_what_is_stopped_is_stopped_alone(
    connect: MakeLM, serve: MakeProvider, sqlite_url: str, stop: Any, what: str
) -> None:
    """Who is not meant goes on; a model's calls go on with a fallback, and nobody else's do."""
    spare = dspy_prod.LM("openai/spare", api_base=serve().url, api_key="test", store=sqlite_url, cache=False)
    lm = connect(serve(), store=sqlite_url, fallbacks=[spare])
    controls = Controls(lm.pipeline.store)
    controls.stop(**stop, reason="why")
    ends = {}
    for tenant in ("worker1", "worker2"):
        with dspy_prod.call_context(tenant=tenant):
            ends[tenant] = fleet_workers.ask(lm, "question"), [row.model for row in lm.ledger.records(tenant=tenant)]
    expected: dict[str, Any] = {
        "model": {"worker1": ("answer", ["openai/spare"]), "worker2": ("answer", ["openai/spare"])},
        "tenant": {"worker1": ("stopped", [MODEL]), "worker2": ("answer", [MODEL])},
        "all": {"worker1": ("stopped", [MODEL]), "worker2": ("stopped", [MODEL])},
    }
    assert ends == expected[what]
    assert controls.resume(**stop)
    assert fleet_workers.ask(lm, "question") == "answer"
