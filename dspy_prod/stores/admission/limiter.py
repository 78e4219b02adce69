"""The state of one rate limiter: what may be sent now, and when the next call may.

Pure and single-threaded: no clock, lock, I/O or sleep. A store keeps one `LimiterState` per provider key and model,
calls it under its own lock and passes its own time. Rules: docs/guide/limiter.md. How a call goes through it is
in `turnstile.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, inf
from typing import Any, Final

import orjson

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.turnstile import DRAWN, Debit, Turnstile
from dspy_prod.stores.admission.window import AHEAD, LEAD, LEAD_ALONE
from dspy_prod.stores.base import LimiterSnapshot

FUTURE: Final = 60.0
"""Seconds from which on a state counts as one from the future: it would keep everybody waiting until then."""
_VERSION: Final = 4

__all__ = ["DRAWN", "Debit", "LimiterState"]


class LimiterState(Turnstile):
    """What one limiter key has sent, holds and was told by its provider.

    Every method takes `now` in seconds; a `now` before the latest one seen counts as the latest. The order of use is
    `ready_at`, then `take` when that is not after now, then `give_back`, exactly once per debit. `blocked_on` is the
    dimension that is ready last after `ready_at` said later: `requests`, `tokens`, `concurrency`, `paused`, `pacing`.
    """

    __slots__ = ()

    # -- several calls at once -----------------------------------------------------------------------------------------
    def drawable(self, now: float, tokens: int, most: int) -> int:
        """How many calls of `tokens` each, at most `most`, may be taken at once for calls that will come.

        A hundredth of what the minute has left, a quarter of what may go at once, an eighth of the free seats: who
        draws keeps little from others. None where the provider has said something.
        """
        now = self._touch(now)
        window = self._window
        if self.held_back(now):
            return 0
        room = min(most, self._pacing.room(now, tokens), (self._requests_max - window.requests) / 100)
        if tokens and self._tokens_max != inf:
            room = min(room, (self._tokens_max - window.tokens) / 100 / tokens)
        return max(0, floor(room))

    def held_back(self, now: float) -> bool:
        """Whether the provider's last word counts: a pause, a lowered rate, what its headers left."""
        feedback = self._feedback
        return feedback.slowed or bool(feedback.told) or feedback.paused > now

    def free_seats(self, now: float) -> float:
        """How many more calls may be in flight."""
        self._touch(now)
        return self._seats_max - self._seats.taken

    def draw(self, now: float, requests: int, tokens: int) -> Debit:
        """Take for calls that will come within `AHEAD` seconds, each dated from the end of that time.

        So they are counted for at least as long as those that are taken one by one, whenever they leave.

        Returns:
            The debit of a call of one token, without a seat.
        """
        now = self._touch(now)
        at = now + AHEAD
        self._seq += requests
        slot = self._window.add(at, tokens, requests)
        nominal, charge = self._pacing.draw(at, requests, tokens)
        return slot, 1, nominal, charge, self._seq, DRAWN

    def undraw(self, one: Debit, now: float, requests: int, tokens: int) -> None:
        """Give back what was drawn and not used."""
        now = self._touch(now)
        slot, _, nominal, charge, _, _ = one
        self._window.settle(slot, -requests, tokens, 0)
        for _ in range(requests):
            self._pacing.give_back(now, nominal, 0.0, 0, None, False)
        self._pacing.give_back(now, nominal, charge * tokens, 0, 0, True)

    def take_seats(self, now: float, lease: float, seats: int) -> int:
        """Take seats for calls that will come; returns the end of their lease, which `leave_seats` wants."""
        return self._seats.take(self._touch(now) + lease, seats)

    def leave_seats(self, end: int, seats: int) -> None:
        """Give seats back."""
        self._seats.free(end, seats)

    def lead(self, process: str, now: float) -> float:
        """Seconds before its moment at which a call may be granted to go then, after `ready_at` said when that is.

        Between processes a grant takes a while: its commit, the commits of others, threads that are run late. From a
        slice of a minute's limit that time would be lost, so it is spent before the moment comes. Whoever is next has
        longer than the others, so that not all of them try at once.
        """
        if not self.timed or self.held_back(now) or self.free_seats(now) < 1:
            return 0.0
        if self.turns.only_of(process):
            return LEAD_ALONE
        return LEAD if self.turns.is_next(process) else LEAD / 2

    def has_room_for(self, calls: int, tokens: int, now: float) -> bool:
        """Whether so many calls that reserve `tokens` each could all go now."""
        now = self._touch(now)
        if self._feedback.paused > now or self.free_seats(now) < calls or self._pacing.room(now, tokens) < calls:
            return False
        requests_left, tokens_left = self._left(now)
        return requests_left >= calls and tokens_left >= calls * tokens

    @property
    def timed(self) -> bool:
        """Whether `ready_at` said a moment that hardly comes sooner: tokens are given back whenever a call ends."""
        return self.blocked_on == "requests" or (self.blocked_on == "pacing" and not self._pacing.by_tokens)

    # -- what the provider says --------------------------------------------------------------------------------------
    def throttled(self, now: float, retry_after: float | None) -> None:
        """The provider answered 429: pause, and lower the rate once per round of throttles (AIMD).

        Args:
            retry_after: seconds to pause; None: 1 s, doubling with every round that follows without a success.
        """
        now = self._touch(now)
        limit, feedback = self.limit, self._feedback
        if feedback.throttled(now, retry_after) and limit.adaptive:
            measured = self._window.rate(now) if limit.rpm is None and limit.tpm is None else None
            if measured == 0:
                return  # calls without any limit were not counted so far: pause, and measure from here on
            feedback.lower(now, limit.floor, measured)
            self._tune()

    def resync(self, now: float, remaining: Mapping[str, tuple[float, float]]) -> None:
        """Believe the provider's headers until their reset where they leave less than we believe.

        Args:
            remaining: `{"requests" | "tokens": (remaining, seconds until reset)}`; the latest headers count.
        """
        now = self._touch(now)
        limit, window = self.limit, self._window
        own = {"requests": (limit.rpm or inf) - window.requests, "tokens": (limit.tpm or inf) - window.tokens}
        for dimension, (left, reset) in remaining.items():
            if dimension in own:
                self._feedback.resync(now, dimension, left, reset, own[dimension], self._seq)

    def lift(self, now: float) -> bool:
        """An operator knows better than the provider's last word; whether anything held calls back."""
        return self._feedback.lift(self._touch(now))

    # -- reading and keeping -----------------------------------------------------------------------------------------
    def snapshot(self, now: float, key: str, waiting: int) -> LimiterSnapshot:
        """What is left in the current minute."""
        now = self._touch(now)
        limit, feedback = self.limit, self._feedback
        requests, tokens = self._left(now)
        return LimiterSnapshot(
            key,
            *(None if limit.rpm is None else max(0.0, requests), limit.rpm),
            *(None if limit.tpm is None else max(0.0, tokens), limit.tpm),
            *(self._seats.taken, limit.concurrency),
            waiting,
            paused_for=max(0.0, feedback.paused - now),
            rate_factor=min(1.0, feedback.factor),
        )

    def _left(self, now: float) -> tuple[float, float]:
        """Requests and tokens that are left of this minute, by our own count and by the provider's headers."""
        told = {dimension: left for dimension, (left, until, _) in self._feedback.told.items() if until > now}
        requests = self._requests_max - self._window.requests
        tokens = self._tokens_max - self._window.tokens
        return min(requests, told.get("requests", inf)), min(tokens, told.get("tokens", inf))

    def idle(self, now: float) -> bool:
        """Nothing is in flight, counted, paused or slowed down: the state may be forgotten."""
        now = self._touch(now)
        return (
            not (self._seats.taken or self._window.requests or self._window.tokens)
            and self._feedback.idle(now)
            and self._pacing.idle(now)
        )

    def dump(self) -> bytes:
        """Everything as JSON, for a row that processes share."""
        parts = [self._window.dump(), self._seats.dump(), self._feedback.dump(), self._pacing.dump()]
        parts.append(self.turns.dump())
        return orjson.dumps([_VERSION, self._now, self._seq, *parts])

    @classmethod
    def load(cls, data: bytes, limit: RateLimit, now: float = inf) -> LimiterState:
        """The state that was dumped, under `limit`.

        Raises:
            ValueError: the data is not a dump of this version, or comes from more than `FUTURE` seconds after `now`.
        """
        row: Any = orjson.loads(data)
        if not isinstance(row, list) or not row or row[0] != _VERSION:
            raise ValueError("not a limiter state of this version")
        if row[1] > now + FUTURE:
            raise ValueError("a limiter state from the future")
        state = cls(limit, row[1])
        _, _, state._seq, slots, seats, feedback, pacing, turns = row
        state._window.restore(*slots)
        state._seats.restore(seats)
        state._feedback.restore(*feedback)
        state._tune()
        state._pacing.restore(*pacing)
        state.turns.restore(turns)
        return state
