"""A run that keeps its answers is asked for nothing twice: the provider's bill says whether it is so."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Budget, Cache, ConfigError, Run, call_context
from dspy_prod.stores.opening import open_store
from dspy_prod.testing import FaultPlan, Provider, ScriptedEngine, Status
from tests.e2e.support import fresh_memory, make_lm

CHEAP = "openai/e2e-cheap"


def numbered() -> Callable[[Any], str]:
    """Answers that are all different: `answer 0`, `answer 1`, ..."""
    count, lock = iter(range(10**6)), threading.Lock()

    def answer(call: Any) -> str:
        with lock:
            return f"answer {next(count)}"

    return answer


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(prices={"e2e": (0.15, 0.60), "e2e-cheap": (0.05, 0.11)}, answer=numbered()) as provider:
        yield provider
        assert provider.errors == []


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


@pytest.fixture
def connect(provider: Provider) -> Iterator[Callable[..., Any]]:
    """Make an LM in front of the provider, with a store of its own, in memory."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(make_lm(provider.url, **options))
        return made[-1]

    yield make
    for lm in made:
        lm.close()


def begun(url: str, **options: Any) -> Run:
    """The run, as another process would begin or resume it."""
    return Run("it", store=url, namespace="e2e", keep_answers=True, **options)


def rows(url: str) -> list[tuple[int, str]]:
    """(ordinal, served model) of every answer in the file."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
        return file.execute("SELECT ordinal, served_model FROM run_answers ORDER BY seq").fetchall()


def asked(lm: Any, texts: list[str], run: Run, **options: Any) -> list[Any]:
    with call_context(run=run):
        return [lm(text, **options)[0] for text in texts]


TEXTS = [f"question {number}" for number in range(5)]


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_that_is_done_again_is_not_paid_again(
    provider: Provider, connect: Callable[..., Any], url: str, cache: bool
) -> None:
    first = asked(connect(cache=cache), TEXTS, begun(url))
    assert len(set(first)) == 5
    bill = provider.bill.nano
    run, lm = begun(url), connect(cache=cache)
    assert asked(lm, TEXTS, run) == first
    assert provider.bill.nano == bill
    assert (run.asked, run.replayed, run.first_new, run.strangers) == (5, 5, None, 0)
    assert asked(lm, ["a new one"], run) == ["answer 5"]
    assert (run.asked, run.replayed, run.first_new, run.strangers) == (6, 5, 6, 0)
    assert len(provider.calls) == 6
