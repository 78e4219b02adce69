"""What every measurement shares: a constant engine, the guarded LM, and interleaved blocks."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import dspy
from dspy.clients._deprecation import adapter_message_call
from dspy.lm15 import Message, Request, Response, TextPart, Usage

import dspy_prod

MODEL = "openai/gpt-4o-mini"
TEXT = "[[ ## answer ## ]]\nfine\n\n[[ ## completed ## ]]"
SYSTEM = "Your input fields are: `question`. Your output fields are: `answer`. " * 20


class ConstantEngine:
    """Answers at once, so that only the layers above it are measured."""

    def __init__(self) -> None:
        self._answer = Response(
            id="x",
            model="gpt-4o-mini",
            message=Message.assistant([TextPart(TEXT)]),
            finish_reason="stop",
            usage=Usage(input_tokens=400, output_tokens=12),
        )

    def complete(self, request: Request) -> Response:
        return self._answer


class AsyncConstantEngine(ConstantEngine):
    """The same for tasks."""

    async def complete(self, request: Request) -> Response:  # type: ignore[override]
        return self._answer


def bare(**options: Any) -> dspy.LM:
    """Plain DSPy on the constant engine."""
    engines = {"engine": ConstantEngine(), "async_engine": AsyncConstantEngine()}
    return dspy.LM(MODEL, max_tokens=100, **{"cache": False, **engines, **options})


def guarded(**options: Any) -> dspy_prod.LM:
    """`dspy_prod.LM` on the constant engine with every policy on, in memory."""
    policies: dict[str, Any] = {
        "engine": ConstantEngine(),
        "async_engine": AsyncConstantEngine(),
        "store": "memory://",
        "namespace": uuid.uuid4().hex,
        "limit": dspy_prod.RateLimit(rpm=1e8, tpm=1e12, concurrency=1024),
        "budget": dspy_prod.Budget(usd=1e6),
        "cache": dspy_prod.Cache(max_entries=1000),
    }
    return dspy_prod.LM(MODEL, max_tokens=100, **{**policies, **options})


_COUNTER = iter(range(10**12))


def messages(fresh: bool = True) -> list[dict[str, str]]:
    """A typical prompt; a fresh one is like no other."""
    question = f"question {next(_COUNTER) if fresh else 0} " * 10
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def call(lm: dspy.LM, prompt: list[dict[str, str]]) -> Any:
    """Call an LM as an adapter does."""
    with adapter_message_call(lm, prompt):
        return lm(messages=prompt)


def interleaved(
    subjects: Mapping[str, Callable[[int], None]],
    *,
    rounds: int,
    count: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds per call of each subject in each round; subjects take turns, so that drift hits all alike.

    Args:
        subjects: name to a function that makes so many calls.
        count: calls in one turn.
        clock: CPU time of the process by default.
    """
    for subject in subjects.values():
        subject(max(20, count // 2))
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            began = clock()
            subject(count)
            times[name].append((clock() - began) / count)
    return times


def paired(times: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """(median difference, median ratio) of two subjects, round by round."""
    pairs = list(zip(times[name], times[base], strict=True))
    return statistics.median(a - b for a, b in pairs), statistics.median(a / b for a, b in pairs)
