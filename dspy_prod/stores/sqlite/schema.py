"""The SQLite file: its tables, how it is created, and what to tell a person when that fails."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import CallRecord
from dspy_prod.runtime import private
from dspy_prod.stores.sqlite import cells, hits, program_rows, rollups, trial_tables
from dspy_prod.stores.sqlite.indices import missing

SCHEMA_VERSION: Final = 1

BUSY_LIMIT: Final = 5.0
"""Seconds to wait for another process, which creates, recovers or writes the file, before the store is unavailable."""

LONGEST_LOG: Final = 16_000
"""Pages in the write-ahead log from which on a commit copies it itself, whoever waits: see `Checkpoints`."""

_INTEGERS: Final = {
    *("attempt", "cost_nano", "estimated", "status", "cached", "saved_nano"),
    *("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"),
}
_REALS: Final = {"started_at", "latency", "waited"}


def _column(name: str) -> str:
    return f'"{name}" {"INTEGER" if name in _INTEGERS else "REAL" if name in _REALS else "TEXT"}'


_BUDGETS: Final = """
CREATE TABLE IF NOT EXISTS budgets (
    ns INTEGER, name TEXT, built TEXT NOT NULL, in_force TEXT NOT NULL, revision INTEGER NOT NULL,
    PRIMARY KEY (ns, name)) WITHOUT ROWID
"""
_RUNS: Final = (
    """
    CREATE TABLE IF NOT EXISTS run_answers (
        seq INTEGER PRIMARY KEY, ns INTEGER NOT NULL, run TEXT NOT NULL, key BLOB NOT NULL, ordinal INTEGER NOT NULL,
        response BLOB NOT NULL, served_model TEXT NOT NULL, at REAL NOT NULL)
    """,
    "CREATE UNIQUE INDEX IF NOT EXISTS run_answers_key ON run_answers (ns, run, key, ordinal)",
    """
    CREATE TABLE IF NOT EXISTS run_notes (
        ns INTEGER, run TEXT, name TEXT, value TEXT NOT NULL,
        PRIMARY KEY (ns, run, name)) WITHOUT ROWID
    """,
)
_BOARD: Final = (
    """
    CREATE TABLE IF NOT EXISTS board (
        ns INTEGER, kind TEXT, key TEXT, at REAL NOT NULL, content TEXT NOT NULL,
        PRIMARY KEY (ns, kind, key)) WITHOUT ROWID
    """,
    "CREATE TABLE IF NOT EXISTS board_notes (seq INTEGER PRIMARY KEY, ns INTEGER NOT NULL, content TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS board_notes_ns ON board_notes (ns, seq)",
)
_TABLES: Final = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE namespaces (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE owners (
    ns INTEGER, owner TEXT, lease_until REAL NOT NULL, pid INTEGER,
    PRIMARY KEY (ns, owner)) WITHOUT ROWID;
CREATE TABLE accounts (
    ns INTEGER, key TEXT, spent INTEGER NOT NULL, held INTEGER NOT NULL, unconfirmed INTEGER NOT NULL, ends_at REAL,
    PRIMARY KEY (ns, key)) WITHOUT ROWID;
CREATE TABLE holds (
    ns INTEGER, id TEXT, owner TEXT NOT NULL, ends_at REAL NOT NULL, amount INTEGER NOT NULL, accounts TEXT,
    limit_key TEXT, debit TEXT, stub TEXT,
    PRIMARY KEY (ns, id)) WITHOUT ROWID;
CREATE TABLE abandoned (
    ns INTEGER, id TEXT, at REAL NOT NULL, amount INTEGER NOT NULL, accounts TEXT, stub TEXT,
    PRIMARY KEY (ns, id)) WITHOUT ROWID;
CREATE TABLE limiters (
    ns INTEGER, key TEXT, state BLOB NOT NULL, settings TEXT NOT NULL,
    PRIMARY KEY (ns, key)) WITHOUT ROWID;
CREATE TABLE records (seq INTEGER PRIMARY KEY, ns INTEGER NOT NULL, {", ".join(map(_column, CallRecord._fields))});
CREATE UNIQUE INDEX records_id ON records (ns, id);
CREATE INDEX records_started ON records (ns, started_at);
CREATE TABLE cache (
    id INTEGER PRIMARY KEY, ns INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, size INTEGER NOT NULL,
    expires_at REAL NOT NULL, stale_until REAL NOT NULL, used_at REAL NOT NULL);
CREATE UNIQUE INDEX cache_key ON cache (ns, key);
CREATE INDEX cache_used ON cache (ns, used_at);
CREATE TABLE cache_sizes (ns INTEGER PRIMARY KEY, entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
"""


