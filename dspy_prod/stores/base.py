"""The store protocol: atomic state transitions behind the policies.

Policies hold the rules, stores hold the state. An admission is ONE atomic step over every limiter dimension and every
budget account (one round trip to a shared store); settling is posted and never waits, blocks or raises. The same
contract suite (`tests/stores/`) runs against every implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from dspy_prod.options import Budget, RateLimit
from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.board import Board
from dspy_prod.stores.programs import ProgramCalls
from dspy_prod.stores.runs import Runs
from dspy_prod.stores.vocabulary import (
    GRANTED,
    PENDING,
    REFUSED,
    WITHDRAWN,
    Account,
    AccountState,
    CachedAnswer,
    Caller,
    LimiterSnapshot,
    Refusal,
    Reservation,
    Settlement,
    Size,
    Terms,
)

if TYPE_CHECKING:
    from dspy_prod.stores.trials import Trials  # importing the package stays light

__all__ = [
    "GRANTED",
    "PENDING",
    "REFUSED",
    "WITHDRAWN",
    "Account",
    "AccountState",
    "Admission",
    "Answers",
    "Board",
    "CachedAnswer",
    "Caller",
    "Flights",
    "Ledger",
    "LimiterSnapshot",
    "ProgramCalls",
    "Refusal",
    "Reservation",
    "Runs",
    "Settlement",
    "Size",
    "Store",
    "Terms",
]


class Admission(Protocol):
    """Limits and money: what may be sent, and what became of it."""

    def admit(self, reservation: Reservation) -> Reservation:
        """Reserve limiter capacity and money together or not at all, or queue, or refuse. Returns at once, with the
        reservation itself."""
        ...

    def admit_alone(self, reservation: Reservation) -> Reservation:
        """`admit` by this process alone, because the store cannot decide: within its part of the limit, and of what it
        last knew to be left of budgets. Charged and counted when the store is back."""
        ...

    def withdraw(self, reservation: Reservation) -> bool:
        """Stop waiting. True: nothing is held. False: it was granted meanwhile and the caller must settle."""
        ...

    def sent_late(self, reservation: Reservation, at: float) -> None:
        """A granted call left only at store time `at`: its limiter counts it from then on. Posted."""
        ...

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        """Replace the hold by what happened and append the record. Posted: never waits, blocks or raises."""
        ...

    def throttled(self, limit_key: str, limit: RateLimit, retry_after: float | None) -> None:
        """The provider answered 429: pause the key and lower its rate. Posted."""
        ...

    def throttled_since(self, limit_key: str | None, at: float) -> bool:
        """Whether a call of this process was answered 429 since store time `at`; for who was granted ahead to ask."""
        ...

    def resync(self, limit_key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        """The provider told `{"requests"|"tokens": (remaining, seconds_until_reset)}`. Posted."""
        ...

    def lift(self, limit_key: str) -> bool:
        """End a pause, and forget what the provider told is left, for all who share the limiter; whether it had any.

        Raises:
            StoreUnavailableError: it cannot be kept.
        """
        ...

    def preview(self, reservation: Reservation) -> tuple[float, Refusal | None]:
        """(seconds until this reservation could be granted, refusal or None), changing nothing."""
        ...

    def declare(self, budget: Budget, anew: bool = True) -> None:
        """An LM is built with this budget; its settings hold for all who share it if they are new, or if nobody has
        said any yet and `anew` is False. Admissions that come after are held to them. Posted."""
        ...

    def steer(self, budget: Budget) -> None:
        """These settings hold for all who share the budget from now on; what is spent stays, who waits is served.

        Raises:
            StoreUnavailableError: they cannot be kept.
        """
        ...

    def terms(self) -> list[Terms]:
        """The terms of every budget that was declared here."""
        ...

    def known_terms(self, title: str) -> Terms | None:
        """The terms of one budget, as this process heard of them last; no I/O."""
        ...

    def on_terms(self, listener: Callable[[Terms], None]) -> None:
        """Tell `listener` of terms that changed, wherever that was; it takes the place of the one before."""
        ...

    def account(self, key: str) -> AccountState: ...

    def accounts(self, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
        """(key, state) of accounts whose keys begin and end so: those that spent most, at most `most` of them.

        However many there are, it is quick for those of a budget in a window: `"daily|"` and `"|2025-11-23"`.
        """
        ...

    def limiter(self, key: str) -> LimiterSnapshot | None: ...

    def holds(self) -> int:
        """Reservations not yet settled."""
        ...

    def waiting(self) -> int:
        """Reservations of this process still waiting."""
        ...


class Kind(Protocol):
    """Cached answers whose records are alike but for what each would have cost."""

    @property
    def like(self) -> CallRecord: ...

    def served(self, at: float, saved: int | None = None) -> bool:
        """Note that one was given, in seconds since the epoch; False where nothing is noted any more: the store is
        closed, or another process's. Posted.

        Args:
            saved: what it would have cost, in nano-USD.
        """
        ...


class Ledger(Protocol):
    """Records of what was sent, and sums of them."""

    def append(self, record: CallRecord) -> None:
        """Append a record that held nothing (a cached answer, a call without limits). Posted."""
        ...

    def kind(self, like: CallRecord) -> Kind:
        """Where to note cached answers whose records differ from `like` in ids, time and `saved_nano` alone."""
        ...

    def records(
        self,
        *,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        **equals: str,
    ) -> list[CallRecord]:
        """Records, newest first; `equals` compares fields such as user, tenant, model, call_id, id."""
        ...

    def unconfirmed(self, since: float | None = None) -> list[CallRecord]:
        """Records whose cost is an upper bound, above 0, because nobody told it; newest first."""
        ...

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        """(day `YYYY-MM-DD` UTC, value, sums) per day and value of a rollup dimension, or of one value of it; oldest
        day first."""
        ...

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        """(value, sums since a day) of a rollup dimension, the dearest first, at most `most` of them."""
        ...

    def unwritten(self) -> int:
        """About how many records were posted and are in no read and no sum yet; of use once `flush` has failed."""
        ...

    def correct(self, record_id: str, cost: int) -> bool:
        """Set an estimated record's true cost in nano-USD and mend its accounts and rollups; False if unknown."""
        ...


