"""What is asked of a store, and what it answers: accounts, reservations, settlements, and views of what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from dspy_prod.options import Budget, RateLimit
from dspy_prod.records import CallRecord


class Account(NamedTuple):
    """One budget account an admission draws on: a budget, a scope value and a window.

    Attributes:
        key: identity, e.g. `"day/tenant|acme|2026-11-23"`.
        limit: nano-USD.
        title: what to call it in an error, e.g. `"day/tenant=acme"`.
        ends_in: seconds that the window lasts at most (`inf` when it has no end); for housekeeping only. Its whole
            length, and not what is left of it by a wall clock that may be set back.
        budget: the title of the budget; the limit that its terms say wins over `limit`.
    """

    key: str
    limit: int
    title: str
    ends_in: float = math.inf
    budget: str = ""


class Size(NamedTuple):
    """How much is kept: answers, and the bytes they take."""

    answers: int
    bytes: int


class Terms(NamedTuple):
    """The settings of a budget, the same for all who share it.

    Attributes:
        built: those that an LM was built with last.
        in_force: those that hold: `built`, or what was said since while calls were made.
        revision: grows with every change.
    """

    built: Budget
    in_force: Budget
    revision: int


class AccountState(NamedTuple):
    """What an account holds, in nano-USD. `unconfirmed` is the part of `spent` that is an estimated upper bound."""

    spent: int = 0
    held: int = 0
    unconfirmed: int = 0


class Refusal(NamedTuple):
    """Why a reservation was refused: `reason` is `rate_limited`, `budget_exceeded` or `store_unavailable`.

    Attributes:
        retry_after: seconds after which it may work, or None.
        dimension: the binding limiter dimension (`requests`, `tokens`, `concurrency`, `paused`), or the title of the
            binding budget.
        limit, spent, held, amount: the budget arithmetic in nano-USD.
        detail: what went wrong in the store, without secrets.
    """

    reason: str
    retry_after: float | None = None
    dimension: str = ""
    limit: int = 0
    spent: int = 0
    held: int = 0
    amount: int = 0
    detail: str = ""


PENDING: Final = 0
GRANTED: Final = 1
REFUSED: Final = 2
WITHDRAWN: Final = 3


@dataclass(slots=True, eq=False)
class Reservation:
    """What one attempt needs before it may be sent, and what a store said to that; each is admitted once.

    `state` is the truth. `attach(wake)` registers a callback that runs (at least once, on any thread, outside every
    lock) when the reservation is decided; it must be idempotent.

    Attributes:
        id: unique; settling is idempotent by it.
        limit_key: identity of the limiter, or None when nothing limits this route.
        limit: the limiter's settings.
        tokens: tokens to reserve (an upper bound).
        accounts: budget accounts to draw on, possibly none.
        amount: nano-USD to reserve on each of them.
        priority: 0 high, 1 normal, 2 low.
        fair: fairness group (tenant or user) when `limit.fair_by` is set, else "".
        horizon: store time after which a grant is useless; an admission that provably cannot happen before it is
            refused at once.
        lease: seconds for which the hold is valid without renewal.
        stub: the record to write, fully charged and marked estimated, if the holder dies; or a function that makes
            it, called when a durable store writes the hold, else when the lease ends.
        state: `PENDING` until the store has decided.
        refusal: why it was refused, or None.
        blocked_on: what it waits for, as in `Refusal.dimension`; "" until the store has looked at it.
        granted_at: store time from which the call may go: of the grant, or a moment after it, which is to be awaited.
        spent: per account, nano-USD spent at the grant, without what is held.
        seq: its place among those that wait, given by the store.
        share: what it was granted from, where a durable store holds for several calls at once.
        debit: what it took of the limiter's part of that share.
    """

    id: str
    limit_key: str | None
    limit: RateLimit | None
    tokens: int
    accounts: Sequence[Account]
    amount: int
    priority: int
    fair: str
    horizon: float
    lease: float
    stub: CallRecord | Callable[[], CallRecord] | None
    state: int = PENDING
    refusal: Refusal | None = None
    blocked_on: str = ""
    granted_at: float = 0.0
    spent: tuple[int, ...] = ()
    seq: int = 0
    wake: Callable[[], None] | None = None
    share: object = None
    debit: tuple[int, int, float, float, int, int] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        """Register the callback; False when the reservation is decided already (the callback may then never run)."""
        self.wake = wake
        return self.state == PENDING


class Settlement(NamedTuple):
    """What really happened to a hold.

    Attributes:
        id: the reservation id.
        cost: nano-USD to charge; None when no price is known (then no account can be involved).
        tokens: tokens really used; None keeps the reserved number (unknown).
        sent: False when nothing reached the provider: the request itself is given back too.
        estimated: `cost` is the reserved bound, not told by the provider.
        record: the record to append, or None.
    """

    id: str
    cost: int | None
    tokens: int | None
    sent: bool
    estimated: bool
    record: CallRecord | None


class LimiterSnapshot(NamedTuple):
    """State of one limiter: what is left in the current minute. None where a dimension is not limited."""

    key: str
    requests_available: float | None
    requests_max: float | None
    tokens_available: float | None
    tokens_max: float | None
    in_flight: int
    concurrency_max: int | None
    waiting: int
    paused_for: float
    rate_factor: float

    def with_free(self, requests: int, tokens: int, seats: int) -> LimiterSnapshot:
        """The same, where so much more is free."""
        left, most = self.requests_available, self.requests_max
        size, largest = self.tokens_available, self.tokens_max
        return self._replace(
            requests_available=left if left is None or most is None else min(most, left + requests),
            tokens_available=size if size is None or largest is None else min(largest, size + tokens),
            in_flight=max(0, self.in_flight - seats),
        )


class CachedAnswer(NamedTuple):
    """A row of the response cache: `value` is JSON bytes; times are store time (`inf` = never)."""

    value: bytes
    expires_at: float
    stale_until: float


class Caller(Protocol):
    """Whoever asks upstream for others."""

    def gone(self) -> bool:
        """Whether he will never go on, nor tell anybody."""
