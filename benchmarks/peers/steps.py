"""Where the microseconds of a call go: memory store, every policy on, the cache off, a constant answer.

The main thread is looked at each time it has used a little CPU, and what it is doing is counted: unlike a tracing
profiler, this makes small functions no dearer. A bare `dspy.LM` takes turns with it and is set beside.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import dspy

import dspy_prod
from benchmarks.common import bare, call, guarded, messages

EVERY: Final = 0.001
"""Seconds of CPU between two looks; the kernel may make them more, which changes no share."""
_OURS: Final = f"{Path(dspy_prod.__file__).parent}/"
_DSPY: Final = f"{Path(dspy.__file__).parent}/"
STEPS: Final = {
    "lm/": "the call's arguments, its settings, DSPy's history (lm/)",
    "context/": "on whose behalf it is, until when (context/)",
    "pipeline/upstream/": "the engine's door, its answer, deadlines (pipeline/upstream/)",
    "pipeline/settling": "settlement and the ledger's record (pipeline/settling)",
    "pipeline/": "the flow of the policies (pipeline/)",
    "policies/breaker/": "circuit breaker (policies/breaker/)",
    "policies/": "budget, retry, price bounds (policies/, pricing/)",
    "pricing/": "budget, retry, price bounds (policies/, pricing/)",
    "stores/": "limiter, accounts, ledger: reserving and settling (stores/)",
    "telemetry/": "events (telemetry/)",
    "compat/": "reading DSPy's requests and answers (compat/)",
}
"""First part of a file's path in dspy_prod → the step it belongs to; the first that fits."""
BESIDE: Final = "DSPy itself: request, answer, history, callbacks"
AROUND: Final = "the benchmark: prompts, its loop"


def measure(seconds: float = 8.0, count: int = 200) -> dict[str, Any]:
    """CPU of a call in µs, and how much of it each step takes, of ours and of a bare `dspy.LM`.

    Args:
        seconds: of CPU for each of both. count: calls in a turn.
    """
    lms = {"ours": guarded(cache=False), "dspy.LM": bare()}
    looks: dict[str, Counter[str]] = {name: Counter() for name in lms}
    calls, used = Counter[str](), Counter[str]()
    for lm in lms.values():
        _calls(lm, count)
    while min(used[name] for name in lms) < seconds:
        for name, lm in lms.items():
            began = time.process_time()
            _watched(lambda lm=lm: _calls(lm, count), looks[name])
            used[name] += time.process_time() - began  # type: ignore[assignment]
            calls[name] += count
    lms["ours"].close()  # type: ignore[attr-defined]
    us = {name: used[name] / calls[name] * 1e6 for name in lms}
    steps = {
        name: {step: us[name] * seen / max(1, sum(found.values())) for step, seen in found.most_common()}
        for name, found in looks.items()
    }
    return {"us": us, "added_us": us["ours"] - us["dspy.LM"], "steps": steps, "looks": sum(looks["ours"].values())}


def _calls(lm: dspy.LM, count: int) -> None:
    for _ in range(count):
        call(lm, messages())


def _watched(work: Callable[[], None], looks: Counter[str]) -> None:
    def look(_: int, frame: FrameType | None) -> None:
        looks[_step(frame)] += 1

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, EVERY, EVERY)
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _step(frame: FrameType | None) -> str:
    """The step of the innermost frame that is DSPy's or ours: what these call in other packages is theirs."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            path = file.removeprefix(_OURS)
            return next((step for part, step in STEPS.items() if path.startswith(part)), "the rest of ours")
        if file.startswith(_DSPY):
            return BESIDE
        frame = frame.f_back
    return AROUND
