"""Single-flight: identical concurrent calls share one upstream call, over threads and tasks of any event loop.

The first caller of a key leads; those who come while it works follow. An upstream verdict (an answer, or the
upstream's own error) is shared with the followers already waiting. A leader's own fate (cancelled, out of time,
refused in its own scope) is not: the lead passes to the next follower, who decides for itself.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Final

WAITING: Final = 0
ANSWERED: Final = 1
FAILED: Final = 2
LEADS: Final = 3
LEFT: Final = 4


class Follower:
    """One caller waiting for a leader. `attach(wake)` as in `stores.base.Reservation`."""

    __slots__ = ("error", "state", "value", "wake")

    def __init__(self) -> None:
        self.state = WAITING
        self.value: Any = None
        self.error: BaseException | None = None
        self.wake: Callable[[], None] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        """Register the callback; False when there is nothing to wait for any more."""
        self.wake = wake
        return self.state == WAITING


class Flights:
    """The calls in flight, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, deque[Follower] | None] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: Hashable) -> Follower | None:
        """None: you lead, and must end with `answer`, `fail` or `hand_over`. Else: wait as this follower."""
        with self._lock:
            flights = self._flights
            if key not in flights:
                flights[key] = None
                return None
            followers = flights[key]
            if followers is None:
                followers = flights[key] = deque()
            follower = Follower()
            followers.append(follower)
            return follower

    def leave(self, key: Hashable, follower: Follower) -> bool:
        """Stop following. False when the follower was decided meanwhile; if it `LEADS`, it must end the flight."""
        with self._lock:
            if follower.state != WAITING:
                return False
            follower.state = LEFT
            followers = self._flights.get(key)
            if followers:
                with suppress(ValueError):  # its own flight has ended, these follow a later one
                    followers.remove(follower)
            return True

    def answer(self, key: Hashable, value: Any) -> None:
        """Share the leader's answer and end the flight."""
        followers = self._end(key)
        if followers:
            for follower in followers:
                follower.value = value
                self._decide(follower, ANSWERED)

    def fail(self, key: Hashable, error: BaseException) -> None:
        """Share the upstream's verdict and end the flight. Each follower gets a copy: tracebacks are per raise."""
        followers = self._end(key)
        for follower in followers or ():
            follower.error = _copied(error)
            self._decide(follower, FAILED)

    def hand_over(self, key: Hashable) -> None:
        """Pass the lead to the next follower, or end the flight when nobody follows."""
        with self._lock:
            followers = self._flights.get(key)
            while followers:
                follower = followers.popleft()
                follower.state = LEADS
                if _woken(follower):
                    return
                follower.state = LEFT  # under the same lock, so that it cannot pass the lead on as well
            self._flights.pop(key, None)

    def _end(self, key: Hashable) -> deque[Follower] | None:
        with self._lock:
            return self._flights.pop(key, None)

    def _decide(self, follower: Follower, state: int) -> None:
        with self._lock:
            if follower.state != WAITING:
                return
            follower.state = state
        _woken(follower)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._flights.clear()


def _woken(follower: Follower) -> bool:
    """Wake a decided follower; False when it can never go on, because its event loop is closed."""
    if follower.wake is not None:
        try:
            follower.wake()
        except Exception:
            return False
    return True


def _copied(error: BaseException) -> BaseException:
    try:
        twin = copy.copy(error)
    except Exception:
        return error  # an exception type that cannot be copied is shared as it is
    if type(twin) is not type(error):
        return error
    twin.__cause__ = error.__cause__
    return twin
