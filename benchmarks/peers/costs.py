"""What a call costs: CPU, how long it takes, and how many a second, of one, 64 and 512 callers at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks.common import bare, interleaved, messages
from benchmarks.http import provider
from benchmarks.peers.subjects import Peers, Subject, cached_by_dspy, cached_by_litellm

LATENCY = 0.02
"""Seconds the provider takes to answer over HTTP."""


class Turn(NamedTuple):
    """What came of one turn."""

    calls: int
    seconds: float
    cpu: float
    latencies: list[float]


def constant(peers: Peers) -> dict[str, Subject]:
    """Everybody on a constant answer, caches off."""
    return {
        "dspy.LM": peers.lm(bare()),
        "litellm.completion": peers.litellm(),
        "litellm.Router": peers.router(),
        **peers.ours(cache=False),
    }


def over_http(peers: Peers, url: str) -> dict[str, Subject]:
    """Everybody on the same provider, caches off."""
    where = {"api_base": url, "api_key": "none"}
    ours = {"engine": "lm15", "async_engine": None, **where}
    return {
        "dspy.LM": peers.lm(bare(**ours)),
        "litellm.completion": peers.litellm(where),
        "litellm.Router": peers.router(where),
        **peers.ours(cache=False, **ours),
    }


def cpu(rounds: int = 20, count: int = 100) -> dict[str, Any]:
    """Median CPU of the process for a call, in µs, from a thread and from a task, one call after the other."""
    with Peers() as peers:
        subjects = constant(peers)
        found = {kind: _medians(peers, subjects, kind, True, rounds, count) for kind in ("thread", "task")}
    return {**found, "added": _added(found)}  # fmt: skip


def hits(rounds: int = 20, count: int = 100) -> dict[str, Any]:
    """The same of a cache hit."""
    with Peers() as peers, cached_by_dspy() as lm, cached_by_litellm():
        subjects = {
            "dspy.LM, its cache": peers.lm(lm),
            "litellm.completion": peers.litellm(),
            "litellm.Router": peers.router(cache_responses=True),
            **peers.ours(),
        }
        return {kind: _medians(peers, subjects, kind, False, rounds, count) for kind in ("thread", "task")}


def _medians(
    peers: Peers, subjects: Mapping[str, Subject], kind: str, fresh: bool, rounds: int, count: int
) -> dict[str, float]:
    def turns(subject: Subject) -> Any:
        async def ask(number: int) -> None:
            for _ in range(number):
                await subject.acall(messages(fresh))

        def make(number: int) -> None:
            subject.begin()
            if kind == "task":
                peers.run(ask(number))
            else:
                for _ in range(number):
                    subject.call(messages(fresh))
            subject.written()

        return make

    times = interleaved({name: turns(each) for name, each in subjects.items()}, rounds=rounds, count=count)
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def _added(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        kind: {name: value - each["dspy.LM"] for name, value in each.items() if name != "dspy.LM"}
        for kind, each in found.items()
    }


def crowds(rounds: int = 3, seconds: float = 1.0, callers: tuple[int, ...] = (1, 64, 512)) -> list[dict[str, Any]]:
    """Calls a second and how long they take on a constant answer: threads and tasks, by how many there are."""
    with Peers() as peers:
        return list(_crowds(peers, constant(peers), rounds, seconds, callers))


def http_crowds(rounds: int = 3, seconds: float = 1.0, callers: tuple[int, ...] = (1, 64, 512)) -> list[dict[str, Any]]:
    """The same over HTTP, the provider in a process of its own; CPU is that of this process."""
    with Peers() as peers, provider(LATENCY) as url:
        return list(_crowds(peers, over_http(peers, url), rounds, seconds, callers))


def _crowds(
    peers: Peers, subjects: Mapping[str, Subject], rounds: int, seconds: float, callers: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """One row for each subject, kind and number; within a kind and a number, subjects take turns."""
    for kind in ("threads", "tasks"):
        for number in callers:
            found: dict[str, list[Turn]] = {name: [] for name in subjects}
            for warm in (True, *[False] * rounds):
                for name, subject in subjects.items():
                    turn = _turn(peers, subject, kind, number, seconds / 4 if warm else seconds)
                    subject.written()
                    if not warm:
                        found[name].append(turn)
            for name, turns in found.items():
                latencies = sorted(one for turn in turns for one in turn.latencies)
                yield {
                    "subject": name, "kind": kind, "callers": number,
                    "per_s": statistics.median(turn.calls / turn.seconds for turn in turns),
                    "p50_ms": latencies[len(latencies) // 2] * 1e3,
                    "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
                    "cpu_us": statistics.median(turn.cpu / turn.calls for turn in turns) * 1e6,
                }  # fmt: skip


def _turn(peers: Peers, subject: Subject, kind: str, callers: int, seconds: float) -> Turn:
    """So many callers, each calling once, and again until the time is up."""
    latencies: list[float] = []
    subject.begin()
    used, began = time.process_time(), time.perf_counter()
    until = began + seconds

    def work(_: int) -> None:
        start = now = began
        while now < until or start == began:
            start = time.perf_counter()
            subject.call(messages())
            now = time.perf_counter()
            latencies.append(now - start)

    async def awork() -> None:
        start = now = began
        while now < until or start == began:
            start = time.perf_counter()
            await subject.acall(messages())
            now = time.perf_counter()
            latencies.append(now - start)
            await asyncio.sleep(0)  # a constant answer suspends nobody: the others get their turn

    async def all_of() -> None:
        await asyncio.gather(*(awork() for _ in range(callers)))

    if kind == "tasks":
        peers.run(all_of())
    else:
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(work, range(callers)))
    return Turn(len(latencies), time.perf_counter() - began, time.process_time() - used, latencies)
