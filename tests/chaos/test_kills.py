"""One dollar, several processes with many callers each, and kills: the provider's bill is the judge."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dspy_prod
from dspy_prod.records import NANO
from dspy_prod.testing import Provider
from tests.e2e.support import until

DOLLAR = NANO
OUTPUT = 50
PRICE = 1.0
"""USD per million tokens of output, input is free: a call costs 0.00005 USD, which is also its bound."""

WORKER = """
import sys, threading
import dspy_prod

url, store, name = sys.argv[1:4]
callers, output, price = int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])
lm = dspy_prod.LM(
    "openai/killed", api_base=url, api_key="test", cache=False, max_tokens=output, store=store, namespace="kills",
    retry=dspy_prod.Retry(attempts=1), limit=dspy_prod.RateLimit(rpm=600_000, tpm=60_000_000, concurrency=400),
    prices={"openai/killed": dspy_prod.Price(input=0, output=price)}, budget=dspy_prod.Budget(usd=1, per="total"),
)
over = threading.Event()

def call(number):
    made = 0
    while not over.is_set():
        made += 1
        try:
            lm(f"{name} {number} {made}")
        except dspy_prod.BudgetExceededError as error:
            over.set()

threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("refused", flush=True)
"""


class Worker:
    """A process with many callers."""

    def __init__(self, provider: Provider, store: str, callers: int, name: str) -> None:
        root = str(Path(dspy_prod.__file__).parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, provider.url, store, name, str(callers), str(OUTPUT), str(PRICE)],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": root, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("processes", "callers", "kills"),
    [pytest.param(2, 16, 6, id="short"), pytest.param(4, 64, 40, id="long", marks=pytest.mark.slow)],
)
def test_a_dollar_is_spent_whoever_is_killed(tmp_path: Path, processes: int, callers: int, kills: int) -> None:
    """Never more than it, and nearly all of it before anybody is refused."""
    dice = random.Random(7)
    store = f"sqlite:///{tmp_path}/state.db?lease=2"
    pace = 0.05 if kills < 40 else 0.1
    with Provider(
        answer="ok", latency=(0.0, pace), prices={"killed": (0.0, PRICE)}, usage=(10, OUTPUT), bill_abandoned=True
    ) as provider:
        workers = [Worker(provider, store, callers, f"{number}") for number in range(processes)]
        until(lambda: len(provider.calls) > 100, 60, "the first calls")
        killed, first_refusal = 0, None
        while not all(worker.ended for worker in workers):
            time.sleep(dice.uniform(0.1, 0.5))
            if first_refusal is None and any(worker.ended for worker in workers):
                first_refusal = provider.bill.nano
            if killed < kills and first_refusal is None:
                victim = dice.randrange(processes)
                workers[victim].kill()
                killed += 1
                workers[victim] = Worker(provider, store, callers, f"{killed}-{victim}")
        billed = provider.bill.nano
        print(f"{killed} kills, {billed / DOLLAR:.4f} USD billed, {(first_refusal or 0) / DOLLAR:.4f} before a refusal")
        assert billed <= DOLLAR
        assert first_refusal is not None
        assert first_refusal >= 0.97 * DOLLAR
        assert killed >= kills // 2
    ledger = dspy_prod.LM("openai/killed", api_key="test", store=store, namespace="kills", budget=None).ledger
    assert sum(record.cost_nano or 0 for record in ledger.records()) >= billed
