"""A call that nobody waits for any more is closed by the garbage collector, on whatever thread, wherever it is."""

from __future__ import annotations

import asyncio
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod.context.current import EMPTY, current
from dspy_prod.experiments import turn
from dspy_prod.runtime.reaper import REAPER, Reaper
from dspy_prod.stores.durable import posting
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.opening import default_namespace, open_store
from dspy_prod.stores.trials import Ended
from tests.integration.support import Caller
from tests.interrupts import interrupted
from tests.stores.redis.servers import started_valkey
from tests.stores.support import until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Waits(dspy.Module):
    """Answers a caller who waits, and no task, ever."""

    def forward(self, q: str) -> dspy.Prediction:
        return dspy.Prediction(answer=q)

    async def aforward(self, q: str) -> Any:
        BEGUN.get().set()
        await asyncio.get_running_loop().create_future()


BEGUN: ContextVar[asyncio.Event] = ContextVar("begun")
"""Told when a program waits, however long it took to come there."""


def leave(experiment: Any, unit: str) -> None:
    """Call in a loop that is closed beneath the call."""

    async def call() -> None:
        with dspy_prod.call_context(user=unit):
            await experiment.acall(q="1")

    async def begin() -> None:
        BEGUN.set(asyncio.Event())
        asyncio.get_running_loop().create_task(call())
        await BEGUN.get().wait()

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
        store = open_store(f"sqlite:///{tmp_path}/state.db", default_namespace())
        assert store.flush(10)  # what comes now is no part of its batch
        batches: list[Any] = []

        class Collected(posting._Batch[Any]):
            def __init__(self, post: Any) -> None:
                gc.collect()
                super().__init__(post)
                batches.append(self)

        monkeypatch.setattr(posting, "_Batch", Collected)

        def ask() -> str:
            with dspy_prod.call_context(user="here"):
                return str(experiment(q="1").answer)

        assert Caller(ask).outcome(10) == "1"
        assert batches
    finally:
        gc.enable()
    assert REAPER.flush(10)
    found = experiment.scorecard().calls
    assert sum(ended.abandoned for ended in found.values()) == 1, found


@pytest.mark.parametrize("fallback", [None, {"answer": "sorry"}, lambda q: {"answer": "sorry"}])
def test_a_call_that_is_collected_is_abandoned_whatever_falls_back(fallback: Any) -> None:
    """The fallback answered nobody, and the call counted as one that had fallen back, or failed."""
    experiment = made(
        lambda: dspy_prod.Production(
            Waits(), fallback_response=fallback, catch="unavailable" if fallback is None else "all"
        )
    )
    gc.disable()
    try:
        leave(experiment, "gone")
        gc.collect()
    finally:
        gc.enable()
    assert REAPER.flush(10)
    assert ended(experiment) == Ended("new", 1, abandoned=1)


WAYS = pytest.mark.parametrize("wrapped", [False, True], ids=["program", "production"])


