"""The courier against an exporter that is slow, failing, dying or refusing: what is kept, what is lost, who waits."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from dspy_prod import Redactor, add_listener
from dspy_prod.tracking import delivery as module
from dspy_prod.tracking.batches import Batch
from dspy_prod.tracking.calls import LeanNode
from dspy_prod.tracking.content import Content
from dspy_prod.tracking.courier import Courier
from dspy_prod.tracking.delivery import STALLED, Delivery
from dspy_prod.tracking.sampling import Sampler
from dspy_prod.tracking.tally import ADMITTED, Tally
from dspy_prod.tracking.traces import Traces
from tests.e2e.support import until
from tests.logged import logged
from tests.stopwatch import Stopwatch
from tests.tracking.test_traces import node


class Fake:
    """An exporter in this process, driven by the test."""

    made: list[Fake]

    def __init__(self, heard: Callable[..., None]) -> None:
        self.heard = heard
        self.alive = True
        self.batches: list[Batch] = []
        self.hurried = threading.Event()
        self.prompt = True  # confirms at once
        self.refuses = 0

    def send(self, batch: Batch) -> None:
        self.batches.append(batch)
        if self.prompt:
            self.heard(batch.number, self.refuses)

    def hurry(self) -> None:
        self.hurried.set()

    def stop(self) -> None:
        self.alive = False

    def forget(self) -> None:
        self.alive = False

    def die(self) -> None:
        self.alive = False
        self.heard(failing="it died", died=True)


class Scene:
    """A courier whose exporters are fakes."""

    def __init__(self, queue_size: int = 1000, prompt: bool = True) -> None:
        self.fakes: list[Fake] = []

        def make(heard: Callable[..., None]) -> Any:
            fake = Fake(heard)
            fake.prompt = prompt
            self.fakes.append(fake)
            heard(ready=True)
            return fake

        traces = Traces(Content("full", Redactor()), Sampler(1.0))
        self.courier = Courier(traces, make, queue_size, Tally())

    def trace(self) -> bool:
        """One whole trace; whether it was admitted."""
        if not self.courier.admits():
            return False
        root: LeanNode = node(self.courier)
        root.answered("a")
        self.courier.post(self.courier.traces.ended, root)
        return True

    @property
    def sent(self) -> int:
        return sum(batch.traces for batch in self.fakes[-1].batches) if self.fakes else 0


def test_everything_that_ended_is_there_after_a_flush() -> None:
    """A flush waits for what was posted before it, and only for that."""
    scene = Scene()
    assert scene.courier.flush(1.0)
    for _ in range(250):
        scene.trace()
    assert scene.courier.flush(60.0)
    counts = scene.courier.health("uri", "experiment")
    assert (scene.courier.tally.numbers[ADMITTED], counts.exported, counts.waiting, counts.lost) == (250, 250, 0, 0)
    assert scene.courier.close(1.0) == 0


def test_a_flush_ends_although_calls_go_on() -> None:
    """It does not wait for what comes after it."""
    scene, stop = Scene(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            scene.trace()
            time.sleep(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert all(scene.courier.flush(60.0) for _ in range(5))
    finally:
        stop.set()
        thread.join()


def test_a_stuck_exporter_fills_the_queue_and_then_traces_are_turned_away() -> None:
    """Callers never wait; what is turned away is counted, and nothing admitted is."""
    scene = Scene(queue_size=300, prompt=False)
    admitted = sum(scene.trace() for _ in range(1000))
    assert 300 <= admitted <= 302
    counts = scene.courier.health("uri", "experiment")
    assert counts.lost == 1000 - admitted
    assert counts.waiting == admitted
    assert not scene.courier.flush(0.2)
    fake = scene.fakes[0]
    fake.prompt = True

    def all_heard() -> bool:
        for batch in list(fake.batches):  # one of them may have been on its way meanwhile
            fake.heard(batch.number)
        return scene.courier.flush(0.1)

    until(all_heard)
    assert scene.courier.health("uri", "experiment").exported == admitted
    assert scene.trace()


def test_listeners_are_told_of_losses_each_time_that_they_have_doubled() -> None:
    """An alert for each of a thousand traces would be as bad as none."""
    told: list[int] = []
    remove = add_listener(lambda event: told.append(event.data["lost"]) if event.name == "tracking_lost" else None)
    scene = Scene(queue_size=3, prompt=False)
    try:
        lost = sum(not scene.trace() for _ in range(1000))
        until(lambda: bool(told) and 2 * told[-1] > lost)
    finally:
        remove()
    assert lost > 900
    assert len(told) <= 11
    assert all(1 <= before <= after for before, after in itertools.pairwise(told))


def test_what_a_dead_exporter_had_not_confirmed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process is started, and gets it before anything new; nothing is counted twice."""
    monkeypatch.setattr(module, "RESTART", (0.01, 0.01))
    scene = Scene(prompt=False)
    scene.trace()
    until(lambda: scene.sent == 1)
    scene.fakes[0].die()
    assert scene.courier.delivery.failing == "it died"
    scene.trace()
    until(lambda: len(scene.fakes) == 2)
    until(lambda: scene.sent == 2)
    second = scene.fakes[1]
    assert second.batches[0] is scene.fakes[0].batches[0]
    for batch in second.batches:
        second.heard(batch.number)
        second.heard(batch.number)
    assert scene.courier.health("uri", "experiment").exported == 2
    assert scene.courier.delivery.failing is None


