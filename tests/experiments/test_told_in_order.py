"""What MLflow is told of an experiment is of one moment, and no older than what it was told before."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_prod.experiments import controller as controller_module
from dspy_prod.experiments import variants_in_mlflow
from dspy_prod.experiments.variants_in_mlflow import VariantsInMlflow
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import PAUSED, RUNNING, STOPPED, Decision, Trial
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
