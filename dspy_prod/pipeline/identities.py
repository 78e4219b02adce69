"""What is known in this process of who is called: one identity for each destination, key and model.

Circuits and pauses stay with it, however many LMs and keys come and go: a key that is seldom used finds its open
circuit again.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.options import CircuitBreaker, Retry
from dspy_prod.pipeline.upstream.destination import digest
from dspy_prod.policies.breaker.breaker import Breaker
from dspy_prod.policies.breaker.transitions import OperatorMove
from dspy_prod.policies.fleet import fleet_of
from dspy_prod.policies.orders import Order, operator
from dspy_prod.policies.retry import RetryBudget
from dspy_prod.policies.shared_breaker import SharedBreaker
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.base import Store
from dspy_prod.stores.keys import joined
from dspy_prod.telemetry.events import EventBus

_LONGEST_PAUSE: Final = 3600.0


class Identity:
    """What all routes of one limiter key share in this process; breaker and retry budget by their settings."""

    def __init__(self, store: Any = None, place: str = "") -> None:
        self.store: Callable[[], Any] = _reference(store)
        self.place = place
        self.throttled_at: float | None = None
        self.throttled = False  # a 429 came: from now on the limiter is asked even when nothing is configured
        self.breakers: dict[CircuitBreaker, SharedBreaker] = {}
        self.retry_budgets: dict[Retry, RetryBudget] = {}
        self.states: weakref.WeakValueDictionary[tuple[Any, ...], RouteState] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._outputs: deque[int] = deque(maxlen=200)
        self._sorted: list[int] = []
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        for budget in self.retry_budgets.values():
            budget._after_fork()
        for breaker in self.breakers.values():
            breaker._after_fork()

    def tells(self) -> bool:
        """Whether a call that comes later has to know of it: a circuit that is not quite sound, or a pause."""
        if self.throttled_at is not None and SYSTEM_CLOCK.monotonic() < self.throttled_at + _LONGEST_PAUSE:
            return True
        looks = [Breaker.snapshot(breaker) for breaker in self.breakers.values()]  # as far as is known here
        return any(look.state in ("open", "half_open") or look.failures or look.slow for look in looks)

    def learn(self, output_tokens: int) -> None:
        """Remember the size of a real answer."""
        outputs, ordered = self._outputs, self._sorted
        with self._lock:
            if len(outputs) == outputs.maxlen:
                ordered.remove(outputs[0])
            outputs.append(output_tokens)
            insort(ordered, output_tokens)

    def typical_output(self) -> int | None:
        """Running p90 of real output tokens, None before the first."""
        with self._lock:
            ordered = self._sorted
            return ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))] if ordered else None


class RouteState:
    """What all routes of one identity with the same settings share: the identity, and which of its parts they use."""

    __slots__ = ("__weakref__", "breaker", "identity", "learn", "retry_budget", "typical_output")

    def __init__(self, identity: Identity, breaker: SharedBreaker | None, retry_budget: RetryBudget) -> None:
        self.identity = identity
        self.breaker = breaker
        self.retry_budget = retry_budget
        self.learn = identity.learn
        self.typical_output = identity.typical_output

    @property
    def throttled(self) -> bool:
        return self.identity.throttled

    @throttled.setter
    def throttled(self, throttled: bool) -> None:
        self.identity.throttled = throttled
        self.identity.throttled_at = SYSTEM_CLOCK.monotonic() if throttled else None


_IDENTITIES: weakref.WeakValueDictionary[tuple[int, str], Identity] = weakref.WeakValueDictionary()
_REMEMBERED: dict[tuple[int, str], Identity] = {}
"""Those that are kept though no route uses them: a key that is seldom used finds its open circuit again."""


class _Sweep:
    """Forget what is not in use and has nothing to tell, each time when there are twice as many as were left."""

    fewest: Final = 256

    def __init__(self) -> None:
        self.at = self.fewest

    def __call__(self) -> None:
        for key, identity in _REMEMBERED.copy().items():
            if identity.store() is None or not (identity.states or identity.tells()):
                del _REMEMBERED[key]
        self.at = max(self.fewest, 2 * len(_REMEMBERED))


_sweep = _Sweep()


def _reference(store: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(store)
    except TypeError:  # None, or a store of somebody else's that cannot be referred to so
        return lambda: store


_LOCK = RegistryLock()


def shared_state(
    store: Store,
    key: str,
    place: str,
    *,
    model: str,
    retry: Retry,
    breaker: CircuitBreaker | None,
    clock: Clock,
    bus: EventBus,
    everywhere: bool = True,
) -> RouteState:
    """What all routes of one key share; with other breaker settings a breaker of their own, but the same limiter.

    Args:
        key: the limiter's.
        place: address and model, see `operate`.
        everywhere: other processes know it by that key too.
    """
    known = (id(store), key)
    fleet = fleet_of(store)
    fleet.look()  # before the lock: listeners may hear of it
    with _LOCK:
        identity = _IDENTITIES.get(known)
        if identity is None or identity.store() is not store:  # an `id` may be another object's by now
            if len(_REMEMBERED) >= _sweep.at:
                _sweep()
            identity = _IDENTITIES[known] = _REMEMBERED[known] = Identity(store, place)
        state = identity.states.get((breaker, retry))
        if state is not None:
            return state
        guard = None if breaker is None else identity.breakers.get(breaker)
        if breaker is not None and guard is None:
            guard = identity.breakers[breaker] = SharedBreaker(
                breaker, name=model, place=place, key=joined(key, digest(breaker.model_dump())), fleet=fleet,
                shares=breaker.shared and store.durable and everywhere, clock=clock, bus=bus,
            )  # fmt: skip
        budget = identity.retry_budgets.get(retry)
        if budget is None:
            budget = identity.retry_budgets[retry] = RetryBudget(retry)
        state = identity.states[breaker, retry] = RouteState(identity, guard, budget)
        return state


def operate(store: Store, place: str, move: OperatorMove, reason: str = "", by: str | None = None) -> None:
    """Move every circuit of a place by hand, in all workers, whatever key or headers its calls have, now and later.

    Args:
        place: address and model; or a model, wherever it is.
        reason, by: why, and who says so; default: the user of this process.

    Raises:
        StoreUnavailableError: the other workers cannot be told. The circuits of this process are moved all the same.
    """
    fleet = fleet_of(store)
    order = Order(place, move, reason, by or operator(), fleet.board.now(), IDS.make())
    with _LOCK:
        alike = [each for each in list(_IDENTITIES.values()) if each.place == place and each.store() is store]
        breakers = [breaker for each in alike for breaker in each.breakers.values()]
    for breaker in breakers:  # listeners hear of it, outside the lock
        breaker.obey(order)
    fleet.order(order)
    fleet.look()


def lift(store: Store, place: str) -> bool:
    """Lift the pauses of every limiter of a place, whatever key its calls have; whether there was one.

    Args:
        place: address and model.
    """
    with _LOCK:
        alike = [(key, each) for (_, key), each in _IDENTITIES.items() if each.place == place]
    lifted = False
    for key, each in alike:
        if each.store() is store and store.lift(key):
            each.throttled, each.throttled_at = False, None
            lifted = True
    return lifted
