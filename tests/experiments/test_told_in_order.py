"""What MLflow is told of an experiment is of one moment, and no older than what it was told before."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments import controller as controller_module
from dspy_prod.experiments import operating, variants_in_mlflow
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.variants_in_mlflow import VariantsInMlflow
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import DECIDED, PAUSED, RUNNING, STOPPED, Decision, Trial
from tests.experiments.support import declared, feed


@pytest.mark.parametrize("meanwhile", ["here", "elsewhere"])
def test_who_tells_late_tells_what_it_is_by_then(meanwhile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old state was told after the end, and runs were opened again for good."""
    store = MemoryStore()
    opened = declared(store)
    feed(opened, 5, {"control": 1.0, "new": 1.0})
    looks, trials = opened.controller, store.trials
    monkeypatch.setattr(controller_module, "setup", SimpleNamespace(courier=lambda: object()))
    told: list[str] = []
    in_mlflow, read = looks._in_mlflow, trials.trial
    monkeypatch.setattr(in_mlflow, "look", lambda trial, *_: told.append(trial.state))
    begun, go = threading.Event(), threading.Event()

    def ends() -> None:
        trial = read("e")
        assert trial is not None
        trials.change("e", trial.revision, state=STOPPED, decision=Decision("stop", "operator", "{}"))
        if meanwhile == "here":
            looks.step()

    def reads(name: str) -> Trial | None:
        found = read(name)
        if threading.current_thread().name == "late" and not begun.is_set():
            begun.set()
            go.wait(10)
        return found

    monkeypatch.setattr(trials, "trial", reads)
    late, other = threading.Thread(target=looks.tell, name="late"), threading.Thread(target=ends)
    late.start()
    assert begun.wait(10)
    other.start()
    while read("e").state != STOPPED:  # type: ignore[union-attr]
        pass
    other.join(0.2)
    go.set()
    late.join(10)
    other.join(10)
    assert told[-1] == STOPPED


def test_what_is_older_than_what_was_told_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    opened = declared(store)
    monkeypatch.setattr(variants_in_mlflow, "setup", SimpleNamespace(courier=lambda: "courier"))
    its = VariantsInMlflow("e", store.trials, ("control", "new"))
    told: list[str] = []
    monkeypatch.setattr(its, "_tell", lambda trial, *_: told.append(trial.state))
    monkeypatch.setattr(its, "_keep", lambda: None)
    evidence: Any = SimpleNamespace(metrics=[])
    running = opened.trial()
    ended = store.trials.change("e", running.revision, state=STOPPED)
    assert ended is not None
    for trial in (running, ended, running, ended):
        its.look(trial, "split", None, evidence, None)  # type: ignore[arg-type]
    assert told == [RUNNING, STOPPED]


