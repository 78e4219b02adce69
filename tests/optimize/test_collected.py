"""The garbage collector closes calls that nobody waits for, on whatever thread: the run takes no lock there."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import dspy
import pytest

from benchmarks.world import Support, World
from dspy_prod import BudgetedOptimizer
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.reserve import Reserve
from dspy_prod.optimize.session import Session
from dspy_prod.optimize.sums import Sums
from dspy_prod.runtime.reaper import REAPER

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EXAMPLES = 4


@pytest.fixture(autouse=True)
def _collected_by_hand() -> Iterator[None]:
    gc.disable()
    LEFT.clear()
    yield
    gc.enable()


LEFT: list[weakref.ref[asyncio.Task[Any]]] = []
"""Calls that were left."""


class Collecting:
    """A lock under which the garbage collector comes by, as it may wherever something is allocated.

    It does while there is a call to collect: it looks at what thousands of tests have left, too, and takes its time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:
        taken = self._lock.acquire(blocking)
        if taken and any(task() is not None for task in LEFT):
            gc.collect()
        return taken

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def left(call: Coroutine[Any, Any, Any]) -> None:
    """Leave a call in the middle, for the garbage collector."""

    async def begun() -> None:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        LEFT.append(weakref.ref(task))
        cycle: list[Any] = [task]
        cycle.append(cycle)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begun())
    loop.close()


class Asks(Support):
    """The program, for tasks too."""

    async def aforward(self, message: str) -> dspy.Prediction:
        return await self.classify.acall(message=message)


class Leaves(dspy.teleprompt.Teleprompter):
    """Leaves calls of an LM and of a program in the middle, and goes on.

    Args:
        metric: of its evaluation. seen: is called once the evaluation is over.
    """

    def __init__(self, metric: Any, seen: Callable[[Any], None] = lambda _: None) -> None:
        super().__init__()
        self.metric, self.seen = metric, seen

    def compile(self, student: Any, *, trainset: Any, valset: Any) -> Any:
        student.named_predictors()[0][1].demos = trainset[:1]
        for number in range(3):
            left(dspy.settings.lm.acall(f"propose {number}"))
            left(student.acall(**valset[0].inputs()))
            dspy.settings.lm(f"another {number}")
        dspy.Evaluate(devset=valset, metric=self.metric, num_threads=1)(student)
        self.seen(student)
        return student


def run(world: World, store: str, optimizer: Any) -> Any:
    """Compile on a thread that may wait for itself for ever."""
    done: list[Any] = []
    optimizer = BudgetedOptimizer(optimizer, store=store, view=None, max_calls=100)

    def compile() -> None:
        lm = world.lm()
        lm.cache_clear()
        with dspy.context(lm=lm):
            done.append(optimizer.compile(Asks(), trainset=world.trainset, valset=world.valset))

    thread = threading.Thread(target=compile, daemon=True)
    thread.start()
    thread.join(120)
    if not done:
        frame = sys._current_frames().get(thread.ident or 0)
        pytest.fail("it waits for itself:\n" + "".join(traceback.format_stack(frame)))
    return done[0].optimization


@pytest.mark.parametrize(("kind", "lock"), [(Reserve, "_keeping"), (Sums, "_lock"), (Camera, "_lock")])
def test_a_call_that_is_collected_under_a_lock_of_the_run_waits_for_none(
    world: World, store: str, monkeypatch: pytest.MonkeyPatch, kind: Any, lock: str
) -> None:
    inherited = kind.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        inherited(self, *args, **kwargs)
        setattr(self, lock, Collecting())

    monkeypatch.setattr(kind, "__init__", made)
    report = run(world, store, Leaves(world.metric))
    assert report.stopped_by == "completed"
    assert [each.status for each in report.candidates] == ["complete", "complete"]


def test_a_call_that_is_collected_is_no_answer_and_takes_none_away(world: World, store: str) -> None:
    """The answer that the thread had got from another call of the program got no score, and was asked for again."""
    scored: list[Any] = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        gc.collect()
        scored.append(example)
        return world.metric(example, prediction, trace)

    class Late(Leaves):
        def compile(self, student: Any, *, trainset: Any, valset: Any) -> Any:
            student.named_predictors()[0][1].demos = trainset[:1]

            def asks(**inputs: Any) -> Any:
                answer = student(**inputs)
                left(student.acall(message=f"{inputs} in other words"))  # which no cache has
                return answer

            for example in valset:
                self.metric(example, asks(**example.inputs()))
            return student

    report = run(world, store, Late(metric))
    assert report.stopped_by == "completed"
    assert [each.status for each in report.candidates] == ["complete", "complete"]
    assert len(scored) == 2 * EXAMPLES


def test_what_a_collected_call_has_used_is_looked_at_elsewhere(
    world: World, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its money is spent all the same."""
    looked: list[str] = []
    inherited: Any = Session._on_answer

    def look(self: Any) -> None:
        looked.append(threading.current_thread().name)
        inherited(self)

    def seen(student: Any) -> None:
        gc.collect()
        REAPER.flush()

    monkeypatch.setattr(Session, "_on_answer", look)
    run(world, store, Leaves(world.metric, seen))
    assert "dspy_prod-reaper" in looked