def test_what_mlflow_refuses_is_counted_as_lost() -> None:
    """The rest of the batch is not."""
    scene = Scene(prompt=False)
    for _ in range(3):
        scene.trace()
    until(lambda: scene.sent == 3)
    fake = scene.fakes[0]
    for batch in fake.batches:
        fake.heard(batch.number, 1)
    counts = scene.courier.health("uri", "experiment")
    assert counts.lost == len(fake.batches)
    assert counts.exported == 3 - len(fake.batches)


def test_a_failure_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """One warning however often it is tried, one line when it works again."""
    scene = Scene(prompt=False)
    scene.trace()
    until(lambda: scene.sent == 1)
    fake = scene.fakes[0]
    with caplog.at_level(logging.INFO, "dspy_prod"):
        for _ in range(5):
            fake.heard(failing="connection refused")
        fake.heard(fake.batches[0].number)
    assert [line.levelname for line in logged(caplog)] == ["WARNING", "INFO"]
    assert "connection refused" in caplog.text


def test_the_end_waits_for_an_exporter_that_moves_and_not_for_one_that_does_not() -> None:
    """What is left is counted; the exporter is told to hurry."""
    moving = Scene(prompt=False)
    for _ in range(5):
        moving.trace()
    until(lambda: moving.sent == 5)
    fake = moving.fakes[0]

    def confirm() -> None:
        assert fake.hurried.wait(30)
        for batch in list(fake.batches):
            fake.heard(batch.number)

    helper = threading.Thread(target=confirm)
    helper.start()
    assert moving.courier.close(20.0) == 0
    helper.join()
    stuck = Scene(prompt=False)
    for _ in range(5):
        stuck.trace()
    until(lambda: stuck.sent == 5)
    with Stopwatch() as took:
        assert stuck.courier.close(60.0) == 5
    assert took.seconds < STALLED + 5
    assert stuck.courier.health("uri", "experiment").lost == 5
    assert not stuck.trace()


def test_a_courier_that_had_nothing_to_do_ends_at_once() -> None:
    """Also when its exporter was started ahead."""
    scene = Scene()
    scene.courier.begin()
    until(lambda: scene.fakes)
    with Stopwatch() as took:
        assert scene.courier.close(30.0) == 0
    assert took.seconds < 2
    assert not scene.fakes[0].alive


@pytest.mark.skipif(os.name != "posix", reason="memory is shared by a descriptor")
def test_a_descriptor_that_is_somebody_else_s_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """Who becomes a daemon closes every file; turning tracking off then closed what had been opened in its place."""
    tally = Tally()
    assert tally.file is not None
    os.close(tally.file)
    with (tmp_path / "theirs").open("w") as theirs:
        assert theirs.fileno() == tally.file
        assert tally.shared() is None
        tally.close()
        theirs.write("still open")
        theirs.flush()
    tally.renew()
    assert tally.shared() is not None
    tally.close()


def test_a_file_that_is_slow_is_waited_for_and_a_silent_server_is_not() -> None:
    """On a busy machine a file took longer than a server may be silent, and a program ended without its traces."""
    long_ago = time.monotonic() - 2 * STALLED

    def delivery(silence: float) -> Delivery:
        heard: list[Callable[..., None]] = []
        made = Delivery(lambda hear: heard.append(hear) or Fake(hear), Tally(), lambda: None, silence)
        made.send(begin=True)
        assert not made.stalled(long_ago)  # it takes seconds to be ready
        heard[0](ready=True)
        made._progressed = long_ago
        return made

    assert delivery(STALLED).stalled(long_ago)
    file = delivery(inf)
    assert not file.stalled(long_ago)
    file.failing = "no space left on device"
    assert file.stalled(long_ago)
