"""What a rate limiter counts: requests and tokens of the last minute, and what is in flight.

Pure data structures: no clock, no lock, bounded memory. Times are seconds on whatever clock the caller uses, and the
caller never lets them go backwards. Terms and bounds: docs/guide/limiter.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, inf
from typing import Final

MINUTE: Final = 60.0
SLOT: Final = 0.5
"""Length of a slot in seconds. Whole seconds would cost another 0.8 % of the limit: a slot is only forgotten whole."""
AHEAD: Final = 0.25
"""Seconds by which what is drawn is dated ahead, see `LimiterState.draw`."""
LEAD: Final = 0.5
"""Seconds by which a call may at most be granted ahead, see `LimiterState.lead`."""
LEAD_ALONE: Final = 0.1
"""The same where no other process waits: a grant takes only this one's commit."""
NEVER: Final = -1
"""The end of a lease that has none."""
_RECENT: Final = 5.0


class Window:
    """Requests and tokens per slot, with running sums, over the last minute plus a guard.

    A slot is forgotten only when all of it is older than 60 s + guard, so a sum that stays within a limit keeps every
    60 s window at the provider within it, with arrival jitter up to the guard. O(1) per call, amortised.

    Attributes:
        requests: requests in the window.
        tokens: tokens in the window, reserved or settled.
        held: the part of `tokens` that is reserved and not settled.
        edge: the newest slot that is forgotten.
        drop_at: the time at which the next slot is to be forgotten.
    """

    __slots__ = ("_held", "_reach", "_requests", "_size", "_tokens", "drop_at", "edge", "held", "requests", "tokens")

    def __init__(self, guard: float, now: float) -> None:
        self._reach = SLOT + MINUTE + guard  # from the start of a slot to when it is forgotten
        self._size = ceil((self._reach + max(AHEAD, LEAD)) / SLOT) + 1
        self._clear(now)

    def _clear(self, now: float) -> None:
        self._requests = [0] * self._size
        self._tokens = [0] * self._size
        self._held = [0] * self._size
        self.requests = self.tokens = self.held = 0
        self._seek(floor((now - self._reach) / SLOT))

    def _seek(self, edge: int) -> None:
        self.edge = edge
        self.drop_at = (edge + 1) * SLOT + self._reach

    def advance(self, now: float) -> None:
        """Forget the slots that are wholly older than the window. Call when `now >= drop_at`."""
        if now - self.drop_at > MINUTE + self._reach:
            self._clear(now)
        while now >= self.drop_at:
            at = (self.edge + 1) % self._size
            self.requests -= self._requests[at]
            self.tokens -= self._tokens[at]
            self.held -= self._held[at]
            self._requests[at] = self._tokens[at] = self._held[at] = 0
            self._seek(self.edge + 1)

    def add(self, at: float, tokens: int, requests: int = 1) -> int:
        """Count requests and their reserved tokens as sent at `at`; returns the slot, which `settle` wants back."""
        slot = floor(at / SLOT)
        place = slot % self._size
        self._requests[place] += requests
        self._tokens[place] += tokens
        self._held[place] += tokens
        self.requests += requests
        self.tokens += tokens
        self.held += tokens
        return slot

    def move(self, slot: int, now: float, tokens: int) -> int:
        """Date a request and its reservation from now, if that is after `slot`; returns the new slot."""
        if slot >= floor(now / SLOT):
            return slot
        self.settle(slot, -1, tokens, 0)
        return self.add(now, tokens)

    def settle(self, slot: int, requests: int, reserved: int, tokens: int) -> None:
        """Replace a reservation by what happened, in its own slot; nothing if that slot is forgotten.

        Args:
            requests: 0, or how many to give back, negative.
            reserved: the tokens that were reserved.
            tokens: the tokens that count instead.
        """
        if slot <= self.edge:
            return
        at = slot % self._size
        change = tokens - reserved
        self._held[at] -= reserved
        self.held -= reserved
        self._tokens[at] += change
        self.tokens += change
        if requests:
            self._requests[at] += requests
            self.requests += requests

    def requests_freed_at(self, need: float) -> float:
        """When `need` of the requests counted now will have been forgotten."""
        return self._freed_at(need, self._requests)

    def tokens_freed_at(self, need: float) -> float:
        """When `need` of the tokens counted now will have been forgotten."""
        return self._freed_at(need, self._tokens)

    def settled_freed_at(self, need: float) -> float:
        """When `need` of the tokens settled by now will have been forgotten."""
        return self._freed_at(need, [tokens - held for tokens, held in zip(self._tokens, self._held, strict=True)])

    def _freed_at(self, need: float, values: list[int]) -> float:
        size, slot = self._size, self.edge
        for slot in range(self.edge + 1, self.edge + 1 + size):
            need -= values[slot % size]
            if need <= 0:
                break
        return slot * SLOT + self._reach

    def rate(self, now: float) -> float:
        """Requests per second over the last seconds, counted from the first request among them."""
        last = floor(now / SLOT)
        counts = [(slot, self._requests[slot % self._size]) for slot in range(last + 1 - int(_RECENT / SLOT), last + 1)]
        first = next((slot for slot, count in counts if count), last)
        return sum(count for _, count in counts) / max(1.0, now - first * SLOT)

    def dump(self) -> tuple[int, list[int], list[int], list[int]]:
        """Everything, as JSON values."""
        return self.edge, self._requests, self._tokens, self._held

    def restore(self, edge: int, requests: list[int], tokens: list[int], held: list[int]) -> None:
        """Take over what another window dumped, perhaps with another guard, in so far as it is remembered here."""
        size = len(requests)
        if size == self._size:
            self._requests, self._tokens, self._held = requests, tokens, held
            self._seek(edge)
        else:
            for slot in range(max(edge, self.edge) + 1, edge + 1 + size):
                at, there = slot % self._size, slot % size
                self._requests[at], self._tokens[at], self._held[at] = requests[there], tokens[there], held[there]
        self.requests, self.tokens, self.held = sum(self._requests), sum(self._tokens), sum(self._held)


