"""What limits of requests and tokens a minute do, by the clock of a provider; whole minutes, most of them waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dspy

import dspy_prod
from benchmarks.common import bare
from benchmarks.peers.behaviour import (
    Row,
    address,
    budgets,
    came_of,
    identical,
    ours,
    outage,
    streams,
)
from benchmarks.peers.subjects import OURS, Peers
from dspy_prod.testing import Provider

ROUTER = "litellm.Router"
PER_MINUTE = 60
TOKENS, OF_A_CALL = 100_000, 2_000
PER_SECOND = 20
ANSWER = "[[ ## answer ## ]]\nok\n\n[[ ## completed ## ]]"


def minutes(calls: int = 300, callers: int = 32) -> list[Row]:
    """rpm=60, all subjects at the same time, each with a provider of its own; five minutes."""
    limit = dspy_prod.RateLimit(rpm=PER_MINUTE, max_wait=600)

    def row(peers: Peers, name: str) -> Row:
        with Provider(latency=0.05) as provider:
            if name == ROUTER:
                router = peers.router(address(provider), params={"rpm": PER_MINUTE}, fallbacks=[], num_retries=5)
                came = came_of(peers, router, "tasks", callers, calls)
            else:
                lm = peers.lm(ours(provider.url, peers.url(name), limit=limit))
                came = came_of(peers, lm, "threads", callers, calls)
            most = provider.requests_in_window(60.0)
        return {
            "what": f"rpm={PER_MINUTE}, {calls} calls", "subject": name, "most": most, "limit": PER_MINUTE,
            "came": dict(came), "figure": f"{most} in the busiest 60 s, {came['answered']} answered",
        }  # fmt: skip

    return _together(row, (ROUTER, *OURS))


def tokens(calls: int = 120, callers: int = 32) -> list[Row]:
    """tpm=100,000, calls of 2,000 tokens that take 0 to 5 s, expected exactly or four times too high; about three
    minutes, all subjects at the same time, each with a provider of its own."""
    limit = dspy_prod.RateLimit(tpm=TOKENS, max_wait=1_200)
    high = f"{OURS[0]}; expected 4 × too high"

    def row(peers: Peers, name: str) -> Row:
        room = OF_A_CALL - 20
        with Provider(latency=(0.0, 5.0), usage=(20, room)) as provider:
            if name == ROUTER:
                limits: dict[str, Any] = {"params": {"tpm": TOKENS}, "fallbacks": [], "num_retries": 5}
                router = peers.router(address(provider), max_tokens=room, **limits)
                came = came_of(peers, router, "tasks", callers, calls)
            else:
                most = room * (4 if name == high else 1)
                lm = ours(provider.url, peers.url(name.partition(";")[0]), limit=limit, max_tokens=most)
                came = came_of(peers, peers.lm(lm), "threads", callers, calls)
            used = provider.tokens_in_window(60.0)
        return {
            "what": f"tpm={TOKENS:,}, {calls} calls of {OF_A_CALL:,} tokens", "subject": name, "most": used,
            "limit": TOKENS, "came": dict(came),
            "figure": f"{used:,} tokens in the busiest 60 s, {came['answered']} answered",
        }  # fmt: skip

    return _together(row, (ROUTER, *OURS, high))


def evaluations(examples: int = 200, threads: int = 32) -> list[Row]:
    """`dspy.Evaluate` with 32 threads, of an upstream that allows 20 requests a second; one after the other."""
    rows = []
    for name in ("dspy.LM", *OURS):
        with Peers() as peers, Provider(latency=(0.05, 0.3), answer=ANSWER, per_second=PER_SECOND) as provider:
            if name == "dspy.LM":
                lm: dspy.LM = bare(engine="lm15", async_engine=None, num_retries=3, **address(provider))
            else:
                limit = dspy_prod.RateLimit(rpm=60 * PER_SECOND, burst=1)
                lm = ours(provider.url, peers.url(name), limit=limit, max_tokens=100)
            peers.lm(lm)  # which is closed with the others
            began = time.monotonic()
            score = _score(lm, examples, threads)
            took = time.monotonic() - began
            refused, sent = sum(call.status == 429 for call in provider.calls), len(provider.calls)
        lost, ideal = round(examples * (1 - score / 100.0)), examples / PER_SECOND
        rows.append(
            {
                "what": f"Evaluate, {examples} examples, {PER_SECOND} a second", "subject": name, "sent": sent,
                "refused": refused, "lost": lost, "examples": examples, "of_ideal": took / ideal,
                "figure": f"{sent} upstream, {refused} × 429, {lost} lost, {took / ideal:.2f} × the ideal time",
            }
        )  # fmt: skip
    return rows


def _score(lm: Any, examples: int, threads: int) -> float:
    """Percent of the examples that were answered."""
    asked = [dspy.Example(question=f"question {number}").with_inputs("question") for number in range(examples)]

    def answered(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(bool(prediction.answer))

    check = dspy.Evaluate(
        devset=asked, metric=answered, num_threads=threads, display_progress=False, max_errors=10 * examples
    )
    with dspy.context(lm=lm):
        return float(check(dspy.Predict("question -> answer")).score)


def _together(row: Callable[[Peers, str], Row], names: tuple[str, ...]) -> list[Row]:
    """The rows of all, which mostly wait, at the same time."""
    with Peers() as peers, ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(partial(row, peers), names))


MEASURES: dict[str, Callable[[], list[Row]]] = {
    "budgets": budgets, "identical": identical, "outage": outage, "streams": streams, "evaluations": evaluations,
    "tokens": tokens, "minutes": minutes,
}  # fmt: skip
QUICK: dict[str, Callable[[], list[Row]]] = {
    "budgets": partial(budgets, (64,)), "identical": identical, "outage": partial(outage, 4.0), "streams": streams,
    "evaluations": partial(evaluations, 40),
}  # fmt: skip
"""In the long form and in the short one."""
