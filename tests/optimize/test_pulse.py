"""The pulse of a run beats when it can, and a run without one goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dspy_prod.optimize.pulse import Pulse
from dspy_prod.runtime import threads


def progress() -> Any:
    return None


def test_a_run_goes_on_without_a_thread_and_gets_one_when_something_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that had as many threads as it may ended the optimization with a bare RuntimeError."""
    beaten = threading.Event()
    pulse = Pulse(progress, [], beaten.set)

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pulse.beating():
            pulse.wake()
            assert "dspy_prod-optimization" in threads.missing()
        assert not beaten.is_set()
    with pulse.beating():
        assert beaten.wait(10.0)
    assert "dspy_prod-optimization" not in threads.missing()


def test_a_thread_that_was_lacking_begins_with_the_next_news(monkeypatch: pytest.MonkeyPatch) -> None:
    beaten = threading.Event()
    pulse = Pulse(progress, [], beaten.set)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no more")))
        beating = pulse.beating()
        beating.__enter__()
    pulse.wake()
    assert beaten.wait(10.0)
    beating.__exit__(None, None, None)


def test_nothing_begins_to_beat_after_the_end() -> None:
    """News may arrive late."""
    beaten = threading.Event()
    pulse = Pulse(progress, [], beaten.set)
    pulse.wake()
    assert pulse._thread is None
    with pulse.beating():
        assert beaten.wait(10.0)
    pulse.wake()
    assert pulse._thread is None
