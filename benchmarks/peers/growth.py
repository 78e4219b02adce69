"""Whether a call costs more in a store that has grown: rows of the ledger, cached answers, budgets of tenants.

All sizes of all subjects take turns, so that what grows is their size and not the machine's load.
"""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dspy
from tqdm.auto import tqdm

import dspy_prod
from benchmarks.common import MODEL, bare, call, guarded, interleaved, messages
from benchmarks.ledger_reads import fill
from benchmarks.peers.subjects import OURS, Peers, constant_params, hook, hooked, make_router, rested
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore

Turns = dict[str, Callable[[int], None]]
_BATCH = 2_000
_UNMEASURED = {
    "ledger": "LiteLLM's client and Router keep no ledger: there is nothing that grows.",
    "cache": "LiteLLM's memory cache keeps 200 answers by default, so it does not grow either.",
    "scopes": "A Router has a budget for each provider, deployment or (with a licence) tag: here, one per deployment.",
}


def ledger(sizes: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000), rounds: int = 20) -> dict[str, Any]:
    """CPU of a call, in µs, by rows of the ledger (memory keeps the newest 100,000 of them, Redis 200,000)."""
    with Peers() as peers:
        turns: Turns = {}
        stores: list[Store] = []
        for size in tqdm(sizes, unit="ledger", leave=False):
            made = (MemoryStore(), SqliteStore(f"{peers.folder}/{size}.db"), RedisStore(peers.redis, f"rows-{size}"))
            stores += made
            for name, store in zip(OURS, made, strict=True):
                if isinstance(store, SqliteStore):
                    fill(store, size)
                    store = SqliteStore(f"{peers.folder}/{size}.db")
                    stores.append(store)
                else:
                    _append(store, size)
                turns[f"{name} @ {size}"] = _repeated(guarded(store=store, cache=False), store)
        found = _medians(turns, rounds)
        for store in stores:
            store.close()
    return {"beside": _UNMEASURED["ledger"], **found}


def cache(sizes: Sequence[int] = (100, 1_000, 10_000, 100_000), rounds: int = 20) -> dict[str, Any]:
    """CPU of a cache hit, in µs, by answers that are cached."""
    before, most = dspy.cache, max(sizes) + 1_000
    with Peers() as peers:
        turns: Turns = {}
        for size in tqdm(sizes, unit="cache", leave=False):
            dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True, memory_max_entries=most)
            plain, answers = bare(cache=True), dspy.cache
            turns[f"dspy.LM, its cache @ {size}"] = _hits(plain, size, lambda answers=answers: _use(answers))
            for name in OURS:
                lm = guarded(store=peers.url(name), cache=dspy_prod.Cache(max_entries=most))
                peers.lm(lm)
                turns[f"{name} @ {size}"] = _hits(lm, size, lambda: None)
        found = _medians(turns, rounds)
        dspy.cache = before
    return {"beside": _UNMEASURED["cache"], **found}


def scopes(sizes: Sequence[int] = (10, 100, 1_000, 10_000, 100_000), rounds: int = 20) -> dict[str, Any]:
    """CPU of a call, in µs, by tenants that have a budget of their own which has been used."""
    with Peers() as peers:
        turns: Turns = {}
        for size in tqdm(sizes, unit="budgets", leave=False):
            for name in OURS:
                budget = dspy_prod.Budget(usd=1e6, per="day", scope="tenant")
                lm = guarded(store=peers.url(name), cache=False, budget=budget)
                peers.lm(lm)
                turns[f"{name} @ {size}"] = _tenants(lm, size)
            if size <= 1_000:  # a Router takes more than a millisecond to take a deployment in
                turns[f"litellm.Router @ {size}"] = _deployments(peers, size)
        found = _medians(turns, rounds)
    return {"beside": _UNMEASURED["scopes"], **found}


def _medians(turns: Turns, rounds: int) -> dict[str, Any]:
    """By subject: size → µs."""
    times = interleaved(turns, rounds=rounds, count=100)
    found: dict[str, dict[str, float]] = {}
    for title, each in times.items():
        name, _, size = title.rpartition(" @ ")
        found.setdefault(name, {})[size] = statistics.median(each) * 1e6
    return {"us": found}


def _append(store: Store, rows: int) -> None:
    """So many calls of a thousand users and twenty tenants, in the last ninety days."""
    now = time.time()
    for number in range(rows):
        id = uuid.uuid4().hex
        store.append(
            CallRecord(
                id, id, now - 90 * 86_400.0 * (rows - number) / rows, MODEL, "primary", 1, "ok", 1_234,
                user=f"u{number % 1_000}", tenant=f"t{number % 20}", input_tokens=500, output_tokens=120, latency=0.8,
            )
        )  # fmt: skip
        if number % _BATCH == 0:
            store.flush(60)
    store.flush(60)


def _repeated(lm: Any, store: Store) -> Callable[[int], None]:
    def make(number: int) -> None:
        for _ in range(number):
            call(lm, messages())
        store.flush(30)

    return make


def _use(answers: Any) -> None:
    dspy.cache = answers


def _hits(lm: Any, size: int, use: Callable[[], None]) -> Callable[[int], None]:
    """Hits on answers drawn from so many; `use` makes its cache the process's one, where there is only one."""
    use()
    known = [messages() for _ in range(size)]
    flush = lm.pipeline.store.flush if isinstance(lm, dspy_prod.LM) else lambda _: None
    for number, prompt in enumerate(known):
        call(lm, prompt)
        if number % _BATCH == 0:
            flush(60)
    flush(60)
    draw = random.Random(size)

    def make(number: int) -> None:
        use()
        for _ in range(number):
            call(lm, draw.choice(known))
        flush(30)

    return make


def _tenants(lm: Any, size: int) -> Callable[[int], None]:
    flush = lm.pipeline.store.flush

    def ask(number: int) -> None:
        with dspy_prod.call_context(tenant=f"tenant-{number}"):
            call(lm, messages())

    for number in range(size):
        ask(number)
        if number % _BATCH == 0:
            flush(60)
    flush(60)
    draw = random.Random(size)

    def make(number: int) -> None:
        for _ in range(number):
            ask(draw.randrange(size))
        flush(30)

    return make


def _deployments(peers: Peers, size: int) -> Callable[[int], None]:
    """Each of so many deployments has a budget of its own: `max_budget` and `budget_duration` of its parameters."""
    budget = {"max_budget": 1e6, "budget_duration": "1d"}
    names = [f"tenant-{number}" for number in range(size)]
    models = [{"model_name": name, "litellm_params": {**constant_params(), **budget}} for name in names]
    hook({})
    router = peers.run(make_router(models=models))
    hooks = hooked()
    draw = random.Random(size)

    async def ask(number: int) -> None:
        for _ in range(number):
            await router.acompletion(draw.choice(names), messages=messages(), max_tokens=100)

    def make(number: int) -> None:
        hook(hooks)
        peers.run(ask(number))
        rested()

    return make


MEASURES = {"ledger": ledger, "cache": cache, "scopes": scopes}
QUICK = {
    "ledger": partial(ledger, (1_000, 10_000), 2),
    "cache": partial(cache, (100, 1_000), 2),
    "scopes": partial(scopes, (10, 100), 2),
}
"""What grows, in the long form and in the short one."""
