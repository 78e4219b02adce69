"""Controllers in processes and threads of their own: killed, forked, without a store, and ended in good order."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments import reading
from dspy_prod.experiments.attending import Attending, attend
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.opened import Opened
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.trials import DECIDED, RUNNING, STOPPED
from tests.experiments.controllers import attending
from tests.experiments.support import OK, audit, declared, feed, lines

SERVER = multiprocessing.get_context("forkserver")
if __name__ != "__mp_main__":
    SERVER.set_forkserver_preload(["tests.experiments.controllers"])

WORSE = {"control": 0.85, "new": 0.7}
PATIENCE = 120.0


def wait_for(happened: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def begun(url: str, every: float) -> Any:
    """A process with a controller, which begins to look just now."""
    begins = SERVER.Event()
    process = SERVER.Process(target=attending, args=(url, every, begins))
    process.start()
    assert begins.wait(PATIENCE)
    return process


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url, "test")
    yield store
    store.close()


def evidence(opened: Opened) -> Any:
    """All that is known, once everything was read."""
    opened.controller.read()
    saved = opened.trials.checkpoint("e")
    assert saved is not None
    return {key: value for key, value in json.loads(saved.state).items() if key in ("read", "evidence")}


@pytest.mark.long
def test_a_controller_that_is_killed_again_and_again_decides_the_same(url: str, store: Store) -> None:
    """One rollback, by the very evidence that an undisturbed one has."""
    calm = declared(MemoryStore("calm"))
    disturbed = declared(store)
    kills, begin = 0, 0
    while disturbed.trial().state == RUNNING:
        process = begun(url, 0.01)
        for each in (calm, disturbed):
            feed(each, 60, WORSE, begin=begin)
        calm.controller.step()
        begin += 60
        assert begin < 3_000
        process.join(0.5)
        kills += process.exitcode is None
        process.kill()
        process.join()
    process = begun(url, 0.01)
    process.join(PATIENCE)
    assert process.exitcode == 0, "it ends with the experiment"
    assert kills >= 3
    assert (disturbed.trial().state, calm.trial().state) == (DECIDED, DECIDED)
    assert audit(disturbed) == audit(calm) == [("rollback", "controller")]
    assert disturbed.scorecard().serves == calm.scorecard().serves == "control"
    assert evidence(disturbed) == evidence(calm)


@pytest.mark.long
def test_a_controller_that_is_killed_in_the_middle_leaves_nothing_to_wait_for(url: str, store: Store) -> None:
    """Its lease ends with it, and what it had read is neither lost nor counted twice."""
    calm, opened = declared(MemoryStore("calm")), declared(store)
    for each in (calm, opened):
        feed(each, 1_500, {"control": 0.8, "new": 0.8})
    store.trials.tally("e")
    calm.controller.step()
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = begun(url, 0.05)
        time.sleep(delay)
        process.kill()
        process.join()
    began = time.monotonic()
    assert opened.controller.step() is not None
    assert time.monotonic() - began < 25, "less than the lease of one that cannot be asked"
    assert opened.trial().state == RUNNING
    assert evidence(opened) == evidence(calm)


def test_several_at_once_decide_once(url: str, store: Store) -> None:
    opened = declared(store)
    processes = [begun(url, 0.01) for _ in range(3)]
    feed(opened, 1_500, {"control": 0.9, "new": 0.5})
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert audit(opened) == [("rollback", "controller")]


# -- the command -------------------------------------------------------------------------------------------------------
def run(url: str, *more: str) -> subprocess.Popen[str]:
    """`dspy-prod experiment run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dspy_prod.cli", "experiment", "run", "e", "--store", url, "--namespace", "test", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_and_in_good_order(number: int, url: str, store: Store) -> None:
    """However long its pauses are; whoever comes next need not wait for its lease."""
    opened = declared(store)
    with run(url, "--every", "600") as process:
        assert process.stdout is not None
        assert "e: running" in process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert "no longer looked at from here" in out
    assert store.trials.lease("experiment/e", "another", 1.0).holder == "another"
    assert opened.trial().state == RUNNING


@pytest.mark.long
def test_it_ends_when_the_experiment_is_decided(url: str, store: Store) -> None:
    opened = declared(store)
    feed(opened, 500, {"control": 0.2, "new": 0.9})
    store.trials.tally("e")
    with run(url, "--every", "0.1", "--json") as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    last = json.loads(out.splitlines()[-1])
    assert (last["state"], last["serves"], last["audit"][-1]["what"]) == (DECIDED, "new", "promote")


# -- a thread of a service ---------------------------------------------------------------------------------------------
class Echo(dspy.Module):  # type: ignore[misc]
    """A program that asks nobody."""

    def forward(self) -> str:
        return "echo"


def experiment(store: Store) -> Experiment:
    return Experiment("e", variants={"control": Echo(), "new": Echo()}, metrics=[OK], guardrails=(), store=store)


def thread_of(exp: Experiment) -> threading.Thread:
    assert exp._attending is not None
    found = exp._attending._thread
    assert found is not None
    return found


def test_a_service_looks_by_itself_until_it_is_decided(store: Store) -> None:
    exp = experiment(store)
    exp.start(auto=True, every=0.05)
    thread = thread_of(exp)
    assert thread.daemon
    opened = Opened(store, "e")
    feed(opened, 500, {"control": 0.9, "new": 0.2})
    wait_for(lambda: exp.state == DECIDED, "it is decided")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(lines(opened, "rollback")) == 1


@pytest.mark.parametrize("end", ["stop", "remove", "forget"])
def test_its_thread_ends_with_the_experiment(end: str) -> None:
    store = MemoryStore("ends")
    exp = experiment(store)
    exp.start(auto=True, every=0.05)
    thread = thread_of(exp)
    if end == "stop":
        exp.stop()
    elif end == "remove":
        exp.remove(force=True)
    del exp
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    trial = store.trials.trial("e")
    assert (None if trial is None else trial.state) == {"stop": STOPPED, "remove": None, "forget": RUNNING}[end]


def test_a_copy_does_not_look_by_itself() -> None:
    exp = experiment(MemoryStore("copies"))
    exp.start(auto=True, every=0.05)
    assert exp.deepcopy()._attending is None
    assert thread_of(exp).is_alive()


@pytest.mark.parametrize("every", [0, -1, 0.01, float("nan"), float("inf"), True, "10"])
def test_an_impossible_pause_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every="):
        experiment(MemoryStore("pauses")).start(auto=True, every=every)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_looks_with_its_first_call(store: Store) -> None:
    exp = experiment(store)
    exp.start(auto=True, every=0.05)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert exp._attending is not None
            if exp._attending._thread is None:
                exp()
                code = 0 if thread_of(exp).is_alive() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert thread_of(exp).is_alive()


def test_threads_that_look_at_once_count_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that shows the scorecard is asked for by many."""
    monkeypatch.setattr(reading, "EVERY", 0.0)
    calm, opened = declared(MemoryStore("calm")), declared(MemoryStore("asked"))
    stop = threading.Event()
    threads = [threading.Thread(target=_look, args=(opened, stop)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for each in (calm, opened):
        feed(each, 2_000, {"control": 0.8, "new": 0.8})
    stop.set()
    for thread in threads:
        thread.join()
    assert evidence(opened) == evidence(calm)


@pytest.mark.parametrize("how", ["step", "tell"])
def test_what_mlflow_is_told_does_not_change_while_it_is_told(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread looks with the same object meanwhile: its figures would be of two moments, or end the call with
    "dictionary changed size"."""
    opened = declared(MemoryStore(how))
    controller = opened.controller
    feed(opened, 50, {"control": 0.8, "new": 0.8})
    counted: list[int] = []

    def look(trial: Any, stage: str, decision: Any, known: Evidence, *rest: Any) -> None:
        if threading.current_thread() is other:
            return
        counted.append(known.units("ok", "control"))
        feed(opened, 200, {"control": 0.8, "new": 0.8}, begin=50)
        other.start()
        other.join(0.5)  # it waits, or has read by then
        counted.append(known.units("ok", "control"))

    other = threading.Thread(target=opened.controller.read)
    monkeypatch.setattr("dspy_prod.tracking.setup.courier", object)
    monkeypatch.setattr(controller._in_mlflow, "look", look)
    monkeypatch.setattr(controller._feedback, "look", lambda trial: None)
    getattr(controller, how)()
    other.join(30)
    before, after = counted
    assert before == after > 0
    assert controller._reading.evidence is not None
    assert controller._reading.evidence.units("ok", "control") > after, "it was read once it was told"


def _look(opened: Opened, stop: threading.Event) -> None:
    while not stop.is_set():
        opened.controller.step()
        opened.scorecard()


# -- without a store ---------------------------------------------------------------------------------------------------
class Away:
    """A store that cannot be reached at times."""

    def __init__(self, trials: Any) -> None:
        self._trials, self.down = trials, 0

    def __getattr__(self, name: str) -> Any:
        if self.down and name in ("look", "matured"):
            self.down -= 1
            raise StoreUnavailableError("the disk is full")
        return getattr(self._trials, name)


@pytest.fixture
def away() -> tuple[Opened, Away]:
    trials = Away(MemoryStore("away").trials)
    store: Any = SimpleNamespace(trials=trials, namespace="away")
    return declared(store), trials


def test_it_keeps_trying_while_the_store_is_away(
    away: tuple[Opened, Away], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """It says so once, and once when the store is back."""
    opened, trials = away
    feed(opened, 300, {"control": 0.9, "new": 0.2})
    trials.down = 3
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        assert attend(opened, 0.05, threading.Event())
    assert opened.trial().state == DECIDED
    assert [record.message.partition(" experiment e")[2] for record in caplog.records] == [
        " is looked at again when its store is back: the disk is full", " is back",
    ]  # fmt: skip


def test_what_was_read_before_the_store_went_away_is_not_counted_twice(
    away: tuple[Opened, Away], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    opened, trials = away
    feed(opened, 300, {"control": 0.8, "new": 0.8})
    page = trials._trials.matured
    pages = 0

    def matured(*given: Any) -> Any:
        nonlocal pages
        pages += 1
        if pages == 3:
            raise StoreUnavailableError("in the middle")
        return page(*given)

    monkeypatch.setattr(reading, "PART", 100)
    monkeypatch.setattr(trials, "matured", matured, raising=False)
    with pytest.raises(StoreUnavailableError):
        opened.controller.step()
    opened.controller.step()
    calm = declared(MemoryStore("calm"))
    feed(calm, 300, {"control": 0.8, "new": 0.8})
    assert evidence(opened) == evidence(calm)


def test_an_unexpected_error_does_not_end_the_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = declared(MemoryStore("errors"))
    steps = []
    monkeypatch.setattr(opened.controller, "step", lambda: steps.append(1) or 1 / 0)
    attending = Attending(opened, 0.05)
    attending.keep_going()
    wait_for(lambda: len(steps) > 1, "it looks again")
    attending.close()
    assert "Looking at the experiment e failed" in caplog.text


def test_what_a_person_does_is_told_to_listeners() -> None:
    """As what a controller does."""
    exp = experiment(MemoryStore("told"))
    seen: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(seen.append)
    try:
        exp.pause("for lunch")
        exp.promote("new", force=True, reason="enough")
        exp.promote("new")
    finally:
        remove()
    told = [(each.name, each.data["what"], each.data["reason"], each.data["variant"]) for each in seen]
    assert told == [
        ("experiment_alarm", "pause", "for lunch", None), ("experiment_moved", "promote", "enough", "new"),
    ]  # fmt: skip
    assert (exp.to_dict()["serves"], [each["what"] for each in exp.to_dict()["audit"]]) == (
        "new", ["start", "pause", "promote"],
    )  # fmt: skip
