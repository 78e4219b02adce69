"""The calls of programs in Redis: the newest of them, and sums per day of all.

Records, and the sums of a day, are kept for 400 days after they were last written, at most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final

import orjson

from dspy_prod.privacy.visible import carried
from dspy_prod.records import OTHER
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.programs import (
    COMPARED,
    ProgramCall,
    ProgramSums,
    ProgramTotals,
    check_compared,
    program_keys,
    together,
)
from dspy_prod.stores.redis.asking import KEPT_FOR, Asking, enlist, packed, part_of, unpacked
from dspy_prod.stores.redis.batch import Batch, Value
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.program_rows import call_of, call_row, moment, moment_from
from dspy_prod.stores.redis.program_steps import FIND, INDEXED, MOMENT, STARTED
from dspy_prod.stores.sqlite.rows import clean

_log = logging.getLogger("dspy_prod")

MAX_RECORDS: Final = 100_000
"""Records kept unless said otherwise: 90 MB of the server's memory."""
_PAGE: Final = 500
"""Records looked at in one step at the server, which does nothing else meanwhile."""
_MOST: Final = 2**63 - 1

_Ended = tuple[str, str, str, bytes]
"""Day, dimension, value, and [status, reason] in JSON."""


class RedisPrograms:
    """Writes calls inside the writer's commits, and reads them.

    Args:
        max_records: how many of the newest are kept; None: as many as `MAX_RECORDS`.
    """

    def __init__(self, connection: Connection, max_records: int | None = None) -> None:
        self.connection = connection
        self._most = MAX_RECORDS if max_records is None else max_records
        self._put: list[ProgramCall] = []
        self._place = 0

    # -- writing, by the writer ----------------------------------------------------------------------------------------
    def put(self, call: ProgramCall) -> None:
        """Keep a call, once `write` is called."""
        self._put.append(call)

    def forget(self) -> None:
        """The transaction was undone: its calls are put again."""
        self._put.clear()

    def write(self, batch: Batch, now: float) -> None:
        """Add to the commit the calls that were put."""
        calls, self._put = [fit for call in self._put if (fit := _fit(call)) is not None], []
        if not calls:
            return
        self._write_calls(batch, [call for call, _ in calls], [row for _, row in calls], now)
        days: dict[str, dict[_Ended, ProgramTotals]] = {}
        for some in together([call for call, _ in calls]):
            first, share = some[0], ProgramTotals.of(*some)
            ended, day = orjson.dumps([first.status, first.reason or ""]), day_of(first.started_at)
            sums = days.setdefault(day, {})
            for dimension, value in program_keys(first):
                key = (day, dimension, value, ended)
                sums[key] = sums[key].plus(share) if key in sums else share
        for day, sums in days.items():
            self._write_sums(batch, day, sums)

    def _write_calls(self, batch: Batch, calls: list[ProgramCall], rows: list[bytes], now: float) -> None:
        self._place = max(self._place, int(now * 1e6))
        values: list[Value] = [self._most]
        for call, row in zip(calls, rows, strict=True):
            self._place += 1
            fields = [
                each for name in INDEXED if isinstance(value := getattr(call, name), str) for each in (name, value)
            ]
            values += (packed(call.id), row, moment(call.started_at, self._place), len(fields) // 2, *fields)
        batch.call("program_calls", self._key(), *values)
        for parts in ((), *(("by", name) for name in (STARTED, *INDEXED))):
            batch.call("EXPIRE", self._key(*parts), KEPT_FOR)

    def _write_sums(self, batch: Batch, day: str, sums: Mapping[_Ended, ProgramTotals]) -> None:
        values: list[Value] = [MAX_VALUES_PER_DAY, self._key("sums", day) + ":", OTHER]
        for (_, dimension, value, ended), totals in sums.items():
            amounts = [each for place, total in enumerate(totals) if total for each in (place, _amount(total))]
            values += (packed(dimension), part_of(dimension), packed(str(value)), ended, len(amounts) // 2, *amounts)
        batch.call("program_sums", self._key("ends", day), *values)
        enlist(batch, self._key("days"), day, self._key("ends") + ":")
        dimensions = {dimension for _, dimension, _, _ in sums}
        keys = [self._key("ends", day), *(self._key("sums", day, each) for each in dimensions)]
        for key in keys:
            batch.call("EXPIRE", key, KEPT_FOR)

    # -- reading, by anybody -------------------------------------------------------------------------------------------
    def calls(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[ProgramCall]:
        """Matching calls, newest first."""
        wanted = [(ProgramCall._fields.index(name), clean(value)) for name, value in equals.items()]

        def fits(call: ProgramCall) -> bool:
            return (
                all(call[index] == value for index, value in wanted)
                and (since is None or call.started_at >= since)
                and (until is None or call.started_at < until)
            )

        if "id" in equals:
            (row,) = self.connection.read([("HGET", self._key(), packed(clean(equals["id"])))])
            one = None if row is None else call_of(row)
            return [one][:limit] if one is not None and fits(one) else []
        best = next((name for name in COMPARED if name in equals and name in INDEXED), None)
        index, begin = self._key("by", best or STARTED), b"" if best is None else packed(clean(equals[best])) + b"\0"
        first = b"[" + begin + (b"" if since is None else moment_from(since))
        last = b"[" + begin + b"\xff" if until is None else b"(" + begin + moment_from(until)
        needles = [orjson.dumps({name: clean(value)})[1:-1] for name, value in equals.items() if name != best]
        found: list[ProgramCall] = []
        page = _PAGE if limit is None or needles else max(1, min(limit, _PAGE))
        while limit is None or len(found) < limit:
            asked = ("EVAL", FIND, 2, index, self._key(), last, first, page, len(begin) + MOMENT, *needles)
            ((count, end, *rows),) = self.connection.read([asked])
            found += [call for row in rows if (call := call_of(row)) is not None and fits(call)]
            if count < page:
                break
            last = b"(" + end
        return found[:limit]

    def sums(
        self, dimension: str, since_day: str | None, until_day: str | None, value: str | None
    ) -> list[ProgramSums]:
        """Sums per day, value, status and reason, oldest day first."""
        (days,) = self.connection.read([("SMEMBERS", self._key("days"))])
        known = sorted(day.decode() for day in days)
        wanted = [day for day in known if (since_day or "") <= day <= (until_day or "~")]
        dimension, value = carried(dimension), None if value is None else carried(value)
        if not wanted:
            return []
        if value is None:
            rows = self.connection.read([("HGETALL", self._key("sums", day, dimension)) for day in wanted])
            return sorted(sums for day, row in zip(wanted, rows, strict=True) for sums in _sums_of_day(day, row))
        return sorted(sums for day, row in self._sums_of(wanted, dimension, value) for sums in _sums_of_day(day, row))

    def _sums_of(self, days: list[str], dimension: str, value: str) -> Iterable[tuple[str, dict[bytes, bytes]]]:
        """(day, the fields of one value)."""
        pair, end = packed(dimension) + b"\0" + packed(value), b"\0" + packed(value)
        ends = self.connection.read([("HGET", self._key("ends", day), pair) for day in days])
        known = [
            (day, [b"%d" % place + orjson.dumps(each) + end for each in orjson.loads(b"[" + told + b"]")
             for place in range(len(ProgramTotals._fields))])
            for day, told in zip(days, ends, strict=True)
            if told is not None
        ]  # fmt: skip
        commands = [("HMGET", self._key("sums", day, dimension), *fields) for day, fields in known]
        rows = self.connection.read(commands) if commands else []
        for (day, fields), row in zip(known, rows, strict=True):
            yield day, {field: sum for field, sum in zip(fields, row, strict=True) if sum is not None}

    def _key(self, *parts: str) -> str:
        return self.connection.key("programs", *parts)


class PostedPrograms:
    """Its methods are the store's, see `ProgramCalls`."""

    def __init__(self, mailbox: Mailbox, kept: RedisPrograms) -> None:
        self._mailbox = mailbox
        self._asking = Asking(mailbox, kept.connection)
        self._kept = kept

    def append(self, call: ProgramCall) -> None:
        if not self._mailbox.post((Transactions.append_program, call, None)):
            shown = self._kept.connection.shown
            _log.warning("The store %s is closed: the record of a call of %r is lost", shown, call.program)
        self._mailbox.writer.inbox.ease()

    def calls(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[ProgramCall]:
        check_compared(equals)
        self._asking.flush()
        return self._kept.calls(since, until, limit, equals)

    def sums(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[ProgramSums]:
        self._asking.flush()
        return self._kept.sums(dimension, since_day, until_day, value)


def _fit(call: ProgramCall) -> tuple[ProgramCall, bytes] | None:
    """A call that Redis and JSON can carry, and its row; None, and a log, where there is no such."""
    try:
        return call, call_row(call)
    except (TypeError, ValueError):
        cleaned = ProgramCall(*(clean(value) for value in call))
    try:
        return cleaned, call_row(cleaned)
    except (TypeError, ValueError):
        _log.exception("The record of a call of a program cannot be written")
        return None


def _amount(total: int) -> int:
    return max(-_MOST, min(total, _MOST))


def _sums_of_day(day: str, row: Mapping[bytes, bytes]) -> list[ProgramSums]:
    sums: dict[bytes, list[int]] = {}
    for field, amount in row.items():
        sums.setdefault(field[1:], [0] * len(ProgramTotals._fields))[int(field[:1])] = int(amount)
    found = []
    for key, totals in sums.items():
        ended, value = key.split(b"\0", 1)
        status, reason = orjson.loads(ended)
        found.append(ProgramSums(day, unpacked(value), status, reason, ProgramTotals(*totals)))
    return found
