"""What posts messages to a webhook, such as Slack's, on a thread of its own."""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from dspy_prod.alerts.claiming import Claims
from dspy_prod.alerts.folding import Folding
from dspy_prod.alerts.formats import FORMATS, Format
from dspy_prod.alerts.notices import Notice, kind_of, notice_of
from dspy_prod.alerts.posting import post
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.runtime.living import members
from dspy_prod.runtime.threads import begin
from dspy_prod.telemetry.events import BUS, Event

_log = logging.getLogger("dspy_prod")

MOST_WAITING: Final = 1_000
"""Events, and messages, that may wait."""
TRIES: Final = 5
"""Times a message is sent before it is given up."""
_TOKEN: Final = 16
"""Characters from which on a part of a URL's path is no word, but a token."""
_BACK_OFF: Final = (1.0, 60.0)


class WebhookStatus(NamedTuple):
    """How it goes.

    Attributes:
        sent: messages that the webhook has taken. folded: events that were held back, as the same was told a moment
            before, here or by another worker; the next message counts those of here.
        dropped: messages that were given up, and events for which there was no room.
        waiting: messages not sent yet.
        failing: why the last try failed; None when it did not.

    Example:
        ```python
        hook = alerts.webhook("https://hooks.example.com/services/T0/B0/XX")
        print(hook.status().dropped)  # given up after five tries
        hook.close()
        ```
    """

    sent: int
    folded: int
    dropped: int
    waiting: int
    failing: str | None


