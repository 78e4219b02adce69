"""The pulse of a run beats when it can, and a run without one goes on."""

from __future__ import annotations

import sys
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


@pytest.mark.parametrize("only", [{"start"}, None], ids=["while the thread starts", "anywhere"])
def test_a_signal_handler_may_wake_it_at_any_line_of_what_it_interrupts(only: set[str] | None) -> None:
    """Waking waited for a lock that the interrupted thread held while it started the beats, for ever."""
    beaten = threading.Event()
    heard: list[str] = []
    pulse = Pulse(progress, [], beaten.set)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and (only is None or frame.f_code.co_name in only):
            heard.append(frame.f_code.co_name)
            pulse.wake()  # what `Optimizer.stop` does, which a handler may call
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            with pulse.beating():
                pulse.wake()
        finally:
            sys.settrace(None)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(20.0)
    assert not running.is_alive(), f"it hangs since a handler came in {heard[-1]}"
    assert beaten.is_set()
    assert set(heard) >= (only or {"beating", "_start", "wake"})


def test_news_that_came_while_no_thread_could_begin_are_told_at_once_when_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beats: list[str] = []
    told = threading.Event()

    class Watching:
        def __getattr__(self, what: str) -> Any:
            return lambda progress: (beats.append(what), told.set() if what == "update" else None)

    pulse = Pulse(progress, [Watching()], lambda: None)
    monkeypatch.setattr("dspy_prod.optimize.pulse._EVERY", 3600.0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no more")))
        beating = pulse.beating()
        beating.__enter__()
        for _ in range(3):
            pulse.wake()
    pulse._start()
    assert told.wait(10.0)
    beating.__exit__(None, None, None)
    assert beats[:2] == ["begin", "update"]
