"""The Redis store: durable state on a server, shared by the workers of many machines.

How it decides and writes is `DurableStore`'s: one writer thread, group commits, capacity drawn ahead. A transaction is
one call of a script (`tables.py`, `commit.lua`), and store time is the server's.
"""

from __future__ import annotations

import logging
import uuid

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock, follow
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.base import AccountState, CachedAnswer, Terms
from dspy_prod.stores.durable.flights import Flights
from dspy_prod.stores.durable.kept import KeptAnswers
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.store import DurableStore, OnProblem
from dspy_prod.stores.durable.writer import Writer
from dspy_prod.stores.redis.accounts import dearest, read_accounts
from dspy_prod.stores.redis.bell import Bell
from dspy_prod.stores.redis.board import RedisBoard
from dspy_prod.stores.redis.claims import RedisClaims
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import terms_of
from dspy_prod.stores.redis.ledger import MAX_RECORDS
from dspy_prod.stores.redis.owners import read_holds
from dspy_prod.stores.redis.parts import Parts
from dspy_prod.stores.redis.programs import PostedPrograms
from dspy_prod.stores.redis.runs import RedisRuns
from dspy_prod.stores.redis.tables import RedisTables
from dspy_prod.stores.redis.timing import RedisTime
from dspy_prod.stores.redis.trials import RedisTrials

_log = logging.getLogger("dspy_prod")


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
        max_records: the ledger keeps about this many newest records; sums are kept for all.
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
        max_records: int = MAX_RECORDS,
        on_problem: OnProblem | None = None,
    ) -> None:
        self._url = url
        self._reader = Connection(url, namespace)
        super().__init__(self._reader.shown, namespace, on_problem)
        self._time = RedisTime(clock)
        self._lease = lease
        self._max_records = max_records
        self.now = self._time.time
        self._trials: RedisTrials | None = None
        self._board: RedisBoard | None = None
        self._start()
        with self._writer.io:
            self._writer.tables.open()
        self._look_at_settings()
        hold_while_forking(self, Stage.FILES)
        follow(clock, self, type(self)._moved)

    def _start(self) -> None:
        """A fresh writer and reader: at construction, and in a forked child."""
        self._reader = Connection(self._url, self._namespace)
        writing = Connection(self._url, self._namespace, most=2, retries=0)
        self._bell = Bell(Connection(self._url, self._namespace, most=2))
        parts = Parts(writing, self._max_records)
        tables = RedisTables(writing, uuid.uuid4().hex, self._time, parts, self._bell)
        writer = Writer(tables, self._time, self._lease, self._listeners, self._terms)
        self._begin(writer, Mailbox(writer, (self._reader,)))
        self._parts = Parts(self._reader, self._max_records)
        kept = KeptAnswers(self._mailbox, self._find_answer, self.now)
        self.flights = Flights(RedisClaims(self._reader, self._mailbox, self.now), kept, self.now, self._hurry)
        self.cache_get, self.cache_put, self.cache_clear = kept.get, kept.put, kept.clear
        self.programs = PostedPrograms(self._mailbox, self._parts.programs)
        self.runs = RedisRuns(self._mailbox, self._reader)
        if self._trials is None:
            self._trials = RedisTrials(self._mailbox, self._reader, self.now)
        else:
            self._trials.begin(self._mailbox, self._reader)
        if self._board is None:
            self._board = RedisBoard(self._mailbox, self._reader, self._bell, self.now)
        else:
            self._board.begin(self._mailbox, self._reader, self._bell)

    @property
    def trials(self) -> RedisTrials:
        """What is kept of experiments; the same object in a forked child."""
        assert self._trials is not None
        return self._trials

    @property
    def board(self) -> RedisBoard:
        """What all workers must know at once; the same object in a forked child."""
        assert self._board is not None
        return self._board

    @property
    def url(self) -> str:
        return self._path

    def __repr__(self) -> str:
        return f"RedisStore({self._path!r}, namespace={self._namespace!r})"

    def _look_at_settings(self) -> None:
        """Warn of a server that deletes what it was given when its memory is full: what is spent would be forgotten."""
        try:
            (told,) = self._reader.read([("INFO", "memory")])
        except StoreUnavailableError:  # its user may not ask
            return
        policy = str(told.get("maxmemory_policy", "noeviction"))
        if told.get("maxmemory") and policy != "noeviction":
            _log.warning(
                "The server of %s deletes keys when its memory is full (maxmemory-policy %s), and with them what is "
                "spent: set it to noeviction", self._path, policy,
            )  # fmt: skip

    def _find_answer(self, key: bytes) -> tuple[CachedAnswer, float] | None:
        if self._writer.failing is not None:
            return None  # nobody waits for a server that is known to be away
        return self._parts.answers.find(key)

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
        return read_holds(self._reader) + self._in_flight()

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        self._settle_first()
        return self._parts.ledger.records(since, until, limit, equals)

    def unconfirmed(self, since: float | None = None) -> list[CallRecord]:
        self._settle_first()
        return self._parts.ledger.unconfirmed(since)

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        self._settle_first()
        return self._parts.ledger.totals(dimension, since_day, until_day, value)

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        self._settle_first()
        return self._parts.ledger.sums(dimension, since_day, most)

    def cache_size(self) -> tuple[int, int]:
        self._settle_first()
        return self._parts.answers.size()

    # -- ending ------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Write what is posted, end the writer, close the connections. Reading goes on to work."""
        self._bell.closed = True
        self._mailbox.close()
        self._end_beside()
        self._reader.close()

    def _settle_first(self) -> None:
        """Have written what was posted before."""
        self._mailbox.alive()  # whoever only reads must also see the holds of dead processes charged
        self.flush(READ_TIMEOUT)
