"""The example service in the hands of a rude crowd: nobody gets a 500, nothing leaks, and the books are right."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from dspy_prod import CallRecord
from dspy_prod.testing import FaultPlan, Provider, Reset, Status
from tests.e2e.support import make_lm, until
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MODEL = "openai/gpt-4o-mini"
PRICES = {MODEL: (0.15, 0.60)}
WORDS = "[[ ## queue ## ]]\nbilling\n\n[[ ## answer ## ]]\n" + "we look into it " * 12 + "\n\n[[ ## completed ## ]]"

REFUSED = ("429", "503", "504")
"""What a client may be told on a machine that is too slow for the crowd; the example's fallback answers the rest."""


@dataclass
class Service:
    """uvicorn with the example.

    Attributes:
        pace: seconds within which a crowd comes, and that a client who leaves has waited at most.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    pace: float
    ends: Counter[str] = field(default_factory=Counter)

    def workers(self) -> list[psutil.Process]:
        """The processes that serve."""
        children = psutil.Process(self.process.pid).children()
        return [each for each in children if "resource_tracker" not in " ".join(each.cmdline())] or [
            psutil.Process(self.process.pid)
        ]

    def taken(self) -> list[tuple[int, int, float]]:
        """Threads, descriptors and megabytes of each worker."""
        return [(w.num_threads(), w.num_fds(), w.memory_info().rss / 2**20) for w in self.workers()]


@contextmanager
def running(provider: Provider, folder: Path, workers: int, pace: float, **variables: str) -> Iterator[Service]:
    """The example as its first lines say, on a port of its own and against this provider."""
    port, log = free_port(), folder / "service.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DSPY_PROD")}
    env = {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OPENAI_API_KEY": "test",
        "DSPY_PROD__API_BASE": provider.url,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DSPY_PROD__STORE": f"sqlite:///{folder}/state.db",
        "DSPY_PROD__PRICES": json.dumps({MODEL: {"input": 0.15, "output": 0.60}}),
        **variables,
    }
    command = [
        sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(ROOT / "examples" / "service"),
        "--port", str(port), "--workers", str(workers), "--timeout-graceful-shutdown", "3", "--no-access-log",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    children: list[psutil.Process] = []
    try:
        service = Service(f"http://127.0.0.1:{port}", process, log, pace)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            started = log.read_text().count("Application startup complete")
            return started == workers and httpx.get(f"{service.url}/readyz").status_code == 200

        until(ready, 120)
        children = psutil.Process(process.pid).children()
        yield service
    finally:
        for each in children:
            if each.is_running():
                each.kill()
        process.kill()
        process.wait()


async def visit(service: Service, client: httpx.AsyncClient, number: int, dice: random.Random) -> None:
    """One client: asks for an answer or a stream, and in two of five cases leaves at some moment."""
    path = "/triage/stream" if number % 2 else "/triage"
    patience = dice.uniform(0.0, service.pace) if dice.random() < 0.4 else 60.0
    said = {"X-User": f"client-{number}", "X-Tenant": f"tenant-{number % 5}"}

    async def ask() -> str:
        async with client.stream("POST", path, json={"text": f"<{number}> it is broken"}, headers=said) as response:
            body = b"".join([part async for part in response.aiter_bytes()])
            if path == "/triage/stream" and response.status_code == 200:
                return "200" if body.endswith(b"data: [DONE]\n\n") else "broken off"
            return str(response.status_code)

    try:
        end = await asyncio.wait_for(ask(), patience)
    except asyncio.TimeoutError:
        end = "left"
    except httpx.HTTPError as error:
        end = type(error).__name__
    service.ends[end] += 1


async def crowd(service: Service, numbers: range, *, seed: int, meanwhile: Any = None) -> None:
    """Clients that come one after another, and not all of whom wait."""
    dice = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=60) as client:

        async def come(number: int, after: float, own: random.Random) -> None:
            await asyncio.sleep(after)
            await visit(service, client, number, own)

        clients = [come(number, dice.uniform(0, service.pace), random.Random(dice.random())) for number in numbers]
        await asyncio.gather(*clients, *([] if meanwhile is None else [meanwhile()]))


def assert_books(provider: Provider, folder: Path) -> Counter[str]:
    """The ledger has exactly the bill of each client whose calls are confirmed, and no less than that of the others.

    Returns:
        How many records have which outcome, how many are `unconfirmed`, and how many were cancelled before they were
        sent, so that they are `free`.
    """
    lm = make_lm(provider.url, model=MODEL, store=f"sqlite:///{folder}/state.db", namespace="triage", prices=PRICES)
    assert lm.health().holds == 0
    records: dict[str, list[CallRecord]] = defaultdict(list)
    for record in lm.ledger.records(limit=10_000):
        assert record.user is not None
        records[record.user].append(record)
    billed: dict[str, int] = defaultdict(int)
    rows = {row.call_id: row.nano for row in provider.bill.rows}
    for call in provider.calls:
        number = re.search(r"<(\d+)>", call.prompt)
        assert number is not None
        billed[f"client-{number[1]}"] += rows.get(call.call_id, 0)
    assert set(billed) <= set(records)
    for user, own in records.items():
        spent = sum(record.cost_nano or 0 for record in own)
        if any(record.estimated for record in own):
            assert spent >= billed[user], user
        else:
            assert spent == billed[user], user
    every = [record for own in records.values() for record in own]
    total = sum(record.cost_nano or 0 for record in every)
    unconfirmed = sum(record.cost_nano or 0 for record in every if record.estimated)
    summary = lm.costs()
    assert round(summary.today_usd * 1e9) == total
    assert round(summary.unconfirmed_usd * 1e9) == unconfirmed
    lm.close()
    outcomes = Counter(record.outcome for record in every)
    outcomes["unconfirmed"] = sum(record.estimated for record in every)
    outcomes["free"] = sum(record.outcome == "cancelled" and record.cost_nano == 0 for record in every)
    return outcomes


def endure(provider: Provider, folder: Path, workers: int, clients: int, pace: float, **variables: str) -> Service:
    """Three crowds, the last one of which sees the service end."""
    with running(provider, folder, workers, pace, **variables) as service:
        asyncio.run(crowd(service, range(clients), seed=1))
        assert_idle(service, provider)
        before = service.taken()
        asyncio.run(crowd(service, range(clients, 2 * clients), seed=2))
        assert_idle(service, provider)
        after = service.taken()
        for (threads, files, memory), (more_threads, more_files, more_memory) in zip(before, after, strict=True):
            assert more_threads <= threads + 8
            assert more_files <= files + 24  # connections to the provider are pooled
            assert more_memory <= memory + 40
        assert set(service.ends) <= {"200", "left", *REFUSED}
        assert service.ends["200"] > clients / 2
        assert service.ends["left"] > clients / 4

        async def end() -> None:
            await asyncio.sleep(pace / 2)
            service.process.send_signal(signal.SIGTERM)

        began = time.monotonic()
        asyncio.run(crowd(service, range(2 * clients, 3 * clients), seed=3, meanwhile=end))
        assert service.process.wait(30) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 25
        log = service.log.read_text()
        assert service.ends["500"] == 0, log
        # Who came too late was not let in; who was inside was served, or cut off when the time was over.
        late = {"ConnectError", "ReadError", "RemoteProtocolError", "broken off", "ConnectTimeout"}
        assert set(service.ends) <= {"200", "left", *REFUSED, *late}, service.ends
        assert sum(service.ends.values()) == 3 * clients
        # uvicorn shows whom it cut off as an error; nothing else is one.
        assert log.count("Traceback") <= log.count("CancelledError: Task cancelled, timeout graceful"), log
    return service


def assert_idle(service: Service, provider: Provider) -> None:
    """Nothing is in flight any more, neither here nor there, and the worker that answers says so."""
    until(lambda: provider.in_flight == 0, 30)
    until(lambda: httpx.get(f"{service.url}/readyz").json()["in_flight"] == 0, 30)


@pytest.mark.long
def test_a_rude_crowd_and_an_end_in_the_middle(tmp_path: Path) -> None:
    """One worker, clients that leave when they like, and SIGTERM while others are being served."""
    with Provider(latency=(0.02, 0.3), prices=PRICES, chunks=12, chunk_delay=0.01, answer=WORDS) as provider:
        service = endure(provider, tmp_path, 1, 30, 0.5, DSPY_PROD__ENGINE="lm15")
        outcomes = assert_books(provider, tmp_path)
        assert outcomes["ok"] >= service.ends["200"]  # each of them by the model, none by a fallback
        assert outcomes["cancelled"] > 3
        assert outcomes["unconfirmed"] + outcomes["free"] >= outcomes["cancelled"]


@pytest.mark.chaos
def test_four_workers_share_a_store_and_lose_nothing(tmp_path: Path) -> None:
    """As above, with 200 clients at a time, a provider that fails now and then, and MLflow."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_experiment("triage")
    faults = FaultPlan.mix({Status(500): 0.03, Status(429): 0.02, Reset("during"): 0.02}, seed=1)
    with Provider(
        latency=(0.1, 2.0), prices=PRICES, chunks=12, chunk_delay=0.01, answer=WORDS, faults=faults
    ) as provider:
        tracking = json.dumps({"experiment_name": "triage", "tracking_uri": uri})
        service = endure(provider, tmp_path, 4, 200, 5.0, DSPY_PROD__TRACKING=tracking)
        outcomes = assert_books(provider, tmp_path)
        assert outcomes["ok"] > 100
        assert outcomes["unconfirmed"] > 5
    lost = sum(map(int, re.findall(r"(\d+) traces (?:did not reach|wait)", service.log.read_text())))
    calls = program_calls(tmp_path)
    assert calls > 300
    assert calls - lost <= traces_in(client) <= calls


def program_calls(folder: Path) -> int:
    """How often the program was called, however that ended."""
    lm = make_lm("http://127.0.0.1:9", model=MODEL, store=f"sqlite:///{folder}/state.db", namespace="triage")
    return len(lm.ledger.program_calls(limit=10_000))


def traces_in(client: Any) -> int:
    """How many traces MLflow has."""
    experiment, found, token = client.get_experiment_by_name("triage").experiment_id, 0, ""
    while token is not None:
        page = client.search_traces(
            locations=[experiment], max_results=500, page_token=token or None, include_spans=False
        )
        found, token = found + len(page), page.token or None
    return found