class Answers(Protocol):
    """The response cache that outlives a process."""

    def cache_get(self, key: bytes) -> CachedAnswer | None: ...

    def cache_put(self, key: bytes, answer: CachedAnswer, *, max_entries: int, max_bytes: int) -> None:
        """Posted."""
        ...

    def cache_clear(self) -> None: ...

    def cache_size(self) -> tuple[int, int]:
        """(entries, bytes)."""
        ...


class Flights(Protocol):
    """Single-flight between the processes that share a cache: one asks upstream, the others wait for its answer."""

    def join(self, key: bytes, waited: bool = False, who: Caller | None = None) -> CachedAnswer | bool:
        """True: ask upstream, and `leave` then. False: another process does, ask again soon. Or its answer, as fresh.

        One look of microseconds, or one round trip. A process that is killed is followed no more after two seconds.

        Args:
            key: as for the cache.
            waited: it was asked before, and the answer was False.
            who: the one of this process's callers that asks; several may ask for one key. Once he is gone, another
                leads within half a second or so.
        """
        ...

    def leave(self, key: bytes, verdict: bool = False, who: Caller | None = None) -> None:
        """This caller asks no more; nothing happens where it did not lead, or another one does. Posted.

        Args:
            verdict: upstream has said what it says to this, and it is not in the cache: all who wait ask themselves.
                Else it is in the cache, once that is written, or the next one leads.
            who: as for `join`.
        """
        ...


class Store(Admission, Ledger, Answers, Protocol):
    """State shared by everything that has the same URL and namespace. All methods are thread-safe.

    Keys are given without the namespace; the store keeps namespaces apart. `url` never contains a password.
    """

    @property
    def url(self) -> str: ...

    @property
    def namespace(self) -> str: ...

    @property
    def durable(self) -> bool:
        """Whether state outlives this process."""
        ...

    @property
    def runs(self) -> Runs: ...

    @property
    def trials(self) -> Trials: ...

    @property
    def programs(self) -> ProgramCalls: ...

    @property
    def flights(self) -> Flights | None:
        """Who asks upstream for what, where other processes may ask the same; None where there are none."""
        ...

    @property
    def board(self) -> Board:
        """What all workers of the namespace must know at once: its circuits, and what operators have said."""
        ...

    def now(self) -> float:
        """The store's time in seconds; reservations and snapshots are expressed in it."""
        ...

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything posted before is applied; False when that took longer than `timeout`, and at once while
        the store is known to fail."""
        ...

    def close(self) -> None:
        """Flush and release. Idempotent."""
        ...
