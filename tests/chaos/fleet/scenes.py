"""What a fleet does, what befalls it meanwhile, and what must hold: each scene is one run on one store."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dspy_prod.records import NANO
from dspy_prod.testing import CallView, Provider
from tests.chaos.fleet.books import Violation, charged, checked
from tests.chaos.fleet.fleet import Fleet
from tests.chaos.fleet.stores import STORES, SqliteFile, ValkeyProcess
from tests.chaos.fleet.trouble import Trouble, killed, stopped
from tests.chaos.fleet.worker import Task
from tests.chaos.workload import faulty
from tests.e2e.support import MODEL

PRICE: Final = 1.0
"""USD per million tokens of output: a call of at most 100 of them is bounded by a hundredth of a cent."""
SLACK: Final = 0.5
"""Seconds after its deadline at which a call must have ended. Alone on a machine it is a tenth of a second; what is
taken off for a process that did not run is measured by one thread, and a call needs its turn more than once."""
STUCK: Final = 60.0
"""Seconds within which a fleet ends that is told to."""
SKEW: Final = 30.0
LIGHT: Final = ("connections cut", "scripts flushed")
"""What keeps a store from deciding for no longer than a retry."""


@dataclass
class Result:
    """One run.

    Attributes:
        faults: what was done to workers, store and calls, by kind.
        figures: what was measured, for a reader.
        violations: of which invariant, and how.
        checked: the invariants that this run was held to.
    """

    scene: str
    store: str
    calls: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def hold(self, invariant: str, holds: bool, otherwise: str) -> None:
        """Note whether an invariant holds."""
        self.checked.add(invariant)
        if not holds:
            self.violations.append((invariant, otherwise))


@dataclass(frozen=True)
class Size:
    """How many processes of how many callers, and the seed of all chance."""

    processes: int = 4
    callers: int = 64
    seed: int = 1


BOOKS: Final = (
    "bill <= budget", "nothing stays held", "ledger >= bill", "ledger - unconfirmed <= bill", "ledger == bill",
    "account == ledger",
)  # fmt: skip
CALLS: Final = ("every end is typed", "deadlines hold", "nothing hangs", "nothing told is lost")


def _tokens(call: CallView) -> tuple[int, int]:
    """Another number of tokens for each call, so that its charge tells which it was."""
    return 10, 1 + call.index * 37 % 100


@contextmanager
def _before(store: str, folder: Path, seed: int) -> Iterator[SqliteFile | ValkeyProcess]:
    shared = STORES[store](folder, seed)
    try:
        yield shared
    finally:
        shared.close()


def _after(result: Result, fleet: Fleet, provider: Provider, trouble: Trouble, began: float) -> None:
    """What holds for the calls of every scene."""
    fleet.end(STUCK)
    result.calls, result.ends = fleet.calls, fleet.ends
    result.faults = trouble.faults + Counter(f"provider: {c.fault}" for c in provider.calls if c.fault is not None)
    result.violations += fleet.violations
    result.violations += [("the chaos itself works", each) for each in trouble.failures]
    result.checked.update(CALLS)
    result.hold("deadlines hold", fleet.late <= SLACK, f"a call ended {fleet.late:.2f} s after its deadline")
    result.figures |= {"late": round(fleet.late, 3), "written after": round(fleet.took, 1)}
    try:
        provider.wait_until(lambda it: it.in_flight == 0, 20)
    except TimeoutError as error:
        result.violations.append(("nothing hangs", f"calls still run at the provider: {error}"))
    result.seconds = round(time.monotonic() - began, 1)


def _books(result: Result, shared: SqliteFile | ValkeyProcess, provider: Provider, usd: float) -> None:
    result.checked.update(BOOKS)
    all_lived = not result.faults["worker killed"] and not result.faults["worker stopped"]
    result.violations += checked(shared, provider.bill, round(usd * NANO), all_lived)
    with closing(shared.opened()) as store:
        sums = charged(store)
    told = {"billed": provider.bill.nano, "charged": sums.cost_nano, "unconfirmed": sums.unconfirmed_nano}
    result.figures |= {name: f"{nano / NANO:.6f} USD" for name, nano in told.items()}


def dollar(store: str, folder: Path, size: Size, *, usd: float = 1.0, kills: int = 0, patience: float = 400) -> Result:
    """Callers spend a budget until they are refused, while workers are killed."""
    result, began = Result(f"a budget, {kills} kills" if kills else "a budget", store), time.monotonic()
    prices, latency = {MODEL: (0.0, PRICE)}, (0.0, 0.05)
    with _before(store, folder, size.seed) as shared, Provider(prices=prices, usage=_tokens, latency=latency) as at:
        task = Task(at.url, shared.url, size.callers, size.seed, usd, PRICE, until_refused=True, skew=SKEW, timeout=30)
        fleet = Fleet(task, size.processes)
        trouble = Trouble(fleet)
        fleet.until(lambda: len(at.calls) > size.callers, 120, "the first calls")
        if kills:
            trouble.begin({"worker killed": killed}, random.Random(size.seed), (0.1, 1.0), kills)
        fleet.until(lambda: fleet.heard("ended"), patience, "spending the budget")
        trouble.end()
        fleet.until(lambda: fleet.heard("ended") == size.processes, 90, "everybody's refusal")
        _after(result, fleet, at, trouble, began)
        _books(result, shared, at, usd)
        if not kills:
            enough = at.bill.nano >= 0.99 * usd * NANO
            result.hold("bill >= 99 % of the budget", enough, f"{at.bill.usd} of {usd} USD")
    return result


def storm(store: str, folder: Path, size: Size, *, seconds: float, usd: float = 1_000.0, share: float = 0.2) -> Result:
    """Calls of every kind under everything that can befall the provider, the workers, the store and the way to it."""
    result, began = Result("everything", store), time.monotonic()
    prices, latency = {MODEL: (0.0, PRICE)}, (0.0, 0.03)
    with (
        _before(store, folder, size.seed) as shared,
        Provider(prices=prices, usage=_tokens, latency=latency, faults=faulty(share, size.seed)) as at,
    ):
        task = Task(
            at.url, shared.url, size.callers, size.seed, usd, PRICE,
            skew=SKEW, streams=True, deadlines=(0.3, 2.0, 5.0), max_wait=2.0,
        )  # fmt: skip
        fleet = Fleet(task, size.processes)
        trouble = Trouble(fleet)
        fleet.until(lambda: len(at.calls) > size.callers, 120, "the first calls")
        for kinds, pauses in (
            ({"worker killed": killed}, (0.5, 4.0)), ({"worker stopped": stopped}, (0.5, 6.0)),
            (shared.injections, (0.3, 3.0)),
        ):  # fmt: skip
            trouble.begin(dict(kinds), random.Random(f"{size.seed}:{sorted(kinds)}"), pauses)
        time.sleep(seconds)
        trouble.end()
        _after(result, fleet, at, trouble, began)
        _books(result, shared, at, usd)
    return result


def pace(store: str, folder: Path, size: Size, *, seconds: float, output: int = 100, kills: bool = False) -> Result:
    """More callers than 600 requests and 100,000 tokens a minute are enough for, in processes whose clocks differ.

    Args:
        output: tokens of an answer: up to 140 of them the requests bind, beyond the tokens do.
        kills: workers are killed, and what the store survives without a pause befalls it.
    """
    rpm, tpm = 600, 100_000
    name = f"a minute's limits, {output} tokens{', kills' if kills else ''}"
    result, began = Result(name, store), time.monotonic()
    prices = {MODEL: (0.0, PRICE)}
    with (
        _before(store, folder, size.seed) as shared,
        Provider(prices=prices, usage=(15, output - 15), latency=(0.0, 0.05)) as at,
    ):
        task = Task(
            at.url, shared.url if kills else shared.direct, size.callers, size.seed, 1_000.0, PRICE,
            max_tokens=output - 15, rpm=rpm, tpm=tpm, skew=SKEW, max_wait=120.0, deadlines=(150.0,), timeout=30,
        )  # fmt: skip
        fleet = Fleet(task, size.processes)
        trouble = Trouble(fleet)
        fleet.until(lambda: fleet.heard("ready") == size.processes, 120, "the first calls")
        first = time.monotonic()
        if kills:
            trouble.begin({"worker killed": killed}, random.Random(size.seed), (2.0, 8.0))
            light = {name: each for name, each in shared.injections.items() if name in LIGHT}
            trouble.begin(light, random.Random(size.seed + 1), (0.5, 3.0))
        time.sleep(seconds)
        trouble.end()
        until = first + seconds
        _after(result, fleet, at, trouble, began)
        _books(result, shared, at, 1_000.0)
        requests, tokens = at.requests_in_window(60.0), at.tokens_in_window(60.0)
        result.hold("limits hold in every minute", requests <= rpm and tokens <= tpm, f"{requests}, {tokens} tokens")
        slice_ = at.requests_in_window(10.0)
        result.hold("calls are paced", slice_ <= rpm / 6 * 1.3, f"{slice_} requests within ten seconds")
        sent = [call for call in at.calls if call.accepted and first < call.received_at <= until]
        part = max(len(sent) / rpm, sum(call.weight("billed") for call in sent) / tpm) / (seconds / 60)
        result.figures |= {"most in a minute": f"{requests} requests, {tokens} tokens", "used": f"{part:.1%}"}
        if seconds >= 60 and not kills:  # of less, the moment at which the last worker begins is too much
            result.hold("limits are used to 90 %", part >= 0.9, f"{part:.1%} are used")
    return result


def same(store: str, folder: Path, size: Size) -> Result:
    """Everybody asks the same at the same time."""
    result, began = Result("one question of all", store), time.monotonic()
    with _before(store, folder, size.seed) as shared, Provider(prices={MODEL: (0.0, PRICE)}, usage=_tokens) as at:
        at.hold()
        task = Task(at.url, shared.url, size.callers, size.seed, 1.0, PRICE, same=True, timeout=60)
        fleet = Fleet(task, size.processes)
        trouble = Trouble(fleet)
        fleet.until(lambda: fleet.heard("asked") == size.processes, 60, "asking")
        at.release()
        fleet.until(lambda: fleet.heard("ended") == size.processes, 60, "an answer for all")
        _after(result, fleet, at, trouble, began)
        _books(result, shared, at, 1.0)
        with closing(shared.opened()) as one:
            most = 1 if getattr(one, "flights", None) is not None else size.processes
        result.figures["upstream calls"] = len(at.calls)
        result.hold("one upstream call", 1 <= len(at.calls) <= most, f"{len(at.calls)} upstream calls")
        result.hold("everybody is answered", fleet.ends == {"answer": fleet.calls}, f"{dict(fleet.ends)}")
    return result
