"""What a SQLite file keeps of experiments. Reads beside the writer, and writes through it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.posting import Posting
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.keys import joined
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.schema import unavailable
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.stores.sqlite.trial_forgetting import forget_some
from dspy_prod.stores.sqlite.trial_leases import give, read_progress, take
from dspy_prod.stores.sqlite.trial_tables import (
    advance,
    find,
    id_of,
    read_arms,
    read_checkpoint,
    read_decisions,
    read_ended,
    read_exposed,
    read_matured,
    read_ready,
    read_seen,
    read_tally,
    read_trials,
    read_waiting,
    windows_text,
)
from dspy_prod.stores.sqlite.trial_writing import write_batch
from dspy_prod.stores.trial_posts import GRACE, Call, Exposure, Outcome, Thing, Underway, taken
from dspy_prod.stores.trial_terms import (
    CREATED,
    PART,
    Arm,
    Checkpoint,
    Decision,
    Ended,
    Lease,
    Matured,
    Progress,
    Tally,
    Trial,
    Waiting,
    check_state,
    check_windows,
    lease_of,
)

_CREATE: Final = (
    "INSERT INTO trials (ns, name, declaration, windows, grace, state, stage, since, revision, created) "
    "VALUES (?, ?, ?, ?, ?, ?, 0, ?, 1, ?)"
)
_CHANGE: Final = (
    "UPDATE trials SET declaration = ?, state = ?, stage = ?, since = ?, revision = ? WHERE id = ? AND revision = ?"
)
_DECIDE: Final = (
    "INSERT INTO trial_decisions SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, ?4, ?5 "
    "FROM trial_decisions WHERE trial = ?1"
)
_SAVE: Final = (
    "UPDATE trials SET checkpoint = ?, checkpoint_revision = ?, checkpoint_at = ? "
    "WHERE id = ? AND checkpoint_revision = ?"
)

T = TypeVar("T")


class KeptTrials:
    """See `Trials`.

    Args:
        mailbox: how the writer is reached. reader: a connection for nothing else. now: the store's time.
    """

    def __init__(self, mailbox: Mailbox, reader: Reader, now: Callable[[], float]) -> None:
        self.now = now
        self.begin(mailbox, reader)

    def begin(self, mailbox: Mailbox, reader: Reader) -> None:
        """Go by these. Experiments keep this object for as long as they live, so it serves a forked child as well."""
        self._mailbox = mailbox
        self._reader = reader
        self._path = mailbox.writer.tables.path
        self._post = Posting[Thing](mailbox, _write, "exposures, calls and outcomes of experiments", taken)
        self._written = 0  # of what was posted, so much is known to be in the file

    # -- experiments -------------------------------------------------------------------------------------------------
    def create(self, name: str, declaration: str, windows: Mapping[str | None, float], grace: float = GRACE) -> Trial:
        check_windows(windows, grace)
        row = joined(name), carried(declaration), windows_text(dict(windows)), float(grace), CREATED

        def make(connection: sqlite3.Connection, ns: int, now: float) -> Trial:
            found = find(connection, ns, name)
            if found is None:
                connection.execute(_CREATE, (ns, *row, now, now))
                found = find(connection, ns, name)
            assert found is not None
            return found[1]

        return self._ask(make)

    def trial(self, name: str) -> Trial | None:
        found = self._durable(lambda connection, ns: find(connection, ns, name))
        return None if found is None else found[1]

    def trials(self) -> list[Trial]:
        return self._durable(read_trials)

    def change(
        self,
        name: str,
        revision: int,
        *,
        state: str | None = None,
        stage: int | None = None,
        declaration: str | None = None,
        decision: Decision | None = None,
    ) -> Trial | None:
        check_state(state)
        declaration = None if declaration is None else carried(declaration)

        def change(connection: sqlite3.Connection, ns: int, now: float) -> Trial | None:
            found = find(connection, ns, name)
            if found is None or found[1].revision != revision:
                return None
            id, new = found[0], found[1].changed(now, state, stage, declaration)
            row = (new.declaration, new.state, new.stage, new.since, new.revision, id, revision)
            connection.execute(_CHANGE, row)
            if decision is not None:
                _decide(connection, id, decision, now)
            return new

        return self._ask(change)

    def remove(self, name: str) -> None:
        sql = "DELETE FROM trials WHERE ns = ? AND name = ?"
        self._ask(lambda connection, ns, _: connection.execute(sql, (ns, joined(name))).rowcount)
        while self._ask(lambda connection, _, __: forget_some(connection)):
            pass

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure) -> None:
        self._post(exposure)

    def call(self, call: Call) -> None:
        self._post(call)

    def outcome(self, outcome: Outcome) -> None:
        self._post(outcome)

    def underway(self, underway: Underway) -> None:
        self._post(underway)

    def seen(self, name: str, unit: str) -> str | None:
        return self._look(lambda connection, ns: read_seen(connection, id_of(connection, ns, name), unit))

    # -- reading -----------------------------------------------------------------------------------------------------
    def counts(self, name: str) -> list[Arm]:
        return self._read(lambda connection, ns: read_arms(connection, id_of(connection, ns, name)))

    def ended(self, name: str) -> list[Ended]:
        return self._read(lambda connection, ns: read_ended(connection, id_of(connection, ns, name)))

    def tally(self, name: str) -> Tally:
        unkept = self._post.dropped
        return self._read(lambda connection, ns: read_tally(connection, id_of(connection, ns, name), unkept))

    def matured(self, name: str, metric: str | None, after: int = 0, most: int = PART) -> list[Matured]:
        def read(connection: sqlite3.Connection, ns: int) -> list[Matured] | tuple[int, Trial]:
            found = find(connection, ns, name)
            if found is None:
                return []
            id, trial = found
            mark, ready = read_ready(connection, id, metric, trial.window(metric), trial.grace, self.now(), most)
            return found if ready > mark else read_matured(connection, id, metric, after, most)

        known = self._read(read)
        if isinstance(known, list):
            return known
        id, window, grace = known[0], known[1].window(metric), known[1].grace
        # Inside a transaction, so that whatever is written before or after the mark agrees with it.
        self._ask(lambda connection, _, now: advance(connection, id, metric, window, grace, now, most))
        return self._look(lambda connection, _: read_matured(connection, id, metric, after, most))

    def exposed(self, name: str, after: int = 0, most: int = PART) -> list[Matured]:
        return self._read(lambda connection, ns: read_exposed(connection, id_of(connection, ns, name), after, most))

    def waiting(self, name: str) -> dict[str | None, Waiting]:
        def read(connection: sqlite3.Connection, ns: int) -> dict[str | None, Waiting]:
            found = find(connection, ns, name)
            return {} if found is None else read_waiting(connection, found[0], found[1].windows, found[1].grace)

        return self._read(read)

    # -- the controller ----------------------------------------------------------------------------------------------
    def checkpoint(self, name: str) -> Checkpoint | None:
        return self._look(lambda connection, ns: read_checkpoint(connection, id_of(connection, ns, name)))

    def save(self, name: str, state: str, revision: int) -> bool:
        state = carried(state)

        def save(connection: sqlite3.Connection, ns: int, now: float) -> bool:
            row = (state, revision + 1, now, id_of(connection, ns, name), revision)
            return connection.execute(_SAVE, row).rowcount == 1

        return self._ask(save)

    def lease(self, name: str, holder: str, seconds: float) -> Lease:
        return self._ask(lambda connection, ns, now: take(connection, ns, name, holder, seconds, now))

    def look(self, name: str, holder: str, seconds: float) -> tuple[Lease, Progress | None]:
        unkept = self._post.dropped

        # All in the writer's transaction: what a connection beside it knows of the file, it forgets at each commit; and
        # marks that are moved now `matured` need not have moved, in a transaction each.
        def look(connection: sqlite3.Connection, ns: int, now: float) -> tuple[Lease, Progress | None]:
            lease = take(connection, ns, lease_of(name), holder, seconds, now)
            found = read_progress(connection, ns, name, unkept) if lease.holder == holder else None
            if found is None:
                return lease, None
            id, progress = found
            for metric, window in progress.trial.windows.items():
                advance(connection, id, metric, window, progress.trial.grace, now, PART)
            return lease, progress

        return self._ask(look)

    def release(self, name: str, holder: str) -> None:
        def give_back(tables: Tables, _: float) -> None:
            assert tables.connection is not None
            give(tables.connection, tables.ns, name, holder)

        self._mailbox.post((Transactions.note, give_back, None))

    def decisions(self, name: str) -> list[Decision]:
        return self._look(lambda connection, ns: read_decisions(connection, id_of(connection, ns, name)))

    def decide(self, name: str, decision: Decision) -> int:
        def add(connection: sqlite3.Connection, ns: int, now: float) -> int:
            id = id_of(connection, ns, name)
            return 0 if id < 0 else _decide(connection, id, decision, now)

        return self._ask(add)

    # -- how ---------------------------------------------------------------------------------------------------------
    def _ask(self, ask: Callable[[sqlite3.Connection, int, float], T]) -> T:
        """Inside a transaction, after everything that was posted before."""

        def inside(_: Any, tables: Tables, now: float) -> T:
            assert tables.connection is not None
            return ask(tables.connection, tables.ns, now)

        posted = self._post.posted
        found: T = self._mailbox.question(inside)
        self._written = posted
        return found

    def _durable(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        """Beside the writer: what is never posted."""
        self._mailbox.alive()
        return self._look(read)

    def _read(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        """Beside the writer, with everything that was posted before."""
        self._mailbox.alive()
        posted = self._post.posted
        if posted != self._written and self._mailbox.flush(READ_TIMEOUT):
            self._written = posted
        return self._look(read)

    def _look(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        """Beside the writer: what is durable."""
        try:
            return self._reader.read(read)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._path, error) from error


def _write(tables: Tables, things: list[Thing], batch: int, now: float) -> None:
    assert tables.connection is not None
    write_batch(tables.connection, tables.ns, tables.owner, things, batch, now)


def _decide(connection: sqlite3.Connection, id: int, decision: Decision, now: float) -> int:
    texts = carried(decision.what), carried(decision.by), carried(decision.evidence)
    connection.execute(_DECIDE, (id, now, *texts))
    return int(connection.execute("SELECT max(number) FROM trial_decisions WHERE trial = ?", (id,)).fetchone()[0])