class Webhook:
    """What sends the messages; made by `webhook`. A forked child sends its own, and none of its parent's.

    Attributes:
        timeout: seconds for one try.

    Example:
        ```python
        hook = alerts.webhook("https://hooks.example.com/services/T0/B0/XX")
        print(hook.status())
        hook.close()
        ```
    """

    def __init__(self, url: str, kinds: frozenset[str], every: float, format: Format, timeout: float) -> None:
        self._url = unshown(url, "secret")
        # Known as secrets to whatever leaves the process, an error text of a proxy for one.
        self._tokens = [unshown(part, "secret") for part in urlsplit(url).path.split("/") if len(part) >= _TOKEN]
        self._kinds, self._every, self.timeout = kinds, every, timeout
        self._format: Callable[[Notice], Any] = FORMATS[format] if isinstance(format, str) else format
        self._closed = False
        self._reset()
        reset_after_fork(self, Stage.THREADS)
        self._remove = BUS.add(self._heard, calls=False)
        _OPEN.add(self)

    def _reset(self) -> None:
        self._events: deque[tuple[str, Event]] = deque()
        self._outbox: deque[Notice] = deque()
        self._folding = Folding(self._every)
        self._claims = Claims(self._url, self._every)
        self._changed = threading.Condition(threading.RLock())  # a finaliser may settle, and so be heard, in here
        self._thread: threading.Thread | None = None
        self._sent = self._folded = self._dropped = self._tries = 0
        self._told_dropped = 1
        self._next_try = 0.0
        self._failing: str | None = None
        self._hurry = self._busy = False

    def __repr__(self) -> str:
        return f"Webhook({self.status()!r})"

    def status(self) -> WebhookStatus:
        """How it goes. Never waits for the webhook."""
        waiting = len(self._events) + len(self._outbox)
        return WebhookStatus(self._sent, self._folded, self._dropped, waiting, self._failing)

    def flush(self, timeout: float = 5.0) -> bool:
        """Send what waits, and what was held back, now; False when that took longer than `timeout` seconds."""
        end = time.monotonic() + timeout
        self.hurry()
        with self._changed:
            while self._hurry or self._busy or self._events or self._outbox:
                left = end - time.monotonic()
                if left <= 0 or self._thread is None:
                    self._hurry = False
                    return False
                self._changed.wait(left)
        return True

    def hurry(self) -> None:
        """`flush` without waiting for it."""
        with self._changed:
            self._hurry = True
            self._begin()
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Hear no more events, and send what is left, for at most `timeout` seconds (default: twice the try's)."""
        self._remove()
        _OPEN.discard(self)
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:  # else there was nothing to tell yet
            self.flush(2 * self.timeout if timeout is None else timeout)
        with self._changed:
            left = len(self._events) + len(self._outbox)
            self._events.clear()
            self._outbox.clear()
            if left:
                self._drop(left, "the program ends")
            self._changed.notify_all()

    # -- where events happen -------------------------------------------------------------------------------------------
    def _heard(self, event: Event) -> None:
        kind = kind_of(event)
        if kind not in self._kinds:
            return
        with self._changed:
            if len(self._events) >= MOST_WAITING:
                self._dropped += 1
                return
            self._events.append((kind, event))
            self._begin()
            self._changed.notify_all()

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = begin("dspy_prod-alerts", self._run)

    # -- the thread ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._changed:
                while (wait := self._idle()) > 0:
                    if self._closed:
                        return
                    self._changed.wait(None if wait == inf else wait)
                events, hurry = list(self._events), self._hurry
                self._events.clear()
                self._busy = True
            try:
                self._take(events, hurry)
                first = next(iter(self._outbox), None)
                if first is not None and (hurry or time.monotonic() >= self._next_try):
                    self._send(first)
            except Exception:
                _log.exception("An alert could not be told")
            with self._changed:
                self._busy = False
                if hurry and not self._outbox and not self._events:
                    self._hurry = False
                self._changed.notify_all()

    def _idle(self) -> float:
        """Seconds until there is something to do."""
        now = time.monotonic()
        if self._events or (self._hurry and not (self._outbox and now < self._next_try)):
            return 0.0
        tried = max(0.0, self._next_try - now) if self._outbox else inf
        return min(tried, max(0.0, self._folding.next_due() - now))

    def _take(self, events: list[tuple[str, Event]], hurry: bool) -> None:
        self._drop(0, "too many wait")  # of those there was no room for, too
        now = time.monotonic()
        ready = []
        for kind, event in events:
            try:
                notice = notice_of(kind, event)
            except Exception as error:  # an event of somebody's own, with other details
                _log.warning("An event %s could not be put into words (%s)", kind, type(error).__name__)
                continue
            self._claims.note(notice, event)
            told = self._folding.note(notice, now)
            if told is None:
                self._folded += 1
            else:
                ready.append(told)
        for notice in (*ready, *(self._folding.rest(now) if hurry else self._folding.due(now))):
            if not self._claims.win(notice):
                self._folded += 1  # another worker tells it
            elif len(self._outbox) >= MOST_WAITING:
                self._drop(1, "too many wait")
            else:
                self._outbox.append(notice)

    def _send(self, notice: Notice) -> None:
        try:
            body = json.dumps(self._format(notice), default=str).encode()
        except Exception as error:
            self._told()
            self._drop(1, f"format failed with {type(error).__name__}")
            return
        outcome = post(self._url, body, self.timeout)
        if outcome.sent:
            self._sent += 1
            self._failing = None
        elif outcome.again and self._tries + 1 < TRIES:
            self._failing = outcome.why
            first, most = _BACK_OFF
            self._next_try = time.monotonic() + max(outcome.after, min(most, first * 2**self._tries))
            self._tries += 1
            return
        else:
            self._failing = outcome.why
            self._drop(1, outcome.why)
        self._told()

    def _told(self) -> None:
        """On to the next one."""
        self._tries, self._next_try = 0, 0.0
        with self._changed:
            if self._outbox:  # it may have been closed meanwhile
                self._outbox.popleft()

    def _drop(self, count: int, why: str) -> None:
        """Count what nobody will be told; the log has it each time that it has doubled."""
        self._dropped += count
        if self._dropped >= self._told_dropped:
            self._told_dropped = 2 * self._dropped
            _log.warning("%d alerts were not delivered to the webhook (%s)", self._dropped, why)

    def _after_fork(self) -> None:
        self._reset()


_OPEN: Final[weakref.WeakSet[Webhook]] = weakref.WeakSet()


def _at_exit() -> None:
    """Side by side, so that the end of the program waits for the slowest and not for all."""
    webhooks = members(_OPEN)
    for each in webhooks:
        each.hurry()
    began = time.monotonic()
    for each in webhooks:
        each.close(max(0.0, began + 2 * each.timeout - time.monotonic()))


atexit.register(_at_exit)
