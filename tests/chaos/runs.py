"""One run: workers on one file before one provider, things befall them, and then the books are compared."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import Provider
from tests.chaos.afflictions import AFFLICTIONS, FILES, befall
from tests.chaos.workload import faulty
from tests.e2e.support import PRICES

ROOT: Final = Path(__file__).parent.parent.parent
WORKERS: Final = 3
LEASE: Final = 1.0
"""Seconds after which what a dead worker held is charged."""
PATIENCE: Final = 120.0
"""Seconds for a run whose calls take seconds."""
RPM: Final = 240


@dataclass
class Run:
    """What happened in one run.

    Attributes:
        seed: repeats it, as far as the machine allows.
        calls: made in all.
        faults: by kind, what befell the workers and their file, and what the provider did.
        violations: what should not be, in words.
    """

    seed: int
    afflictions: list[str]
    calls: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def drawn(seed: int) -> list[str]:
    """What befalls in a run: nothing but the provider's own faults, one thing, or two."""
    dice = random.Random(seed)
    every = [*AFFLICTIONS, *FILES]
    return dice.sample(every, dice.choice((0, 1, 1, 1, 2, 2)))


def run(seed: int, calls: int, folder: Path, afflictions: list[str] | None = None) -> Run:
    """Make a run of `calls` calls in `folder`, an empty one."""
    result = Run(seed, drawn(seed) if afflictions is None else afflictions)
    dice = random.Random(f"run {seed}")
    path = folder / "state.db"
    usd = dice.choice((0.001, 0.01, 100.0))
    rpm = dice.choice((None, RPM))
    result.faults.update(result.afflictions)
    with Provider(prices=PRICES, latency=(0.0, 0.01), faults=faulty(0.2, seed)) as provider:
        base = {
            "url": provider.url, "store": f"sqlite:///{path}?lease={LEASE}", "afflictions": result.afflictions,
            "budget": usd, "rpm": rpm,
        }  # fmt: skip
        left, until = calls, time.monotonic() + PATIENCE
        workers: list[subprocess.Popen[str]] = []
        number = 0
        while (left > 0 or workers) and time.monotonic() < until:
            while left > 0 and len(workers) < WORKERS:
                part = min(left, max(20, calls // WORKERS // 3))
                left -= part
                number += 1
                workers.append(_worker({**base, "calls": part, "seed": seed * 1_000 + number}))
            for each in [each for each in workers if each.poll() is not None]:
                workers.remove(each)
                _note(result, each)
            if dice.random() < 0.01 and any(what in FILES for what in result.afflictions) and path.exists():
                befall(str(path), dice.choice([what for what in result.afflictions if what in FILES]), dice)
            time.sleep(0.02)
        for each in workers:
            each.kill()
            each.wait()
            result.violations.append(f"a worker hung; {result.ends}")
        try:
            provider.wait_until(lambda it: it.in_flight == 0, 20)
        except Exception as error:
            result.violations.append(f"calls still run at the provider: {error!r}")
        result.calls = sum(result.ends.values())
        result.faults.update(call.fault for call in provider.calls if call.fault is not None)
        if rpm is not None and not _lossy(result) and (most := provider.requests_in_window(60.0)) > rpm:
            result.violations.append(f"{most} requests within a minute, {rpm} allowed")
        bill = provider.bill.nano
    if not _lossy(result):
        _books(result, path, bill, round(usd * 1e9))
    return result


def _worker(task: dict[str, object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.worker", json.dumps(task)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _note(result: Run, worker: subprocess.Popen[str]) -> None:
    """How a worker ended: told by itself, or by a signal that befell it."""
    out, err = worker.communicate()
    expected = {"killed": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM, "Ctrl-C": -signal.SIGINT}
    if worker.returncode:
        result.ends["(a worker's end)"] += 1
        if worker.returncode not in {expected[each] for each in result.afflictions if each in expected} and not (
            "Ctrl-C" in result.afflictions and "KeyboardInterrupt" in err
        ):
            result.violations.append(f"a worker ended with {worker.returncode}: {err[-1_500:]}")
        return
    told = json.loads(out.splitlines()[-1])
    result.ends.update(told["ends"])
    result.violations += [f"no typed error: {each}" for each in told["strange"]]


def _lossy(result: Run) -> bool:
    return any(what in FILES for what in result.afflictions)


def _books(result: Run, path: Path, bill: int, budget: int) -> None:
    """The file can be read, holds nothing for the dead, and has charged no less than was billed."""
    if bill > budget:
        result.violations.append(f"the provider billed {bill} nano-USD of {budget}")
    if not path.exists():
        if bill:
            result.violations.append(f"there is no ledger of {bill} nano-USD")
        return
    with closing(SqliteStore(str(path), "e2e", lease=LEASE)) as store:
        deadline = time.monotonic() + 20
        while store.holds() and time.monotonic() < deadline:
            time.sleep(0.05)
        if store.holds():
            result.violations.append(f"{store.holds()} holds are left")
        charged = sum(sums.cost_nano for _, _, sums in store.totals())
        if charged < bill:
            result.violations.append(f"the ledger says {charged} nano-USD, the provider {bill}")
        store.records(limit=10)
    with closing(sqlite3.connect(path)) as connection:
        said = connection.execute("PRAGMA integrity_check").fetchone()
    if said != ("ok",):
        result.violations.append(f"integrity: {said}")
