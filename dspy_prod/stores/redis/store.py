"""The Redis store: durable state on a server, shared by the workers of many machines.

How it decides and writes is `DurableStore`'s: one writer thread, group commits, capacity drawn ahead. A transaction is
one call of a script (`tables.py`, `commit.lua`), and store time is the server's.
"""

from __future__ import annotations

import uuid
from typing import Any

from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.base import AccountState, CachedAnswer, Terms
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.store import DurableStore, OnProblem
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import Writer
from dspy_prod.stores.redis.accounts import dearest, read_accounts
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import terms_of
from dspy_prod.stores.redis.owners import read_holds
from dspy_prod.stores.redis.parts import Parts
from dspy_prod.stores.redis.tables import RedisTables
from dspy_prod.stores.redis.timing import RedisTime


class RedisStore(DurableStore):
    """State in Redis or Valkey, for all processes of all machines that use the same server and namespace.

    The server must keep what it is given: no eviction (`maxmemory-policy noeviction`), and persistence (AOF) if what
    is spent must outlive its restart. Whatever it lost is told by a `store_degraded` event, and what this process
    knows of budgets is written again.

    A process that is killed has its calls charged in full when its lease ends, and so is what it had drawn ahead: of
    each kind of calls, for at most 32 of them and a hundredth of what was left of their budgets.

    Args:
        url: `redis://host:6379/0`, `rediss://` with TLS, `unix:///path/of/socket`, as redis-py reads it.
        namespace: keeps programs that share a server apart.
        clock: another one than the system's is gone by instead of the server's.
        lease: seconds after which the holds of a process that died are charged; a live one renews its lease.
        max_records: the ledger keeps about this many newest records, None all of them; sums are kept for all.
        on_problem: called with a name and details when something went wrong in the background.

    Raises:
        StoreUnavailableError: the server cannot be used.

    Example:
        >>> store = RedisStore("redis://localhost:6379/0", "my-app")  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        namespace: str = "default",
        *,
        clock: Clock = SYSTEM_CLOCK,
        lease: float = 30.0,
        max_records: int | None = 1_000_000,
        on_problem: OnProblem | None = None,
    ) -> None:
        self._url = url
        self._reader = Connection(url, namespace)
        super().__init__(self._reader.shown, namespace, on_problem)
        self._time = RedisTime(clock)
        self._lease = lease
        self._max_records = max_records
        self.now = self._time.time
        self._start()
        with self._writer.io:
            self._writer.tables.open()
        hold_while_forking(self, Stage.FILES)

    def _start(self) -> None:
        """A fresh writer and reader: at construction, and in a forked child."""
        self._reader = Connection(self._url, self._namespace)
        writing = Connection(self._url, self._namespace, most=2, retries=0)
        tables = RedisTables(writing, uuid.uuid4().hex, self._time, Parts(writing, self._max_records))
        writer = Writer(tables, self._time, self._lease, self._listeners, self._terms)
        self._begin(writer, Mailbox(writer, (self._reader,)))
        self._parts = Parts(self._reader, self._max_records)

    @property
    def url(self) -> str:
        return self._path

    def __repr__(self) -> str:
        return f"RedisStore({self._path!r}, namespace={self._namespace!r})"

    # -- reading -----------------------------------------------------------------------------------------------------
    def terms(self) -> list[Terms]:
        self._settle_first()
        (rows,) = self._reader.read([("HVALS", self._reader.key("terms"))])
        found = [terms for text in rows if (terms := terms_of(text)) is not None]
        return sorted(found, key=lambda terms: terms.in_force.title)

    def account(self, key: str) -> AccountState:
        self._settle_first()
        (state,) = read_accounts(self._reader, [key])
        return self._without_drawn(key, state or AccountState())

    def accounts(self, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
        self._settle_first()
        return [(key, self._without_drawn(key, state)) for key, state in dearest(self._reader, prefix, suffix, most)]

    def holds(self) -> int:
        self._settle_first()
        return read_holds(self._reader) + self._drawn.in_flight() + self._local.holds()

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        self._settle_first()
        found: list[CallRecord] = self._parts.ledger.records(since, until, limit, equals)
        return found

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        self._settle_first()
        found: list[tuple[str, str, Totals]] = self._parts.ledger.totals(dimension, since_day, until_day, value)
        return found

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        self._settle_first()
        found: list[tuple[str, Totals]] = self._parts.ledger.sums(dimension, since_day, most)
        return found

    # -- response cache ----------------------------------------------------------------------------------------------
    def cache_get(self, key: bytes) -> CachedAnswer | None:
        return None

    def cache_put(self, key: bytes, answer: CachedAnswer, *, max_entries: int, max_bytes: int) -> None:
        self._mailbox.post((Transactions.put_answer, key, (answer, max_entries, max_bytes, _nothing)))
        self._writer.inbox.ease()

    def cache_clear(self) -> None:
        self._mailbox.post((Transactions.clear_answers, None, None))
        self._mailbox.flush(READ_TIMEOUT)

    def cache_size(self) -> tuple[int, int]:
        self._settle_first()
        size: tuple[int, int] = self._parts.answers.size()
        return size

    # -- ending ------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Write what is posted, end the writer, close the connections. Reading goes on to work."""
        self._mailbox.close()
        self._reader.close()

    def _settle_first(self) -> None:
        """Have written what was posted before."""
        self._mailbox.alive()  # whoever only reads must also see the holds of dead processes charged
        self.flush(READ_TIMEOUT)

    runs: Any
    trials: Any
    programs: Any


def _nothing() -> None:
    """An answer is written."""
