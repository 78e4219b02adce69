"""A controller that goes on by itself: it looks every so often, until the experiment is decided or stopped.

In a process of its own (`dspy-prod experiment run`) or in a thread of a service (`start(auto=True)`). Any number of
them may run: one at a time looks, and a killed one leaves nothing that another has to wait for. While the store cannot
be reached it keeps trying.
"""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections.abc import Callable
from typing import Final

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.opened import Opened
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin

EVERY: Final = 10.0
"""Seconds between two looks."""

SHORTEST: Final = 0.05
JITTER: Final = 0.1
"""Share by which a pause is randomly shorter, so that many processes do not look at once."""

_log = logging.getLogger("dspy_prod")


class Looks:
    """Looks at an experiment, whether or not its store can be reached.

    Args:
        opened: the experiment.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._away = False

    def look(self) -> bool:
        """Look once; whether the experiment is over."""
        controller = self._opened.controller
        try:
            controller.step()
        except StoreUnavailableError as error:
            if not self._away:
                _log.warning("The experiment %s is looked at again when its store is back: %s", controller.name, error)
            self._away = True
            return False
        if self._away:
            _log.warning("The store of the experiment %s is back", controller.name)
            self._away = False
        return controller.over


def attend(
    opened: Opened, every: float, stop: threading.Event, looked: Callable[[], None] = lambda: None
) -> bool:  # fmt: skip
    """Look until the experiment is over, or `stop` is set; whether it is over.

    Args:
        opened: the experiment. every: seconds between two looks. looked: called after each.
    """
    looks = Looks(opened)
    while not stop.is_set():
        over = looks.look()
        looked()
        if over:
            return True
        stop.wait(every * random.uniform(1 - JITTER, 1.0))
    return False


class Attending:
    """Looks in a daemon thread, which ends with the experiment, with this object, and with the process.

    In a forked child it begins anew with `keep_going`.

    Args:
        opened: the experiment, for nobody else's use. every: seconds between two looks.

    Raises:
        ConfigError: `every` is impossible.
    """

    def __init__(self, opened: Opened, every: float = EVERY) -> None:
        self._every = checked(every)
        self._name, self._looks = opened.name, Looks(opened)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        reset_after_fork(self)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None  # a copy of an experiment does not look by itself

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def keep_going(self) -> None:
        """Start the thread unless it runs: at first, and in a forked child."""
        if self._thread is not None or self._stop.is_set():
            return
        with self._lock:
            if self._thread is None:
                self._thread = begin("dspy_prod-experiment", _run, weakref.ref(self), self._stop, self._every)
                if self._thread is not None:  # else the next call tries again
                    weakref.finalize(self, self._stop.set)  # when it is forgotten, and when the interpreter ends

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def look(self) -> bool:
        """Look once; whether it is over. Never raises an `Exception`."""
        try:
            return self._looks.look()
        except Exception:
            _log.exception("Looking at the experiment %s failed; it is looked at again", self._name)
            return False

    def _after_fork(self) -> None:
        ended = self._stop.is_set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = None
        if ended:
            self._stop.set()


def checked(every: float) -> float:
    """The seconds between two looks; a ConfigError where they are impossible."""
    if isinstance(every, bool) or not isinstance(every, (int, float)) or not SHORTEST <= every < threading.TIMEOUT_MAX:
        raise ConfigError(f"every={every!r} is a number of seconds, at least {SHORTEST}")
    return float(every)


def _run(attending: weakref.ref[Attending], stop: threading.Event, every: float) -> None:
    """The thread. It keeps the object alive only while it looks."""
    while not stop.is_set():
        one = attending()
        if one is None or one.look():
            return
        del one
        stop.wait(every * random.uniform(1 - JITTER, 1.0))
