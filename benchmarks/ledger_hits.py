"""A cached answer on a SQLite store against DSPy's own, the writer's part included."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import dspy

from benchmarks.common import bare, call, guarded, interleaved, messages, paired
from dspy_prod.testing import Provider

Turn = Callable[[int], None]


def hit_ratios(rounds: int = 20, count: int = 512) -> dict[str, float]:
    """CPU of a hit by that of DSPy's: in memory by its memory cache, read from the file by its disk cache."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/state.db"
        result = {
            **_compare("memory tier, LM", _same, url, rounds, count),
            **_compare("memory tier, Predict", _predict, url, rounds, count // 4),
        }
        dspy.configure_cache(enable_disk_cache=True, enable_memory_cache=False, disk_cache_dir=f"{directory}/dspy")
        # An engine object means something in this process only, so that its answers are in no file.
        with Provider() as provider:
            where = {"engine": "lm15", "async_engine": None, "api_base": provider.url, "api_key": "none"}
            return {**result, **_compare("durable tier, LM", _from_file, url, rounds, count // 2, **where)}


def _compare(
    name: str, turns: Callable[[dspy.LM, int], Turn], url: str, rounds: int, count: int, **options: Any
) -> dict[str, float]:
    lms = {"dspy": bare(cache=True, **options), "ours": guarded(store=url, **options)}
    times = interleaved({who: turns(lm, count) for who, lm in lms.items()}, rounds=rounds, count=count)
    _, ratio = paired(times, "ours", "dspy")
    return {f"{name}, us": round(statistics.median(times["ours"]) * 1e6, 1), f"{name}, by DSPy's": round(ratio, 2)}


def _same(lm: dspy.LM, _: int) -> Turn:
    prompt = messages(fresh=False)

    def turn(number: int) -> None:
        for _ in range(number):
            call(lm, prompt)
        _write(lm)

    return turn


def _predict(lm: dspy.LM, _: int) -> Turn:
    program = dspy.Predict("question -> answer")

    def turn(number: int) -> None:
        with dspy.context(lm=lm):
            for _ in range(number):
                program(question="the same")
        _write(lm)

    return turn


def _from_file(lm: dspy.LM, count: int) -> Turn:
    """Each answer is read from the file: the memory is emptied before each turn."""
    prompts = [messages() for _ in range(count)]
    for prompt in prompts:
        call(lm, prompt)
    _write(lm)
    cache: Any = getattr(getattr(lm, "pipeline", None), "cache", None)
    missed = None if cache is None else cache.stats().misses

    def turn(number: int) -> None:
        if cache is not None:
            cache.clear()
        for prompt in prompts[:number]:
            call(lm, prompt)
        _write(lm)
        assert cache is None or cache.stats().misses == missed, "it was asked upstream"

    return turn


def _write(lm: Any) -> None:
    """Have everything written."""
    if hasattr(lm, "pipeline"):
        assert lm.pipeline.store.flush(60)
