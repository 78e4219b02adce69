"""Outages: since when which upstreams of a run have answered nothing, and for how long a run puts up with that.

An outage is no wrong answer. What an optimizer or an evaluation asks meanwhile waits instead of failing, and any answer
of the same upstream ends the wait of everybody. Which errors tell an outage, `pipeline.outcome.is_outage` says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from dspy_prod.policies.waiters import Waiter, Waiters

FIRST_PAUSE: Final = 0.5
"""Seconds before the first new round through the routes; doubled with every round."""

LONGEST_PAUSE: Final = 10.0
"""Seconds between two rounds at most, unless the upstream itself told a later time."""

ROUNDS: Final = 5
"""How often a request may fail while the same upstream answers others: from then on the failure is its own."""


class Silence:
    """That one upstream answers nothing.

    Attributes:
        model: whose upstream it is. since: monotonic time of the first failure. waiters: calls that wait for its end.
        left: when the latest call that met it gave up; told: whether its beginning has been told.
    """

    __slots__ = ("left", "model", "since", "told", "waiters")

    def __init__(self, model: str, since: float) -> None:
        self.model, self.since, self.left = model, since, since
        self.told = False
        self.waiters = Waiters()


class Outage(NamedTuple):
    """What a call that failed everywhere has to know.

    Attributes:
        began: monotonic time since when none of its upstreams has answered. until: when the run's patience ends.
        models: what is silent. news: whether this is its beginning.
    """

    began: float
    until: float
    models: tuple[str, ...]
    news: bool


class Outages:
    """The silent upstreams of one run, shared by all of its calls.

    Args:
        patience: seconds that an upstream may be silent; 0: nobody waits.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience
        self.answers: dict[str, int] = {}
        """How often each upstream has answered."""
        self._silent: dict[str, Silence] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: a lock nobody holds."""
        self._lock = threading.RLock()  # whoever stops a run from a signal handler wakes those who wait
        for each in self._silent.values():
            each.waiters = Waiters()  # they wait in the parent

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the run's calls are waiting for right now."""
        with self._lock:
            return tuple(dict.fromkeys(each.model for each in self._silent.values() if each.waiters))

    def answered(self, upstream: str, now: float) -> float | None:
        """Note an answer, which ends the silence; how many seconds of it there were, if its beginning was told."""
        with self._lock:
            self.answers[upstream] = self.answers.get(upstream, 0) + 1
            silence = self._silent.pop(upstream, None)
        if silence is None:
            return None
        for each in silence.waiters.all():
            each.tell()
        return now - silence.since if silence.told else None

    def failed(self, upstreams: dict[str, str], now: float) -> Outage:
        """Note that a call has failed on all of its upstreams (model by upstream).

        A silence that nobody has heard for as long as the run is patient begins anew: an upstream that nobody asks has
        not been down in between.
        """
        with self._lock:
            met = []
            for upstream, model in upstreams.items():
                silence = self._silent.get(upstream)
                if silence is None or (not silence.waiters and now - silence.left > self.patience):
                    silence = self._silent[upstream] = Silence(model, now)
                silence.left = now
                met.append(silence)
            began = max(each.since for each in met)
            news = not all(each.told for each in met)
            for each in met:
                each.told = True
            return Outage(began, began + self.patience, tuple(dict.fromkeys(upstreams.values())), news)

    def enter(self, upstreams: Collection[str], waiter: Waiter) -> bool:
        """Wait for the end of a silence; False when one of them is over already."""
        with self._lock:
            silences = [self._silent.get(upstream) for upstream in upstreams]
            for each in silences:
                if each is not None:
                    each.waiters.add(waiter)
            return None not in silences

    def leave(self, upstreams: Collection[str], waiter: Waiter, now: float) -> None:
        """Wait no longer."""
        for upstream in upstreams:  # without the lock: the garbage collector comes here too, from wherever
            silence = self._silent.get(upstream)
            if silence is not None and waiter in silence.waiters:
                silence.left = max(silence.left, now)  # first: it is heard until then
                silence.waiters.discard(waiter)


def pause(number: int, hints: list[float | None], random: Callable[[], float]) -> float:
    """Seconds until the next round through the routes.

    Args:
        number: how many rounds have failed, from 1. Who has failed often comes later, so that single requests that
            make an upstream fail leave the probes of a circuit to others.
        hints: for each route what it told of when it may be tried again; None: nothing.
        random: from [0, 1); half of a pause is jitter.
    """
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(number - 1, 10))
    soonest = min([max(0.0, hint or 0.0) for hint in hints], default=0.0)
    return soonest + longest * (0.5 + 0.5 * random())
