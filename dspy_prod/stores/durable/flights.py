"""Single-flight between processes: of those that want the same answer at the same time, one asks upstream.

Its claim has a short lease that is renewed by a timer, so that calls may last minutes and a killed process is still
missed soon. Whoever follows asks again and again, at growing intervals, and finds the answer in the cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final, Protocol

from dspy_prod.runtime.threads import begin
from dspy_prod.stores.durable.kept import KeptAnswers
from dspy_prod.stores.vocabulary import CachedAnswer, Caller

_log = logging.getLogger("dspy_prod")

LEASE: Final = 2.0
"""Seconds after which a claim ends that is not renewed: so long others wait for a process that was killed."""
RENEW: Final = 0.5
"""Seconds between renewals."""
IDLE: Final = 3.0
"""Seconds without claims after which the thread that renews them ends."""

LEADS: Final = 0
LANDED: Final = 1
FOLLOWS: Final = 2
ALONE: Final = 3


class Claims(Protocol):
    """Who asks upstream for what, as all processes see it. Thread-safe; nothing in it raises or takes long."""

    def __len__(self) -> int:
        """How many this process has."""
        ...

    def claimed(self, key: bytes, who: Caller | None = None) -> bool:
        """Whether this process has claimed it for that caller."""
        ...

    def claimers(self) -> list[tuple[bytes, Caller | None]]:
        """What this process has claimed, and for whom."""
        ...

    def claim(self, key: bytes, waited: bool, who: Caller | None = None) -> int | CachedAnswer:
        """`LEADS`: it is ours. `LANDED`: it is ours, but somebody had it just now: the cache may know the answer.
        `FOLLOWS`: another process has it. `ALONE`: it is nobody's, and each asks for itself: nothing can be shared,
        or who was `waited` for has got the upstream's verdict. Or the answer, where one look tells that as well.
        """
        ...

    def followed(self, key: bytes) -> bool:
        """Whether another process is known to wait for a claim of ours."""
        ...

    def renew(self, but: set[bytes]) -> None:
        """Renew all claims of this process, `but` these."""
        ...

    def free(self, key: bytes, verdict: bool, who: Caller | None = None) -> None:
        """End a claim, if it is that caller's: with an answer in the cache, or for the next one to try; or with the
        upstream's `verdict`, which is not shared between processes, so that all who wait go on. Posted.

        One step: should it have ended meanwhile, and the key be another's, that one keeps it.
        """
        ...

    def close(self) -> None: ...


class Flights:
    """The flights of one process, as `stores.base.Flights` has them.

    Args:
        claims: where all processes look.
        answers: the store's cache.
        now: the store's time.
        hurry: has written soon what is posted.
    """

    def __init__(
        self, claims: Claims, answers: KeptAnswers, now: Callable[[], float], hurry: Callable[[], object]
    ) -> None:
        self._claims = claims
        self._answers = answers
        self._now = now
        self._hurry = hurry
        self._landing: dict[bytes, Caller | None] = {}  # whose they are
        self._leaving = threading.Lock()  # held while one is found to be claimed and added
        self._renewing = _Renewing(claims, self._landing, self._leaving)
        answers.on_written = partial(_landed, claims, self._landing)

    def join(self, key: bytes, waited: bool = False, who: Caller | None = None) -> CachedAnswer | bool:
        """See `stores.base.Flights`."""
        found = self._claims.claim(key, waited, who)
        if found == FOLLOWS:
            return False
        if found == ALONE:
            return True
        if isinstance(found, CachedAnswer):
            return found
        try:
            answer = self._answers.get(key) if found == LANDED else None
            if answer is not None and answer.expires_at > self._now():
                self._claims.free(key, False, who)
                return answer
            self._renewing.begin()
        except BaseException:  # interrupted: nobody is told that he leads
            self._claims.free(key, False, who)
            raise
        return True

    def leave(self, key: bytes, verdict: bool = False, who: Caller | None = None) -> None:
        """See `stores.base.Flights`."""
        claims, answers = self._claims, self._answers
        if not claims.claimed(key, who):
            return  # it is another LM's, and this one was interrupted or asked without a claim
        if not answers.is_posted(key):
            claims.free(key, verdict, who)
            return
        with self._leaving:  # it may have ended: what the next one says of the key comes after this
            if not claims.claimed(key, who):
                return
            self._landing[key] = who  # others go on once they can read it
        if claims.followed(key):
            self._hurry()
        if not answers.is_posted(key):
            _landed(claims, self._landing, key)

    def close(self) -> None:
        """Lead nothing any more."""
        self._claims.close()
        self._renewing.over.set()


def _landed(claims: Claims, landing: dict[bytes, Caller | None], key: bytes) -> None:
    """Others can read the answer, or never will."""
    try:
        who = landing.pop(key)  # first, and by one thread: once it is free, the next flight of this key may land
    except KeyError:
        return
    claims.free(key, False, who)


class _Renewing:
    """The thread that renews claims: begins when it is needed, ends when it was not for a while, or is `over`."""

    def __init__(
        self, claims: Claims, landing: Collection[bytes], leaving: AbstractContextManager[object] | None = None
    ) -> None:
        self._claims = claims
        self._landing = landing
        self._leaving = leaving or nullcontext()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.over = threading.Event()

    def begin(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self.over.is_set():
                    self._thread = begin("dspy_prod-flights", self._run)

    def _run(self) -> None:
        idle = 0.0
        while not self.over.wait(RENEW):
            idle = 0.0 if self._claims else idle + RENEW
            if idle == 0.0:
                self._renew()
            elif idle > IDLE:
                with self._lock:
                    own, self._thread = self._thread, None  # first: whoever claims from now on finds that there is none
                    if not self._claims:
                        return
                    self._thread = own

    def _renew(self) -> None:
        claims, landing = self._claims, self._landing
        try:
            for key, who in claims.claimers():
                if who is not None and who.gone():
                    with self._leaving:
                        if key not in landing:
                            claims.free(key, False, who)  # nobody else would, and it were renewed for ever
            claims.renew(set(landing))
        except Exception:  # a thread that ended here were taken for one that renews, for ever
            _log.exception("Claims could not be renewed; it is tried again")
