"""The workers of an evaluation on Ray: who does which example, and who does it again when a worker has died.

Each worker is an actor, because it keeps what is dear to make: imports, the program, connections. It does several
examples at once in threads. Ray restarts one that dies; what it had under way is given out again from here, so that it
can be counted, and is done with what was answered until then.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.processes import dead_pid, is_elsewhere
from dspy_prod.scaling.parcel import Parcel, unpacked
from dspy_prod.scaling.worker import Outcome, Worker

_log = logging.getLogger("dspy_prod")

RESTARTS: Final = 10
"""So often Ray starts a worker again that has died."""

SUSPECT: Final = 2
"""After so many deaths of the workers that had it, an example is done by a worker that does nothing else; and one that
dies then has died of it."""

START: Final = 180.0
"""Seconds in which a worker must be ready, when there is none."""

_LOOK: Final = 1.0
"""Seconds between two looks at whether to go on."""

_LINGER: Final = 10.0
"""Seconds for which an end waits for what is under way, before workers are ended with it."""

_CLOSE: Final = 60.0
"""Seconds that workers have to write what is to be written; tracking gives up sooner, after its `exit_timeout`."""


@dataclass(eq=False)
class _Seat:
    """One worker, also after Ray has started it again.

    Attributes:
        actor: Ray's. told: which process it is, when it is ready. busy: examples that it has. alone: it may have no
            other. life: counts its processes. gone: it starts no more.
    """

    actor: Any
    told: str | None = None
    busy: int = 0
    alone: bool = False
    life: int = 0
    gone: bool = False


class _Flight(NamedTuple):
    """What a worker was asked: an example by its index, or with None to be ready."""

    seat: _Seat
    life: int
    example: int | None


class Fleet:
    """Gives out examples to workers.

    Args:
        parcel: what every worker is given, see `Worker`. workers: how many processes. threads: examples that each does
            at once. options: of Ray's actors. buried: told the number of a process of this machine that has died.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(
        self, parcel: bytes, workers: int, threads: int, options: Mapping[str, Any], buried: Callable[[int], None]
    ) -> None:
        self._ray = connected()
        self._threads = threads
        self._buried = buried
        self._parcel = self._ray.put(parcel)  # once, however many workers there are, and kept for those to come
        told = {"max_restarts": RESTARTS, **options, "max_concurrency": threads + 1}  # one thread is there for `stop`
        kind = self._ray.remote(Worker).options(**told)
        self._seats = [_Seat(kind.remote()) for _ in range(workers)]
        self._flights: dict[Any, _Flight] = {}
        self._deaths: Counter[int] = Counter()
        self._waiting: deque[int] = deque()
        self._lacking_since: float | None = time.monotonic()

    def run(self, examples: Sequence[Any], heard: Callable[[int, Outcome], None], check: Callable[[], None]) -> None:
        """Have every example done once, in whatever order.

        Args:
            heard: told what came of each, by its index; what it raises ends the run. check: asked every other second;
                what it raises ends the run.

        Raises:
            ConfigError: a worker cannot be made. RuntimeError: no worker is left, or none begins.
        """
        self._waiting.extend(range(len(examples)))
        for seat in self._seats:
            self._open(seat)
        while self._waiting or any(each.example is not None for each in self._flights.values()):
            check()
            self._check_seats()
            self._send(examples)
            done, _ = self._ray.wait(list(self._flights), timeout=_LOOK)
            for ref in done:
                self._land(ref, self._flights.pop(ref), heard)

    def end(self, reason: str | None = None) -> None:
        """End the workers, once they have written what is to be written.

        Args:
            reason: why before everything was done; what is under way is waited for a moment.
        """
        self._waiting.clear()
        seats = [seat for seat in self._seats if not seat.gone]
        if reason is not None:
            with suppress(self._ray.exceptions.RayError):
                self._await([seat.actor.stop.remote(reason) for seat in seats if seat.told is not None])
            self._await([ref for ref, flight in self._flights.items() if flight.example is not None])
        self._close([seat for seat in seats if seat.told is not None])
        for seat in self._seats:
            with suppress(Exception):  # it has ended by itself
                self._ray.kill(seat.actor, no_restart=True)

    def _close(self, seats: Sequence[_Seat]) -> None:
        closing = [seat.actor.close.remote() for seat in seats]
        late = set(self._await(closing, _CLOSE))
        for ref in closing:
            try:
                why = f"not within {_CLOSE:g} s" if ref in late else None if self._ray.get(ref) else "a store was slow"
            except self._ray.exceptions.RayError as error:
                why = _first_line(error)
            if why is not None:
                _log.warning("A worker may not have written all of its records and traces: %s", why)

    def _await(self, refs: list[Any], seconds: float = _LINGER) -> list[Any]:
        """Wait for all; those that took longer."""
        return list(self._ray.wait(refs, num_returns=len(refs), timeout=seconds)[1]) if refs else []

    # -- giving out ----------------------------------------------------------------------------------------------------
    def _open(self, seat: _Seat) -> None:
        """Ask a worker to be ready; Ray asks once more while it starts again."""
        seat.told, seat.busy, seat.alone = None, 0, False
        seat.life += 1
        ref = seat.actor.ready.options(max_task_retries=-1).remote(self._parcel)
        self._flights[ref] = _Flight(seat, seat.life, None)

    def _send(self, examples: Sequence[Any]) -> None:
        while self._waiting:
            index = self._waiting[0]
            suspect = self._deaths[index] >= SUSPECT
            most = 1 if suspect else self._threads
            free = [seat for seat in self._seats if seat.told and not seat.alone and seat.busy < most]
            if not free:
                return
            seat = min(free, key=lambda each: each.busy)
            packed = Parcel({"example": examples[index]}).data
            ref = seat.actor.answer.remote(packed, self._deaths[index] > 0)
            self._waiting.popleft()
            self._flights[ref] = _Flight(seat, seat.life, index)
            seat.busy += 1
            seat.alone = suspect

    def _land(self, ref: Any, flight: _Flight, heard: Callable[[int, Outcome], None]) -> None:
        seat, life, index = flight
        errors = self._ray.exceptions
        try:
            told = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            self._died(flight, error, heard)
            return
        if index is None:
            seat.told = told
            return
        if told is None:  # it has died unheard, when it had nothing to do
            self._waiting.appendleft(index)
            if seat.life == life:
                self._bury(seat)
                self._open(seat)
            return
        if seat.life == life:
            seat.busy, seat.alone = seat.busy - 1, False
        heard(index, unpacked(told)["outcome"])

    # -- dying ---------------------------------------------------------------------------------------------------------
    def _died(self, flight: _Flight, error: Exception, heard: Callable[[int, Outcome], None]) -> None:
        seat, life, index = flight
        alone = seat.alone
        if isinstance(error, self._ray.exceptions.ActorDiedError):
            seat.gone = True  # it was started again often enough
        if seat.life == life:
            self._bury(seat)
            if seat.gone:
                seat.told = None
                seat.life += 1
                _log.warning("A worker of the evaluation is gone: %s", _first_line(error))
            else:
                self._open(seat)
        if index is None:
            return
        self._deaths[index] += 1
        if alone and self._deaths[index] > SUSPECT:
            heard(index, Outcome(error=RuntimeError(f"{self._deaths[index]} workers died of it: {_first_line(error)}")))
        else:
            self._waiting.appendleft(index)

    def _bury(self, seat: _Seat) -> None:
        """What a dead worker held is charged now: nobody has to wait for it."""
        told, seat.told = seat.told, None
        if told is None:
            return
        _log.warning("A worker of the evaluation has died; %d examples are done again", seat.busy)
        until = time.monotonic() + _LOOK
        while (pid := dead_pid(told)) is None and not is_elsewhere(told) and time.monotonic() < until:
            time.sleep(0.01)  # it is seldom heard of before it is gone, and then by moments
        if pid is not None:
            self._buried(pid)

    def _check_seats(self) -> None:
        """Go on, while somebody works or may begin to."""
        if any(seat.told for seat in self._seats):
            self._lacking_since = None
            return
        now = time.monotonic()
        self._lacking_since = self._lacking_since or now
        if all(seat.gone for seat in self._seats):
            raise RuntimeError("evaluate: every worker has died too often; Ray's logs say of what")
        if now - self._lacking_since > START:
            raise RuntimeError(
                f"evaluate: no worker was ready within {START:.0f} s: Ray has {self._ray.available_resources()} left. "
                "Lower workers=, or what ray_options= asks for"
            )


def connected() -> Any:
    """Ray, connected: to what the program has, to `$RAY_ADDRESS`, or else to a cluster of this machine, begun now.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError("evaluate(engine='ray') needs Ray: pip install 'dspy-prod[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody has asked that anything be told to anybody
    ray = import_module("ray")
    if not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(**local)
    return ray


def _first_line(error: Exception) -> str:
    return outward(str(error)).strip().partition("\n")[0]
