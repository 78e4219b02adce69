"""What our own refusals leave in the ledger: who was refused, and why.

A budget that is spent may refuse ten thousand calls a second, for hours. So of refusals that are alike one a minute is
recorded, and tells how many it stands for; and all together stay below a rate, whoever they concern.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Final

from dspy_prod.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    OutageError,
    RateLimitedError,
    RejectedError,
    RunStoppedError,
)
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.routes import Route
from dspy_prod.records import REFUSED
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.base import Store

EVERY: Final = 60.0
"""Seconds between two records of refusals that are alike: the same caller, program, variant, model and reason."""

BURST: Final = 200
REFILL: Final = 1.0
"""Records of refusals a process may write at once into a store, and per second after that."""

_MAX_KINDS: Final = 1_000


class Refusals:
    """Which refusals of one store are recorded."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[tuple[str | None, ...], list[float]] = OrderedDict()  # when it may be told, how many
        self._tokens = float(BURST)
        self._at = 0.0
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def stands_for(self, kind: tuple[str | None, ...], now: float) -> int:
        """How many refusals a record of this one stands for; 0: it is only counted.

        Args:
            kind: what makes refusals alike.
            now: monotonic seconds.
        """
        with self._lock:
            entry = self._kinds.get(kind)
            if entry is None:
                if len(self._kinds) >= _MAX_KINDS:
                    self._kinds.popitem(last=False)
                entry = self._kinds[kind] = [now, 0]
            entry[1] += 1
            if now < entry[0]:
                return 0
            self._tokens = min(float(BURST), self._tokens + max(0.0, now - self._at) * REFILL)
            self._at = now
            if self._tokens < 1:
                return 0
            self._tokens -= 1
            count = int(entry[1])
            entry[0], entry[1] = now + EVERY, 0
            self._kinds.move_to_end(kind)
            return count


def note(call: Call, error: RejectedError) -> None:
    """Record that a call was refused, unless refusals come too fast."""
    if isinstance(error, DeadlineExceededError) and error.working:
        return  # its attempt is recorded
    pipeline, context = call.pipeline, call.context
    route, what = _route(call, error), _what(error)
    kind = (
        *(error.reason, what, route.model, context.user, context.tenant),
        *(context.program, context.experiment, context.variant),
    )
    count = _refusals(pipeline.store).stands_for(kind, pipeline.clock.monotonic())
    if not count:
        return
    reason = f"{error.reason}: {what}" if what else error.reason
    if count > 1:
        reason += f" (and {count - 1} more)"
    record = call.record(route, IDS.make(), 0, REFUSED, 0, pipeline.clock.time(), error=error)
    pipeline.store.append(record._replace(reason=reason))


def _route(call: Call, error: RejectedError) -> Route:
    pipeline = call.pipeline
    return next((route for route in pipeline.every_route() if route.name == error.route), pipeline.primary)


def _what(error: RejectedError) -> str:
    if isinstance(error, BudgetExceededError):
        return error.budget
    if isinstance(error, (OutageError, RunStoppedError)):
        return error.run
    return error.dimension if isinstance(error, RateLimitedError) else ""


_STORES: weakref.WeakKeyDictionary[Store, Refusals] = weakref.WeakKeyDictionary()
_LOCK = RegistryLock()


def _refusals(store: Store) -> Refusals:
    found = _STORES.get(store)
    if found is None:
        with _LOCK:
            found = _STORES.setdefault(store, Refusals())
    return found
