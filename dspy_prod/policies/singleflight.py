"""Single-flight: identical concurrent calls share one upstream call, over threads and tasks of any event loop.

The first caller of a key leads; those who come while it works follow. An upstream verdict (an answer, or the
upstream's own error) is shared with the followers already waiting. A leader's own fate (cancelled, out of time,
refused in its own scope) is not: the lead passes to the next follower, who decides for itself. So it does where the
event loop of a leader was closed beneath it, which nobody tells: followers look.

Ctrl-C comes anywhere, also as `join` gives its lock back. So a caller makes its `Follower` before it joins, and who is
cut off calls `hand_over` with it, again where that is cut off as well: it looks who leads, and so does all that is left
to do, and nothing twice.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from dspy_prod.compat.foreign import running_loop
from dspy_prod.runtime.brief import brief
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.twins import twin

LOOK: Final = 1.0
"""Seconds between looks of a follower whether its leader is still there."""

WAITING: Final = 0
ANSWERED: Final = 1
FAILED: Final = 2
LEADS: Final = 3
LEFT: Final = 4

Fits = Callable[[Any], bool]
"""Whether an outcome holds for a follower too, by what it `asks`."""

Home = weakref.ref[asyncio.AbstractEventLoop] | None
"""The event loop that a caller runs in; None: a thread. Weak, for a loop that nobody has any more ends its tasks."""


def home() -> Home:
    """That of the caller."""
    loop = running_loop()
    return None if loop is None else weakref.ref(loop)


def gone(caller: Home) -> bool:
    """Whether a caller will never go on, because its event loop is closed.

    One whose loop is stopped is not gone: the loop may run again, as between two `run_until_complete`, and the caller
    with it. Whoever took its lead would ask a second time, and two would lead. So its followers wait, to their
    deadlines; a loop that will not run again is to be closed.
    """
    if caller is None:
        return False
    loop = caller()
    return loop is None or loop.is_closed()


class Follower:
    """One caller of one key, who leads or waits for a leader. `attach(wake)` as in `stores.base.Reservation`.

    Args:
        home: where the caller runs.
        asks: what it asks for, and within what; for `fits` of `Flights.answer`.
    """

    __slots__ = ("asks", "error", "home", "state", "value", "wake")

    def __init__(self, home: Home = None, asks: Any = None) -> None:
        self.home = home
        self.asks = asks
        self.state = WAITING
        self.value: Any = None
        self.error: BaseException | None = None
        self.wake: Callable[[], None] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        """Register the callback; False when there is nothing to wait for any more."""
        self.wake = wake
        return self.state == WAITING

    def raised(self) -> BaseException:
        """The shared error to raise: one that is this caller's own, for what is said of it from now on."""
        assert self.error is not None
        own = twin(self.error)
        return self.error if own is None else own


class _Followers(deque[Follower]):
    """Those of one flight, and whom they follow."""

    def __init__(self, leader: Follower) -> None:
        super().__init__()
        self.leader = leader