def test_the_page_at_the_end_is_a_look_of_its_own_and_changes_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads on, and what it read was in the figures beside a decision that did not know of it."""
    store = MemoryStore()
    opened = declared(store, state=PAUSED)
    its = VariantsInMlflow("e", store.trials, ("control", "new"))
    logged: list[Any] = []

    class Run:
        def log(self, figures: Any, step: int) -> None:
            logged.append(figures)

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    its._runs = {"control": Run(), "new": Run()}  # type: ignore[dict-item]
    evidence: Any = {"units": 5}
    monkeypatch.setattr(variants_in_mlflow, "figures", lambda variant, decision, found, *_: dict(found))
    monkeypatch.setattr(variants_in_mlflow, "standing", lambda *_: {})

    def page() -> str:
        evidence["units"] += 1
        return "page"

    its._tell(opened.trial(), "split", None, opened.declaration, evidence, None, {"control": 1}, page)  # type: ignore[arg-type]
    assert logged == [{"units": 5}, {"units": 5}]
    assert evidence == {"units": 6}


@contextmanager
def saving_before(trials: Any, reader: Any) -> Iterator[None]:
    """Somebody else's reading is saved before this thread's, once."""
    save, left, me = trials.save, iter([True]), threading.current_thread()

    def saves(name: str, state: str, revision: int) -> bool:
        if threading.current_thread() is me and next(left, None) is not None:
            other = threading.Thread(target=reader.read)
            other.start()
            other.join()
        return bool(save(name, state, revision))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trials, "save", saves)
        yield
        assert next(left, None) is None, "it was"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[MemoryStore, Opened, list[str]]:
    """A store, an experiment that runs, and the states that MLflow is told."""
    store = MemoryStore()
    opened = declared(store)
    monkeypatch.setattr(controller_module, "setup", SimpleNamespace(courier=lambda: object()))
    states: list[str] = []
    in_mlflow = opened.controller._in_mlflow
    monkeypatch.setattr(in_mlflow, "look", lambda trial, *_: states.append(trial.state))
    monkeypatch.setattr(in_mlflow, "removed", lambda *_: states.append("removed"))
    opened.controller.step()
    return store, opened, states


def test_who_stops_it_while_another_one_saves_what_it_read_tells_the_end(
    told: tuple[MemoryStore, Opened, list[str]],
) -> None:
    """Runs stayed as they were for good: nobody looks at it any more."""
    store, opened, states = told
    feed(opened, 5, {"control": 1.0, "new": 1.0})
    opened.controller._reading._saved = -math.inf
    with saving_before(store.trials, Opened(store, "e").controller._reading):
        operating.stop(opened)
    assert states == [RUNNING, STOPPED]


def test_the_look_that_decides_tells_the_end_though_another_one_saves_before(
    told: tuple[MemoryStore, Opened, list[str]],
) -> None:
    store, opened, states = told
    feed(opened, 3000, {"control": 0.9, "new": 0.3})
    reading = opened.controller._reading
    reading._saved = -math.inf
    with saving_before(store.trials, Opened(store, "e").controller._reading):
        opened.controller.step()
    assert opened.controller.over
    assert states == [RUNNING, DECIDED]
    assert opened.controller.history(), "the card has its charts"


def test_it_is_over_once_the_end_is_told(
    told: tuple[MemoryStore, Opened, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no figures of now, or the store is away as they are told, another look tells."""
    store, opened, states = told
    looks = opened.controller
    store.trials.change("e", opened.trial().revision, state=STOPPED)

    def away(*_: Any) -> None:
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patched:
        patched.setattr(looks._in_mlflow, "look", away)
        with pytest.raises(StoreUnavailableError):
            looks.step()
        assert not looks.over
        patched.setattr(looks._reading, "read", lambda *_: setattr(looks._reading, "evidence", None))
        looks.step()
        assert not looks.over
    assert STOPPED not in states
    looks.step()
    assert looks.over
    assert states[-1] == STOPPED


@pytest.mark.parametrize("how", ["tell", "step"])
@pytest.mark.parametrize("again", [False, True])
def test_the_runs_of_what_is_removed_while_it_is_told_are_ended(
    again: bool, how: str, told: tuple[MemoryStore, Opened, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, which has ended them before they were told of here; whatever has its name since."""
    store, opened, states = told
    looks = opened.controller

    def removes(trial: Trial, *_: Any) -> None:
        operating.remove(store.trials, "e", force=True)
        if again:
            declared(store, salt="another")
        states.append(trial.state)

    monkeypatch.setattr(looks._in_mlflow, "look", removes)
    getattr(looks, how)()
    assert states == [RUNNING, RUNNING, "removed"]


def test_an_end_whose_page_cannot_be_made_is_told_by_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = declared(MemoryStore(), state=PAUSED)
    monkeypatch.setattr(variants_in_mlflow, "setup", SimpleNamespace(courier=lambda: "courier"))
    its = VariantsInMlflow("e", opened.trials, ("control", "new"))
    ends: list[bool] = []

    def tells(*_: Any) -> None:
        ends.append(bool(ends))
        if len(ends) == 1:
            raise StoreUnavailableError("away")

    monkeypatch.setattr(its, "_tell", tells)
    monkeypatch.setattr(its, "_keep", lambda: None)
    evidence: Any = SimpleNamespace(metrics=[])
    for _ in range(3):
        with contextlib.suppress(StoreUnavailableError):
            its.look(opened.trial(), "split", None, evidence, None)  # type: ignore[arg-type]
    assert ends == [False, True]
