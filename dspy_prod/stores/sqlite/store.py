"""The SQLite store: durable state in one file, shared by the processes of one machine.

How it decides and writes is `DurableStore`'s; readers have connections of their own and never block the writer.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable
from typing import Final, TypeVar

from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock, follow
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.durable.flights import Flights
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.store import DurableStore, OnProblem
from dspy_prod.stores.durable.writer import Writer
from dspy_prod.stores.sqlite.answers import read_size
from dspy_prod.stores.sqlite.asked import (
    read_account,
    read_accounts,
    read_holds,
    read_terms,
)
from dspy_prod.stores.sqlite.board import KeptBoard
from dspy_prod.stores.sqlite.checkpoints import Checkpoints
from dspy_prod.stores.sqlite.claims import ClaimsFile
from dspy_prod.stores.sqlite.finding import read_records, read_unconfirmed
from dspy_prod.stores.sqlite.kept import KeptAnswers
from dspy_prod.stores.sqlite.programs import KeptPrograms
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.runs import KeptRuns
from dspy_prod.stores.sqlite.schema import unavailable
from dspy_prod.stores.sqlite.summed import read_sums, read_totals
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.stores.sqlite.timing import StoreTime
from dspy_prod.stores.sqlite.trials import KeptTrials

T = TypeVar("T")

LOOK_EVERY: Final = 0.05
"""Seconds for which a call that looks for its answer takes the file to be still there: each look is a system call."""


class SqliteStore(DurableStore):
    """State in a SQLite file, for all processes of this machine that use the same path and namespace.

    Args:
        path: the file; made, with its directory, when missing, and readable by its owner only.
        namespace: keeps programs that share a file apart.
        clock: store time begins with `clock.time()` and goes on with `clock.monotonic()`, see `StoreTime`.
        lease: seconds after which the holds of a process that died are charged; a live one renews its lease.
        synchronous: SQLite's setting. `"NORMAL"` survives the death of a process, `"FULL"` also that of the machine.
        max_records: the ledger keeps about this many newest records, None all of them; sums are kept for all.
        on_problem: called with a name and details when something went wrong in the background.

    Raises:
        StoreUnavailableError: the file cannot be opened or is no store of this version.
    """

    def __init__(
        self,
        path: str,
        namespace: str = "default",
        *,
        clock: Clock = SYSTEM_CLOCK,
        lease: float = 30.0,
        synchronous: str = "NORMAL",
        max_records: int | None = None,
        on_problem: OnProblem | None = None,
    ) -> None:
        super().__init__(os.path.abspath(os.path.expanduser(path)), namespace, on_problem)
        self._time = StoreTime(clock)
        self._lease = lease
        self._synchronous = synchronous
        self._max_records = max_records
        self.now = self._time.time
        self._trials: KeptTrials | None = None
        self._board: KeptBoard | None = None
        self._start()
        try:
            with self._writer.io:
                self._writer.tables.open()
        except Exception as error:
            raise unavailable(self._path, error) from error
        hold_while_forking(self, Stage.FILES)
        follow(clock, self, type(self)._moved)

    def _start(self) -> None:
        """A fresh writer and reader: at construction, and in a forked child."""
        tables = Tables(
            self._path,
            self._namespace,
            uuid.uuid4().hex,
            synchronous=self._synchronous,
            max_records=self._max_records,
            timing=self._time,
        )
        copier = Reader(self._path, self._namespace)
        writer = Writer(tables, self._time, self._lease, self._listeners, self._terms, Checkpoints(copier))
        self._ledger_reader = Reader(self._path, self._namespace)
        cache_reader = Reader(self._path, self._namespace, look_every=LOOK_EVERY)
        runs_reader = Reader(self._path, self._namespace)
        trials_reader = Reader(self._path, self._namespace)
        board_reader = Reader(self._path, self._namespace)
        self._readers = (self._ledger_reader, cache_reader, runs_reader, trials_reader, board_reader, copier)
        self._begin(writer, Mailbox(writer, self._readers))
        kept = KeptAnswers(self._mailbox, cache_reader, self.now)
        self.runs = KeptRuns(self._mailbox, runs_reader)
        if self._trials is None:
            self._trials = KeptTrials(self._mailbox, trials_reader, self.now)
        else:
            self._trials.begin(self._mailbox, trials_reader)
        if self._board is None:
            self._board = KeptBoard(self._mailbox, board_reader, self.now)
        else:
            self._board.begin(self._mailbox, board_reader)
        self.programs = KeptPrograms(self._mailbox, self._ledger_reader)
        self.cache_get, self.cache_put, self.cache_clear = kept.get, kept.put, kept.clear
        self.flights = Flights(ClaimsFile(self._path, self._namespace), kept, self.now, self._hurry)

    @property
    def trials(self) -> KeptTrials:
        """What is kept of experiments; the same object in a forked child."""
        assert self._trials is not None
        return self._trials

    @property
    def board(self) -> KeptBoard:
        """What all workers must know at once; the same object in a forked child."""
        assert self._board is not None
        return self._board

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path}"

    def __repr__(self) -> str:
        return f"SqliteStore({self._path!r}, namespace={self._namespace!r})"

    def terms(self) -> list[Terms]:
        return self._read(read_terms)

    def account(self, key: str) -> AccountState:
        return self._without_drawn(key, self._read(lambda connection, ns: read_account(connection, ns, key)))

    def accounts(self, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
        found = self._read(lambda connection, ns: read_accounts(connection, ns, prefix, suffix, most))
        return [(key, self._without_drawn(key, state)) for key, state in found]

    def holds(self) -> int:
        return self._read(read_holds) + self._in_flight()

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        return self._read(lambda connection, ns: read_records(connection, ns, since, until, limit, equals))

    def unconfirmed(self, since: float | None = None) -> list[CallRecord]:
        return self._read(lambda connection, ns: read_unconfirmed(connection, ns, since))

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        return self._read(lambda connection, ns: read_totals(connection, ns, dimension, since_day, until_day, value))

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        return self._read(lambda connection, ns: read_sums(connection, ns, dimension, since_day, most))

    def cache_size(self) -> tuple[int, int]:
        return self._read(read_size)

    # -- ending ------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Write what is posted, end the writer, close the file. Reading goes on to work."""
        self._mailbox.close()
        self._end_beside()
        for reader in self._readers:
            reader.close()

    def _read(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        self._mailbox.alive()  # whoever only reads must also see the holds of dead processes charged
        self.flush(READ_TIMEOUT)
        try:
            return self._ledger_reader.read(read)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._path, error) from error