class Flights:
    """The calls in flight, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Followers | Follower] = {}  # the leader itself, while nobody follows
        self._begun: dict[Hashable, Callable[[], None]] = {}  # ends what the leader began elsewhere

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: Hashable, caller: Follower | None = None) -> Follower | None:
        """None: you lead, and must end with `answer`, `fail` or `hand_over`. Else: wait as this follower.

        Args:
            caller: you, new for this key; who is interrupted here calls `hand_over` with it. None: a thread whom
                nothing interrupts.
        """
        if caller is None:
            caller = Follower()
        with brief(self._lock):
            flights = self._flights
            found = flights.get(key)
            if found is None:
                caller.state = LEADS
                flights[key] = caller
                return None
            if not isinstance(found, _Followers):
                found = flights[key] = _Followers(found)
            found.append(caller)
            self._look(key)
            return caller

    def following(self) -> int:
        """Callers who wait for a leader."""
        with brief(self._lock):
            return sum(len(each) for each in self._flights.values() if isinstance(each, _Followers))

    def look_after(self, key: Hashable) -> None:
        """Pass the lead on where the leader is gone. To be called now and then by who follows."""
        with brief(self._lock):
            self._look(key)

    def lost(self, key: Hashable, caller: Follower) -> bool:
        """Whether the lead of a caller is another's now, or nobody's; what it had begun has ended then."""
        return self._leader(key) is not caller

    def begun(self, key: Hashable, end: Callable[[], None]) -> None:
        """Say, as the leader, how to end what this flight begins elsewhere, such as a claim among processes.

        It is ended before anybody else leads and before the flight ends, by whoever brings that about; but not by
        `answer` and `fail`: who calls these has ended it, and said how.

        Args:
            end: called with the lock held, perhaps more than once; it does not wait. Where that is interrupted, and
                nobody follows who would do it again, the reaper does, without the lock.
        """
        with brief(self._lock):
            self._finish(key)
            self._begun[key] = end

    def _leader(self, key: Hashable) -> Follower | None:
        found = self._flights.get(key)
        return found.leader if isinstance(found, _Followers) else found

    def leave(self, key: Hashable, follower: Follower) -> bool:
        """Stop following. False when the follower was decided meanwhile; if it `LEADS`, it must end the flight."""
        with brief(self._lock):
            self._look(key)
            if follower.state != WAITING:
                return False
            self._remove(key, follower)
            return True

    def answer(self, key: Hashable, value: Any, fits: Fits | None = None) -> None:
        """Share the leader's answer and end the flight.

        Args:
            key, value: of the flight; the answer.
            fits: whether it holds for a follower too. With it the flight goes on: whoever called this leads those who
                are left, and must `hand_over`.
        """

        def tell(follower: Follower) -> None:
            follower.value = value
            follower.state = ANSWERED

        self._end(key, tell, fits)

    def fail(self, key: Hashable, error: BaseException, fits: Fits | None = None) -> None:
        """Share the upstream's verdict and end the flight. It is told as it reads now; what the leader's caller says of
        it later is his own. Each follower raises a copy (`Follower.raised`), which is made without the lock: the
        class may be anybody's.

        Args:
            key, error: of the flight; the verdict.
            fits: as for `answer`.
        """
        told = twin(error) or error
        if told is not error:  # tracebacks are per raise, and what was handled there is the leader's
            told.__traceback__ = told.__context__ = None

        def tell(follower: Follower) -> None:
            follower.error = told
            follower.state = FAILED

        self._end(key, tell, fits)

    def hand_over(self, key: Hashable, caller: Follower | None = None) -> None:
        """Pass the lead to the next follower, or end the flight when nobody follows.

        Args:
            key: of the flight.
            caller: you, as you joined. If you do not lead, you follow no more, and nothing else is done: so whoever
                was interrupted may call this at any time, and again. None: the leader, whoever that is.
        """
        with brief(self._lock):
            leader = self._leader(key)
            if caller is None or caller is leader:
                if leader is not None:
                    leader.state = LEFT  # first: should this be interrupted, whoever looks passes the lead on
            else:
                self._remove(key, caller)
            self._look(key)

    def _remove(self, key: Hashable, follower: Follower) -> None:
        if follower.state == WAITING:
            follower.state = LEFT
        followers = self._flights.get(key)
        if isinstance(followers, _Followers):
            with suppress(ValueError):  # its own flight has ended, these follow a later one
                followers.remove(follower)

    def _look(self, key: Hashable) -> None:
        """Pass the lead on where nobody has it any more, and go on where passing it was interrupted."""
        found = self._flights.get(key)
        if found is None:
            return
        leader = found.leader if isinstance(found, _Followers) else found
        if leader.state == LEFT or gone(leader.home):
            self._pass_on(key)
        elif isinstance(found, _Followers) and found and found[0] is leader:
            self._pass_lead(key)

    def _finish(self, key: Hashable) -> None:
        end = self._begun.get(key)
        if end is not None:
            end()  # should this be interrupted, it is done by the next who leads or ends the flight
            self._begun.pop(key, None)

    def _pass_on(self, key: Hashable) -> None:
        try:
            self._finish(key)
        finally:
            self._pass_lead(key)
            end = self._begun.get(key)
            if end is not None and key not in self._flights:  # it was interrupted, and perhaps nobody comes any more
                REAPER.post(partial(self._end_late, key, end))

    def _end_late(self, key: Hashable, end: Callable[[], None]) -> None:
        end()
        with brief(self._lock):
            if self._begun.get(key) is end:
                del self._begun[key]

    def _pass_lead(self, key: Hashable) -> None:
        """Until the new leader is woken, it is the first who follows as well: so `_look` sees who was interrupted."""
        followers = self._flights.get(key)
        while isinstance(followers, _Followers) and followers:
            follower = followers[0]
            if follower.state in (WAITING, LEADS):  # else told, by a leader who was interrupted then
                if not gone(follower.home):
                    followers.leader = follower
                    follower.state = LEADS
                    if _woken(follower):
                        followers.popleft()
                        return
                follower.state = LEFT  # under the same lock, so that it cannot pass the lead on as well
            followers.popleft()
        self._flights.pop(key, None)

    def _end(self, key: Hashable, tell: Callable[[Follower], None], fits: Fits | None) -> None:
        """Whoever is interrupted before the last follower is told leads on, and is to hand over to those left."""
        if fits is not None:
            self._tell(key, tell, fits)
            return
        with brief(self._lock):
            followers = self._flights.get(key)
            while isinstance(followers, _Followers) and followers:
                follower = followers[0]
                if follower.state == WAITING:
                    tell(follower)
                    _woken(follower)
                followers.popleft()
            self._begun.pop(key, None)
            self._flights.pop(key, None)

    def _tell(self, key: Hashable, tell: Callable[[Follower], None], fits: Fits) -> None:
        with brief(self._lock):
            found = self._flights.get(key)
            waiting = list(found) if isinstance(found, _Followers) else []
        for follower in waiting:
            if fits(follower.asks):  # without the lock: it asks others
                with brief(self._lock):
                    if follower.state == WAITING:
                        tell(follower)
                        _woken(follower)
                        self._remove(key, follower)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._flights.clear()
        self._begun.clear()


def _woken(follower: Follower) -> bool:
    """Wake a decided follower; False when it can never go on, because its event loop is closed."""
    if follower.wake is not None:
        try:
            follower.wake()
        except Exception:
            return False
    return True
