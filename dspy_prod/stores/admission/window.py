"""What a rate limiter counts: requests and tokens of the last minute, and what is in flight.

Pure data structures: no clock, no lock, bounded memory. Times are seconds on whatever clock the caller uses, and the
caller never lets them go backwards. Terms and bounds: SEMANTICS, "Rate limiter".
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import ceil, floor, inf
from typing import Final

MINUTE: Final = 60.0
SLOT: Final = 0.5
"""Length of a slot in seconds. Whole seconds would cost another 0.8 % of the limit: a slot is only forgotten whole."""
_RECENT: Final = 5.0
_SLACK: Final = 64


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
        self._size = ceil(self._reach / SLOT) + 1
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

    def add(self, now: float, tokens: int) -> int:
        """Count a request and its reserved tokens; returns the slot, which `settle` wants back."""
        slot = floor(now / SLOT)
        at = slot % self._size
        self._requests[at] += 1
        self._tokens[at] += tokens
        self._held[at] += tokens
        self.requests += 1
        self.tokens += tokens
        self.held += tokens
        return slot

    def move(self, slot: int, now: float, tokens: int) -> int:
        """Date a request and its reservation from now instead of from `slot`; returns the new slot."""
        if slot == floor(now / SLOT):
            return slot
        self.settle(slot, -1, tokens, 0)
        return self.add(now, tokens)

    def settle(self, slot: int, requests: int, reserved: int, tokens: int) -> None:
        """Replace a reservation by what happened, in its own slot; nothing if that slot is forgotten.

        Args:
            requests: 0, or -1 to give the request back.
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


class Leases:
    """What is in flight: ids with the time until which each counts. O(log n) per call, no scans.

    Attributes:
        live: id → expiry; `len(live)` is the number in flight.
        next_at: no lease runs out before this time.
    """

    __slots__ = ("_heap", "live", "next_at")

    def __init__(self) -> None:
        self.live: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []  # may hold leases that have ended or were renewed
        self.next_at = inf

    def add(self, id: int, until: float) -> None:
        """Begin or renew a lease."""
        self.live[id] = until
        if until == inf:
            return
        heap = self._heap
        heappush(heap, (until, id))
        if until < self.next_at:
            self.next_at = until
        if len(heap) > _SLACK + 2 * len(self.live):
            self._heap = heap = [(until, id) for id, until in self.live.items() if until != inf]
            heapify(heap)
            self.next_at = heap[0][0]

    def expire(self, now: float) -> None:
        """Drop the leases that have run out, and make `next_at` exact."""
        heap, live = self._heap, self.live
        while heap:
            until, id = heap[0]
            if live.get(id) == until:
                if until > now:
                    break
                del live[id]
            heappop(heap)
        self.next_at = heap[0][0] if heap else inf

    def dump(self) -> list[list[float | None]]:
        """What is in flight, as JSON values; None never runs out."""
        return [[id, None if until == inf else until] for id, until in self.live.items()]

    def restore(self, rows: Iterable[tuple[int, float | None]]) -> None:
        """Take over what another dumped."""
        for id, until in rows:
            self.add(id, inf if until is None else until)
