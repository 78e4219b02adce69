"""How calls go through one rate limiter: when the next one may, what it takes, what it gives back.

The lower half of `limiter.py`. The parts: `window` (what was sent in a minute, what is in flight), `pacing` (how
fast), `feedback` (what the provider says).
"""

from __future__ import annotations

from math import floor, inf
from typing import Final

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.feedback import Feedback
from dspy_prod.stores.admission.pacing import Pacing
from dspy_prod.stores.admission.turns import Turns
from dspy_prod.stores.admission.window import MINUTE, Seats, Window

Debit = tuple[int, int, float, float, int, int]
"""What a call took: slot, reserved tokens, nominal send time, seconds of token pacing, its number, and the end of its
seat's lease. JSON-serialisable."""

DRAWN: Final = 0
"""In place of the end of a seat's lease: the seat is that of several calls, see `LimiterState.draw`."""
_USED: Final = 0.8  # share of a minute's limit from which a lowered rate counts as used


class Turnstile:
    """One call at a time: see `LimiterState`."""

    __slots__ = (
        "_feedback",
        "_now",
        "_pacing",
        "_requests_max",
        "_seats",
        "_seats_max",
        "_seq",
        "_tokens_max",
        "_window",
        "blocked_on",
        "limit",
        "turns",
    )

    def __init__(self, limit: RateLimit, now: float) -> None:
        self._now = now
        self._seq = int(now * 1e6)  # never the id of a call that outlived a limiter forgotten before
        self._window = Window(limit.guard, now)
        self._seats = Seats()
        self._feedback = Feedback(now)
        self._pacing = Pacing()
        self.blocked_on = ""
        self.limit = limit
        self.turns = Turns()
        self._tune()

    # -- settings ----------------------------------------------------------------------------------------------------
    def reconfigure(self, limit: RateLimit, now: float) -> None:
        """Use other settings from now on and keep what was counted."""
        now = self._touch(now)
        if limit.guard != self.limit.guard:
            old, self._window = self._window, Window(limit.guard, now)
            self._window.restore(*old.dump())
        if not limit.adaptive or (self._feedback.measured is not None and (limit.rpm or limit.tpm)):
            self._feedback.restore_rate()
        self.limit = limit
        self._tune()

    def _tune(self) -> None:
        """Derive the effective limits from the settings and the rate factor."""
        limit, factor = self.limit, self._feedback.factor
        self._seats_max = inf if limit.concurrency is None else limit.concurrency
        self._requests_max = inf if limit.rpm is None else max(1, floor(limit.rpm * factor + 1e-6))
        self._tokens_max = inf if limit.tpm is None else limit.tpm * factor
        self._pacing.tune(limit, factor, self._feedback.measured, self._now)

    # -- admission ---------------------------------------------------------------------------------------------------
    def _touch(self, now: float) -> float:
        if now > self._now:
            self._now = now
        else:
            now = self._now
        if now >= self._window.drop_at:
            self._window.advance(now)
        if now >= self._seats.next_at:
            self._seats.expire(now)
        return now

    def ready_at(self, now: float, tokens: int) -> float:
        """The earliest time a call of `tokens` could go if nothing else changes; not after `now` means now.

        Leases that run out count as a change that time brings. `inf`: only a release can help, or, for more tokens
        than a minute may hold, nothing can.
        """
        now = self._touch(now)
        window = self._window
        at, on = now, ""
        then = self._pacing.ready_at(tokens)
        if then > at:
            at, on = then, "pacing"
        if window.requests >= self._requests_max:
            then = window.requests_freed_at(window.requests + 1 - self._requests_max)
            if then > at:
                at, on = then, "requests"
        if window.tokens + tokens > self._tokens_max:
            # A call above the lowered limit but within the configured one goes alone, else it would never go.
            over = window.tokens + tokens - max(self._tokens_max, min(tokens, self.limit.tpm or inf))
            if over > 0:
                then = inf if over > window.tokens else window.tokens_freed_at(over)
                if then > at:
                    at, on = then, "tokens"
        feedback = self._feedback
        if at > now and feedback.slowed:
            feedback.delay(now)
        if feedback.paused > at:
            at, on = feedback.paused, "paused"
        if feedback.told:
            then, dimension = feedback.left_at(now, tokens)
            if then > at:
                at, on = then, dimension
        if self._seats.taken >= self._seats_max:
            self._seats.expire(now)
            if self._seats.next_at > at:
                at, on = self._seats.next_at, "concurrency"
        self.blocked_on = on
        return at

    def earliest(self, now: float, tokens: int, ahead: int) -> float:
        """A sound lower bound of when a call behind others could go: before it, it provably cannot.

        Assumes that everything in flight was sent and ends at once with its tokens refunded in full, that a lowered
        rate returns at once, and that the calls ahead go; their tokens may be refunded too and so do not count.

        Args:
            ahead: how many calls go before it.
        """
        now = self._touch(now)
        limit, window, feedback = self.limit, self._window, self._feedback
        at = start = max(now, feedback.paused)
        if limit.rpm is not None:
            most = max(1, floor(limit.rpm + 1e-6))
            minutes, place = divmod(ahead, most)
            need = window.requests + place + 1 - most
            if need > 0:
                at = max(at, window.requests_freed_at(need))
            at += minutes * (MINUTE + limit.guard)
            at = max(at, self._pacing.earliest(start, ahead))
        if limit.tpm is not None:
            if tokens > limit.tpm:
                return inf
            over = window.tokens - window.held + tokens - limit.tpm
            if over > 0:
                at = max(at, window.settled_freed_at(over))
        if feedback.told and not self._seats.taken:  # with calls in flight, their headers may bring better news
            at = max(at, feedback.left_at(now, tokens)[0])
        return at

    def take(self, now: float, tokens: int, lease: float = inf, at: float = -inf) -> Debit:
        """Count a call as sent now, whether `ready_at` allowed it or not.

        Args:
            tokens: tokens to reserve.
            lease: seconds for which the call counts as in flight unless it is given back or renewed.
            at: when it will be sent, at most `LEAD` seconds after now.
        """
        if now != self._now:  # else `ready_at` has just looked
            now = self._touch(now)
        at = max(at, now)
        self._seq = seq = self._seq + 1
        slot = self._window.add(at, tokens)
        end = self._seats.take(now + lease)
        nominal, charge = self._pacing.push(at, tokens)
        feedback = self._feedback
        if feedback.told:
            feedback.spend(tokens)
        if feedback.slowed:
            counted = self._window
            used = counted.requests >= _USED * self._requests_max or counted.tokens >= _USED * self._tokens_max
            feedback.recover(now, used)
            self._tune()
        return slot, tokens, nominal, charge, seq, end

    def sent_late(self, debit: Debit, now: float) -> Debit:
        """Date a call from `now`: that long after `take` it left. Returns its debit from here on."""
        now = self._touch(now)
        slot, tokens, nominal, charge, seq, end = debit
        if end != DRAWN and not self._seats.taken_until(end):
            return debit
        return self._window.move(slot, now, tokens), tokens, self._pacing.move(nominal, now), charge, seq, end

    def give_back(self, debit: Debit, *, now: float, used: int | None, sent: bool) -> None:
        """Settle a debit: free its concurrency and correct its tokens in the slot it was taken from.

        Args:
            used: tokens really used, possibly more than reserved; None keeps the reservation counted.
            sent: False when nothing reached the provider: request, tokens and pacing are given back.
        """
        now = self._touch(now)
        slot, reserved, nominal, charge, seq, end = debit
        self._seats.free(end)
        feedback = self._feedback
        if not sent:
            used = 0
        elif used:
            feedback.succeeded()
        self._pacing.give_back(now, nominal, charge, reserved, used, sent)
        if used is None:
            used = reserved
        self._window.settle(slot, 0 if sent else -1, reserved, used)
        if feedback.told:
            feedback.refund(seq, 0 if sent else 1, reserved - used)
