"""A call that nobody waits for any more is closed by the garbage collector, on whatever thread, wherever it is."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.durable import posting
from tests.integration.support import Caller

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Waits(dspy.Module):
    """Answers a caller who waits, and no task, ever."""

    def forward(self, q: str) -> dspy.Prediction:
        return dspy.Prediction(answer=q)

    async def aforward(self, q: str) -> Any:
        await asyncio.get_running_loop().create_future()


def leave(experiment: Any, unit: str) -> None:
    """Call in a loop that is closed beneath the call."""

    async def call() -> None:
        with dspy_prod.call_context(user=unit):
            await experiment.acall(q="1")

    async def begin() -> None:
        asyncio.get_running_loop().create_task(call())
        await asyncio.sleep(0.01)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()


def test_a_call_that_is_collected_as_its_thread_posts_another_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """It posted as well, and waited for a lock of its own thread: from then on every call did."""
    programs = {name: dspy_prod.Production(Waits(), name=name) for name in ("control", "new")}
    experiment = dspy_prod.Experiment(
        "left", variants=programs, metrics=[dspy_prod.Metric("good")], store=f"sqlite:///{tmp_path}/state.db"
    )
    gc.disable()
    try:
        leave(experiment, "gone")

        class Collected(posting._Batch[Any]):
            def __init__(self, post: Any) -> None:
                gc.collect()
                super().__init__(post)

        monkeypatch.setattr(posting, "_Batch", Collected)

        def ask() -> str:
            with dspy_prod.call_context(user="here"):
                return str(experiment(q="1").answer)

        assert Caller(ask).outcome(10) == "1"
    finally:
        gc.enable()
    assert REAPER.flush(10)
    assert sum(ended.abandoned for ended in experiment.scorecard().calls.values()) == 1