@WAYS
def test_calls_that_were_left_are_told_in_a_process_without_an_lm_of_ours(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Nobody had begun the thread that does it: it all waited, without bound, until the process was killed."""
    use(monkeypatch, Reaper())
    experiment = made(lambda: dspy_prod.Production(Waits()) if wrapped else Waits())
    asyncio.run(cancelled(experiment))
    until(lambda: ended(experiment) == Ended("new", 1, abandoned=1))
    assert not experiment._works.flights._flights


@WAYS
def test_a_child_that_had_no_thread_for_it_when_it_was_forked_begins_one(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    reaper = Reaper()
    reaper.start()
    with monkeypatch.context() as full:
        full.setattr("dspy_prod.runtime.reaper.begin", lambda *_: None)
        reaper._after_fork()
    use(monkeypatch, reaper)
    experiment = made(lambda: dspy_prod.Production(Waits()) if wrapped else Waits())
    asyncio.run(cancelled(experiment))
    until(lambda: ended(experiment) == Ended("new", 1, abandoned=1))


def test_what_is_known_of_a_call_that_was_left_finds_it_by_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses the button as he leaves was told that there is no such call."""

    class Busy(Reaper):
        """Does nothing until somebody waits for it."""

        def start(self) -> None:
            pass

        def flush(self, timeout: float = 5.0) -> bool:
            while not self._work.empty():
                self._work.get()()
            return True

    use(monkeypatch, Busy())
    experiment = made(Waits)
    asyncio.run(cancelled(experiment, trace_id="tr-1"))
    experiment.record(good=0.0, trace="tr-1")
    assert experiment.scorecard().waiting["good"].units == 0


@pytest.mark.parametrize("way", ["sync", "async"])
def test_wherever_ctrl_c_comes_the_call_is_told_once_and_is_over(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never over, and its unit was waited for as long as the process lived; or the store heard nothing of it."""

    class Answers(Waits):
        async def aforward(self, q: str) -> Any:
            return dspy.Prediction(answer=q)

    experiment = made(Answers)
    told: list[str] = []
    tell = experiment._works.trials.call
    monkeypatch.setattr(experiment._works.trials, "call", lambda call: (told.append(call.unit), tell(call))[1])

    def ask(unit: str) -> None:
        with dspy_prod.call_context(user=unit):
            experiment(q="1") if way == "sync" else asyncio.run(experiment.acall(q="1"))

    ask("warm")
    for number in range(200):
        unit, before = f"u{number}", len(told)
        with ctrl_c(number) as came:
            try:
                ask(unit)
            except KeyboardInterrupt:
                pass
        assert REAPER.flush(10)
        assert not experiment._works.flights._flights, came
        assert current() == EMPTY, came  # what was cut off put its caller's conditions in force, when it was collected
        if came and came[0][0] != "__init__":  # nothing of it had begun
            assert told[before:] == [unit], came
        if not came:
            break
    assert 20 < number < 199
    assert told[-1] == unit, "it was not interrupted any more"


POSTING = (
    *("turn.py", "calling.py", "exposing.py", "flights.py", "trials.py", "memory_trials.py", "memory_trial.py"),
    *("posting.py", "mailbox.py", "inbox.py"),
)


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
def test_wherever_ctrl_c_comes_as_a_call_is_posted_it_is_counted_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    """The store had it, who posted it did not know, and it was posted once more."""
    answered: list[str] = []

    class Answers(dspy.Module):
        def forward(self, q: str) -> dspy.Prediction:
            answered.append(q)
            return dspy.Prediction(answer=q)

    sqlite = f"sqlite:///{tmp_path}/state.db"
    url = {"memory": "memory://", "sqlite": sqlite}.get(kind) or request.getfixturevalue("valkey")
    experiment = made(Answers, url)

    def ask(unit: str) -> None:
        with dspy_prod.call_context(user=unit):
            experiment(q="1")

    ask("warm")
    for number in range(400):
        before, done = ended(experiment).calls, len(answered)
        came, outcome = interrupted(partial(ask, f"u{number}"), number, *POSTING)
        assert REAPER.flush(10)
        told = ended(experiment).calls - before
        assert told <= 1, (number, traceback.format_exception(outcome))
        assert told == 1 or len(answered) == done, (number, traceback.format_exception(outcome))
        if not came:
            break
    assert 20 < number < 399


@contextmanager
def ctrl_c(number: int) -> Iterator[list[tuple[str, int]]]:
    """Raise what Ctrl-C does at one line of a turn; yields which one, once it was."""
    came: list[tuple[str, int]] = []
    seen = -1

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "line" and not came:
            seen += 1
            if seen == number:
                came.append((frame.f_code.co_name, frame.f_lineno))
                raise KeyboardInterrupt
        return line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename == turn.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield came
    finally:
        sys.settrace(before)


def made(program: Callable[[], Any], store: Any = None) -> dspy_prod.Experiment:
    """An experiment in which everybody has the new one."""
    return dspy_prod.Experiment(
        "left", variants={"control": program(), "new": program()}, metrics=[dspy_prod.Metric("good")],
        store=store or MemoryStore(), assign=lambda unit: "new",
    )  # fmt: skip


def ended(experiment: Any) -> Any:
    """How its calls have ended so far, as the store was told: whoever asks the experiment waits for the reaper."""
    return next((each for each in experiment._works.trials.ended("left") if each.arm == "new"), None)


async def cancelled(experiment: Any, **context: Any) -> None:
    """Call, and leave."""
    BEGUN.set(asyncio.Event())
    with dspy_prod.call_context(user="gone", **context):
        task = asyncio.ensure_future(experiment.acall(q="1"))
    await BEGUN.get().wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def use(monkeypatch: pytest.MonkeyPatch, reaper: Reaper) -> None:
    """Have this one do what callers have left."""
    for name in ("production.watch", "experiments.turn", "experiments.calling", "experiments.traced"):
        monkeypatch.setattr(f"dspy_prod.{name}.REAPER", reaper, raising=False)
