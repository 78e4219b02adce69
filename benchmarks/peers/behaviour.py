"""What budgets, limits, caches, breakers and streams do, by the bill of a provider that counts for itself."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy

import dspy_prod
from benchmarks.common import MODEL, bare, messages
from benchmarks.peers.subjects import OURS, Peers, Prompt, Subject, cached_by_dspy, cached_by_litellm, hook, make_router
from dspy_prod.testing import Provider, Status

Row = dict[str, Any]
PRICE = (0.0, 1000.0)
"""USD per million tokens: ten tokens of output cost a cent."""
_PARAMS = {"input_cost_per_token": 0.0, "output_cost_per_token": 1e-3, "max_tokens": 10}


def ours(url: str, store: str, **options: Any) -> dspy_prod.LM:
    """Ours on a provider, with defaults but for what is said."""
    return dspy_prod.LM(
        MODEL, api_base=url, api_key="none", store=store, namespace=uuid.uuid4().hex,
        **{
            "cache": False, "engine": "lm15", "max_tokens": 10,
            "prices": {MODEL: dspy_prod.Price(input=PRICE[0], output=PRICE[1])}, **options,
        },
    )  # fmt: skip


def address(provider: Provider) -> dict[str, Any]:
    """A provider, as arguments of an LM."""
    return {"api_base": provider.url, "api_key": "none"}


def came_of(
    peers: Peers, subject: Subject, kind: str, callers: int, calls: int, prompt: Prompt | None = None
) -> Counter[str]:
    """What came of so many calls, each like no other or all alike: "answered", or the name of the error."""
    came: Counter[str] = Counter()
    subject.begin()

    def ask(_: int) -> None:
        try:
            subject.call(prompt or messages())
        except Exception as error:
            came[type(error).__name__] += 1
        else:
            came["answered"] += 1

    async def one(turns: asyncio.Semaphore) -> None:
        async with turns:
            try:
                await subject.acall(prompt or messages())
            except Exception as error:
                came[type(error).__name__] += 1
            else:
                came["answered"] += 1

    async def every() -> None:
        turns = asyncio.Semaphore(callers)
        await asyncio.gather(*(one(turns) for _ in range(calls)))

    if kind == "tasks":
        peers.run(every())
    else:
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(ask, range(calls)))
    subject.written()
    return came


def budgets(crowds: tuple[int, ...] = (64, 1_000)) -> list[Row]:
    """A budget of $1.00, calls of $0.01, a provider that takes 0.1 s; three times as many calls as it can pay."""
    rows = []
    for callers in crowds:
        for kind in ("threads", "tasks"):
            for name in ("litellm.Router", *OURS, "ours, memory; max_tokens ten times the answer"):
                with Peers() as peers, Provider(latency=0.1, usage=(100, 10), price=PRICE) as provider:
                    if name == "litellm.Router":
                        subject = peers.router(address(provider), usd=1.0, params=_PARAMS)
                    else:
                        tokens = 100 if ";" in name else 10
                        store = peers.url(name.partition(";")[0])
                        lm = ours(provider.url, store, budget=dspy_prod.Budget(usd=1.0), max_tokens=tokens)
                        subject = peers.lm(lm)
                    came = came_of(peers, subject, kind, callers, max(300, callers))
                    rows.append(
                        {
                            "what": f"$1.00 budget, {callers} {kind}", "subject": name,
                            "figure": f"${provider.bill.usd:.2f} billed", "usd": provider.bill.usd, "came": dict(came),
                            "cap": 1.0, "bound": 0.1 if ";" in name else 0.01,
                        }
                    )  # fmt: skip
    return rows


def identical(callers: int = 64) -> list[Row]:
    """So many identical calls at once, caches on, all sent before the first is answered: how many the provider saw."""
    rows = []
    with Peers() as peers, Provider(latency=1.5) as provider, cached_by_dspy() as cached, cached_by_litellm():
        where = address(provider)
        subjects = {
            "dspy.LM": peers.lm(bare(engine="lm15", async_engine=None, **where)),
            "dspy.LM, its cache": peers.lm(cached.copy(engine="lm15", async_engine=None, **where)),
            "litellm.completion": peers.litellm(where),
            "litellm.Router": peers.router(where, cache_responses=True),
            **{name: peers.lm(ours(provider.url, peers.url(name), cache=True)) for name in OURS},
        }
        for name, subject in subjects.items():
            before = len(provider.calls)
            came = came_of(
                peers, subject, "threads", callers, callers, [{"role": "user", "content": f"asked through {name}"}]
            )
            seen = len(provider.calls) - before
            figure = f"{seen} upstream"
            rows.append({"what": f"{callers} identical calls at once", "subject": name, "figure": figure, "seen": seen,
                         "came": dict(came)})  # fmt: skip
    return rows


def outage(seconds: float = 12.0, callers: int = 32) -> list[Row]:
    """An upstream that answers 503 after 0.1 s, a healthy fallback, everybody probing again after 3 s."""
    rows = []
    for name in ("litellm.Router", *OURS):
        with (
            Peers() as peers,
            Provider(latency=0.1, faults=Status(503)) as dead,
            Provider(latency=0.05) as healthy,
        ):
            if name == "litellm.Router":
                subject = peers.router(address(dead), spare=address(healthy), num_retries=0, cooldown_time=3)
            else:
                spare = ours(healthy.url, peers.url(name))
                breaker = dspy_prod.CircuitBreaker(recovery_timeout=3.0)
                subject = peers.lm(ours(dead.url, peers.url(name), fallbacks=[spare], breaker=breaker))
            came = _for(peers, subject, callers, seconds)
            rows.append(
                {
                    "what": f"dead upstream for {seconds:g} s, {callers} tasks", "subject": name,
                    "figure": f"{len(dead.calls)} dead calls, {came['answered']} answered", "dead": len(dead.calls),
                    "came": dict(came), "allowed": _dead_calls(callers, seconds),
                }
            )  # fmt: skip
    return rows


def _dead_calls(callers: int, seconds: float) -> int:
    """What may be sent to a dead upstream: what opened the circuit, what was under way then, and a probe in 3 s."""
    return dspy_prod.CircuitBreaker().failure_threshold - 1 + callers + int(seconds // 3)


def _for(peers: Peers, subject: Subject, callers: int, seconds: float) -> Counter[str]:
    came: Counter[str] = Counter()
    subject.begin()
    until = time.monotonic() + seconds

    async def work() -> None:
        while time.monotonic() < until:
            try:
                await subject.acall(messages())
            except Exception as error:
                came[type(error).__name__] += 1
            else:
                came["answered"] += 1

    async def every() -> None:
        await asyncio.gather(*(work() for _ in range(callers)))

    peers.run(every())
    return came


def streams() -> list[Row]:
    """A stream of 40 chunks whose reader leaves after a few: what is recorded, beside the bill."""
    rows = []
    for name in ("litellm.completion", "litellm.Router", *OURS):
        text = "[[ ## answer ## ]]\n" + "word " * 40
        with Peers() as peers, Provider(answer=text, chunks=40, chunk_delay=0.02, price=(0.15, 0.60)) as provider:
            if name in OURS:
                prices = {MODEL: dspy_prod.Price(input=0.15, output=0.60)}
                lm = ours(provider.url, peers.url(name), prices=prices, max_tokens=60)
                recorded = peers.run(_left_by_dspy(peers, lm))
            else:
                recorded = peers.run(_left_by_litellm(peers, name, address(provider)))
            provider.wait_until(lambda each: each.calls and each.in_flight == 0, timeout=30)
            billed = provider.bill.usd
            rows.append(
                {
                    "what": "stream left halfway", "subject": name, "recorded": recorded, "billed": billed,
                    "figure": f"recorded {recorded / billed:.0%} of the bill{', a bound' * (name in OURS)}",
                }
            )  # fmt: skip
    return rows


async def _left_by_dspy(peers: Peers, lm: dspy_prod.LM) -> float:
    peers.lm(lm)
    listener = dspy.streaming.StreamListener("answer")
    program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])

    begun = asyncio.Event()

    async def read() -> None:
        async for _ in program(question="a question"):
            begun.set()

    with dspy.context(lm=lm):
        reader = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 30)
        reader.cancel()
        await asyncio.wait([reader], timeout=30)
    return await _settled(lambda: sum(record.cost_nano or 0 for record in lm.ledger.records()) / 1e9)


async def _left_by_litellm(peers: Peers, name: str, where: dict[str, Any]) -> float:
    """What LiteLLM's logger is told (`response_cost`), which is where its budgets and its proxy count from."""
    import litellm
    from litellm.integrations.custom_logger import CustomLogger

    told: list[float] = []

    class Costs(CustomLogger):
        async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
            told.append(kwargs.get("response_cost") or 0.0)

        async_log_failure_event = async_log_success_event

    hook({"callbacks": [Costs()]})
    try:
        if name == "litellm.Router":
            router = await make_router(where)
            stream = await router.acompletion("main", messages=messages(), stream=True)
        else:
            stream = await litellm.acompletion(MODEL, messages=messages(), stream=True, **where)
        read = 0
        async for _ in stream:
            read += 1
            if read == 4:
                break
        await stream.aclose()
        return await _settled(lambda: sum(told))
    finally:
        hook({})


async def _settled(read: Callable[[], float], most: float = 3.0) -> float:
    """What has been recorded once anything has, or after so many seconds."""
    until = time.monotonic() + most
    while not (found := read()) and time.monotonic() < until:  # noqa: ASYNC110 - nobody tells when
        await asyncio.sleep(0.02)
    return found