def connect(path: str, *, synchronous: str = "NORMAL") -> sqlite3.Connection:
    """A connection to an existing file, in autocommit mode, for one thread at a time."""
    uri = Path(path).as_uri() + "?mode=rw"  # never creates: a deleted file must be noticed
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_LIMIT, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    try:
        patiently(connection, "PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute("PRAGMA cache_size=-16000")
        connection.execute(f"PRAGMA wal_autocheckpoint={LONGEST_LOG}")
        connection.execute("PRAGMA journal_size_limit=67108864")
    except BaseException:
        connection.close()
        raise
    return connection


def create(path: str) -> None:
    """Create the directory (0700), the file (0600), the tables and the indices, where they are missing.

    SQLite gives its `-wal` and `-shm` files the mode of the main file.

    Raises:
        StoreUnavailableError, sqlite3.Error, OSError
    """
    private.make_directory(Path(path).parent)
    private.check_directory(Path(path).parent)
    private.make_file(Path(path))
    check(path)
    connection = connect(path)
    try:
        patiently(connection, "BEGIN IMMEDIATE")
        try:
            _migrate(connection, path)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        for statement in missing(connection):  # one by one, so that other processes get their turn
            patiently(connection, statement)
        restrict(path)  # it is no other program's
    finally:
        connection.close()


def check(path: str) -> None:
    """See to it that the file, and what SQLite believes beside it, is our own; raises `private.NotPrivateError`."""
    private.check(*_with_beside(path))


def restrict(path: str) -> None:
    """Keep others from the file and what lies beside it: whoever may write there sets what is spent.

    What is mapped into memory lies there too: whoever makes such a file shorter ends the processes that look at it.
    """
    ours = [Path(f"{path}-board"), Path(f"{path}-flights"), *cells.orphans(path, ())]
    files = [file for file in ours if not file.is_symlink()]  # which whoever uses it refuses
    private.restrict(Path(path).parent, *_with_beside(path), *files)


def _with_beside(path: str) -> list[Path]:
    return [Path(path + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        for statement in (
            *_TABLES.split(";"),
            _BUDGETS,
            *hits.TABLES,
            *_RUNS,
            *program_rows.TABLES,
            *trial_tables.TABLES,
            *_BOARD,
        ):
            connection.execute(statement)
        rollups.bring_up_to_date(connection)
        for statement in missing(connection):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('format', 'dspy_prod'), ('schema', ?)", (SCHEMA_VERSION,))
        return
    meta = dict(connection.execute("SELECT key, value FROM meta")) if "meta" in tables else {}
    if meta.get("format") != "dspy_prod":
        raise StoreUnavailableError(
            f"The store file {path} is the database of another program; give dspy_prod a file of its own: store=..."
        )
    version = meta.get("schema")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise StoreUnavailableError(
            f"The store file {path} has schema version {version!r}, this dspy_prod knows 1 to {SCHEMA_VERSION}; "
            f"{'upgrade dspy_prod' if newer else 'it is damaged: move it away'}, or give another file: store=..."
        )
    for statement in (
        _BUDGETS,
        *hits.TABLES,
        *_RUNS,
        *program_rows.TABLES,
        *trial_tables.TABLES,
        *_BOARD,
    ):  # files of the first release have none
        connection.execute(statement)
    for table, names in trial_tables.LATER.items():
        for name in _lacking(connection, table, names):
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
    for name in _lacking(connection, "records", CallRecord._fields):
        connection.execute(f"ALTER TABLE records ADD COLUMN {_column(name)}")
    rollups.bring_up_to_date(connection)


def _lacking(connection: sqlite3.Connection, table: str, fields: Sequence[str]) -> list[str]:
    """The fields that were added since a table was made."""
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    return [name for name in fields if name not in known]


def namespace_id(connection: sqlite3.Connection, namespace: str) -> int:
    """The number under which a namespace's rows are kept; made when it is new."""
    find = "SELECT id FROM namespaces WHERE name = ?"
    row = connection.execute(find, (namespace,)).fetchone()
    if row is None:
        patiently(connection, "BEGIN IMMEDIATE")
        connection.execute("INSERT OR IGNORE INTO namespaces (name) VALUES (?)", (namespace,))
        connection.execute("COMMIT")
        row = connection.execute(find, (namespace,)).fetchone()
    number: int = row[0]
    return number


def namespaces(path: str | Path) -> list[str] | None:
    """The names in a file, which is left as it is; None when it cannot be read, or is no store."""
    try:
        connection = sqlite3.connect(Path(path).absolute().as_uri() + "?mode=ro", uri=True, timeout=BUSY_LIMIT)
        try:
            return [name for (name,) in connection.execute("SELECT name FROM namespaces ORDER BY name")]
        finally:
            connection.close()
    except sqlite3.Error:
        return None


def is_locked(error: BaseException) -> bool:
    """Another connection has the write lock: worth another try."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute what needs a lock that SQLite's busy handler does not wait for, or not fairly: in short steps."""
    deadline = time.monotonic() + BUSY_LIMIT
    pause = 0.0002
    while True:
        try:
            connection.execute(statement).fetchall()
            return
        except sqlite3.OperationalError as error:
            if not is_locked(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause * (0.5 + random.random()))
        pause = min(pause * 1.5, 0.002)


def is_environment(error: BaseException) -> bool:
    """The disk, the file or another process is to blame, and not the values to be written."""
    return isinstance(error, OSError | StoreUnavailableError) or type(error) in (
        sqlite3.OperationalError,
        sqlite3.DatabaseError,
    )


_REMEDIES: Final = {
    "not a database": "it is not a SQLite database: move it away, or give another file with store=...",
    "malformed": "it is damaged: move it away, or repair it with the sqlite3 tool's .recover",
    "full": "free some disk space",
    "locked": "another program keeps it locked: end that program",
    "": "check that its directory exists and is writable, give another file with store='sqlite:////path/state.db', "
    "or use store='memory://'",
}
"""By what SQLite's message says."""


def unavailable(path: str, error: BaseException) -> StoreUnavailableError:
    """What a person should read when the file cannot be used."""
    if isinstance(error, StoreUnavailableError):
        return error
    if isinstance(error, private.NotPrivateError):
        return StoreUnavailableError(
            f"The store file {path} cannot be used: {error}, or give another file with store='sqlite:////path/state.db'"
        )
    text = str(error)
    remedy = next(remedy for sign, remedy in _REMEDIES.items() if sign in text)
    return StoreUnavailableError(f"The store file {path} cannot be used ({text or type(error).__name__}): {remedy}")