class Seats:
    """How many are in flight, by the second in which their leases end: as large as leases are long, whoever many fly.

    A lease ends up to a second late. Whoever gives a seat back names the end of its lease, which `take` told.

    Attributes:
        taken: the number in flight.
        next_at: no lease runs out before this time.
    """

    __slots__ = ("_ends", "next_at", "taken")

    def __init__(self) -> None:
        self.taken = 0
        self.next_at = inf
        self._ends: dict[int, int] = {}  # second → seats; `NEVER` for those that only `free` gives back

    def take(self, until: float, seats: int = 1) -> int:
        """Seats are taken until they are given back, or until `until`; returns the end of their lease."""
        end = NEVER if until == inf else ceil(until)
        self._ends[end] = self._ends.get(end, 0) + seats
        self.taken += seats
        if end != NEVER and end < self.next_at:
            self.next_at = end
        return end

    def free(self, end: int, seats: int = 1) -> bool:
        """Seats whose lease ends then are given back; False when it has ended."""
        there = self._ends.get(end, 0)
        gone = min(there, seats)
        if gone == there:
            self._ends.pop(end, None)
        else:
            self._ends[end] = there - gone
        self.taken -= gone
        return gone > 0

    def taken_until(self, end: int) -> bool:
        """Whether any lease ends then."""
        return end in self._ends

    def expire(self, now: float) -> None:
        """Give back the seats whose leases have run out, and make `next_at` exact."""
        for end in [end for end in self._ends if end != NEVER and end <= now]:
            self.taken -= self._ends.pop(end)
        self.next_at = min((end for end in self._ends if end != NEVER), default=inf)

    def dump(self) -> list[tuple[int, int]]:
        """What is in flight, as JSON values."""
        return list(self._ends.copy().items())

    def restore(self, rows: Iterable[tuple[int, int]]) -> None:
        """Take over what another dumped."""
        self._ends = dict(rows)
        self.taken = sum(self._ends.values())
        self.next_at = min((end for end in self._ends if end != NEVER), default=inf)
