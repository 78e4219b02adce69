"""What reading the SQLite ledger takes, however old it is.

Rows of attempts and pages of cached answers, as many of each, over ninety days.
"""

from __future__ import annotations

import datetime as dt
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

from benchmarks import lm_reads
from dspy_prod.records import CallRecord
from dspy_prod.stores.sqlite.ledger import LedgerTables
from dspy_prod.stores.sqlite.schema import connect, create
from dspy_prod.stores.sqlite.store import SqliteStore

BATCH = 512


def days_ago(days: int) -> dt.date:
    """The day (UTC) so many days ago."""
    return dt.datetime.now(dt.timezone.utc).date() - dt.timedelta(days=days)


def fill(store: SqliteStore, rows: int, days: int = 90) -> None:
    """Rows of `days` days up to now, with their sums, made by SQL."""
    store.close()
    connection = sqlite3.connect(store.url.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    now = time.time()
    (ns,) = connection.execute("SELECT id FROM namespaces WHERE name = ?", (store.namespace,)).fetchone()
    connection.execute("BEGIN")
    connection.execute(
        """
        WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)
        INSERT INTO records (ns, id, call_id, started_at, model, route, attempt, outcome, cost_nano, estimated,
            input_tokens, output_tokens, cached, latency, waited, "user", tenant, priority, accounts, session, trace_id,
            prompt_version)
        SELECT ?2, printf('%016x', i), printf('%016x', i), ?3 - ?4 * 86400.0 * (?1 - i) / ?1, 'openai/gpt-4o-mini',
            'primary', 1, iif(i % 100000 = 7, 'timeout', 'ok'), 1234, 0, 500, 120, 0, 0.8, 0.0, 'u' || (i % 1000),
            't' || (i % 20), 'normal', '["day|-|2026-11-23"]', 's' || (i / 10), 'tr-' || i, 'p/' || (i * 10 / ?1) FROM n
        """,
        (rows, ns, now, days),
    )
    each = ("'all', ''", "'model', model", "'user', \"user\"", "'tenant', tenant")
    for dimension in each:
        connection.execute(
            f"""
            INSERT INTO rollups (ns, day, dimension, value, cost_nano, attempts, input_tokens, output_tokens)
            SELECT ns, date(started_at, 'unixepoch') AS day, {dimension} AS value,
                sum(cost_nano), count(*), sum(input_tokens), sum(output_tokens)
            FROM records WHERE ns = ? GROUP BY day, {dimension.partition(", ")[2]}
            """,
            (ns,),
        )
    connection.execute("COMMIT")
    connection.close()


def fill_hits(store: SqliteStore, count: int, days: int = 90) -> None:
    """Cached answers of the same days, users and sessions, in their pages."""
    store.close()
    create(store.url.removeprefix("sqlite:///"))
    connection = connect(store.url.removeprefix("sqlite:///"))
    connection.execute("PRAGMA synchronous=OFF")
    (ns,) = connection.execute("SELECT id FROM namespaces WHERE name = ?", (store.namespace,)).fetchone()
    tables, now = LedgerTables(None), time.time()
    tables.attach(connection, ns)
    for start in range(0, count, BATCH):
        connection.execute("BEGIN")
        numbers = range(start, min(count, start + BATCH))
        tables.write([hit(i, now - days * 86_400.0 * (count - i) / count) for i in numbers], ())
        connection.execute("COMMIT")
    connection.close()


def hit(number: int, at: float) -> CallRecord:
    """A cached answer."""
    return CallRecord(
        f"h{number * 2:08x}", f"h{number * 2 + 1:08x}", at, "openai/gpt-4o-mini", "primary", 0, "cached", 0,
        cached=True, user=f"u{number // 10 % 1000}", tenant=f"t{number // 10 % 20}", session=f"s{number // 10}",
    )  # fmt: skip


def _median(read: Callable[[], object], times: int = 51) -> float:
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        read()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations) * 1e6


def _medians(reads: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """One after the other in rounds, so that a moment in which the machine is slow tells against none alone."""
    durations: dict[str, list[float]] = {name: [] for name in reads}
    for _ in range(times):
        for name, read in reads.items():
            started = time.perf_counter()
            read()
            durations[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) * 1e6 for name, each in durations.items()}


def _questions(rows: int) -> dict[str, dict[str, str]]:
    """Filters of common, rare and absent values, alone and together; a value of few rows is called one of them."""
    absent = [{name: "absent"} for name in ("trace_id", "session", "model", "user", "outcome", "call_id")]
    single = [
        {"trace_id": f"tr-{rows // 2}"}, {"session": f"s{rows // 20}"}, {"prompt_version": "p/5"}, {"tenant": "t3"},
        {"model": "openai/gpt-4o-mini"}, {"call_id": f"{rows // 2:016x}"}, {"call_id": f"h{rows:08x}"},
        {"outcome": "timeout"}, {"outcome": "cached"},
    ]  # fmt: skip
    double = [
        {"user": "u7", "model": "openai/gpt-4o-mini"}, {"tenant": "t3", "outcome": "timeout"},
        {"tenant": "t3", "outcome": "error"}, {"user": "u7", "session": "absent"},
    ]  # fmt: skip
    few = {"trace_id", "session", "call_id"}
    said: dict[str, dict[str, str]] = {}
    for asked in (*single, *absent, *double):
        told = [
            f"{name}=one{' of a hit' * value.startswith('h')}"
            if name in few and value != "absent"
            else f"{name}={value}"
            for name, value in asked.items()
        ]
        said[", ".join(told)] = asked
    return said


def read_times(rows: int, pair: Callable[[SqliteStore, int], None]) -> dict[str, float]:
    """Microseconds (median) of reading and of one pair, with a ledger of `rows` and an account for each tenth row."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "state.db")
        fill(SqliteStore(path), rows)
        fill_hits(SqliteStore(path), rows)
        store = SqliteStore(path)
        pair(store, 20)
        store.flush()
        today, week = str(days_ago(0)), str(days_ago(6))
        assert sum(sums.cached for _, _, sums in store.totals()) == rows
        result = {
            "today_us": _median(lambda: store.totals(since_day=today)),
            "week_us": _median(lambda: store.totals(since_day=week)),
            "account_us": _median(lambda: store.account("day|-|2026-11-23")),
            "holds_us": _median(store.holds),
            "latest_50_records_us": _median(lambda: store.records(limit=50)),
            "users_latest_50_us": _median(lambda: store.records(limit=50, user="u7")),
            **{
                f"records({said})_us": _median(partial(store.records, limit=50, **asked), 9)
                for said, asked in _questions(rows).items()
            },
            "pair_us": _median(lambda: pair(store, 1)),
        }
        store.close()
        lm_reads.fill_tenants(path, store.namespace, rows // 10)
        engine = lm_reads.Hanging()
        lm = lm_reads.lm_of(path, store.namespace, engine)
        with lm_reads.in_flight(lm, engine, lm_reads.IN_FLIGHT):
            for name, median in _medians(lm_reads.reads_of(lm), 21).items():
                result[f"{lm_reads.IN_FLIGHT:,} calls in flight: {name}_us"] = median
        lm.close()
    return {name: round(value, 1) for name, value in result.items()}
