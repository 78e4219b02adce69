"""Finding records: rows and hits as one, by the field that has the fewest for a value."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from math import inf
from operator import itemgetter
from typing import Any, Final, TypeVar

from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.memory_ledger import check_fields
from dspy_prod.stores.redis.bodies import SELECTIVE, loaded, matches
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.hits import SPREAD, Found, found_in, found_loose
from dspy_prod.stores.redis.ledger_keys import LedgerKeys
from dspy_prod.stores.sqlite.rows import clean

T = TypeVar("T")
Command = tuple[Any, ...]
Asking = Generator[list[Command], list[Any], T]
"""Yields commands, is sent their replies, and returns what it found."""

_LEAST: Final = 32
_MOST: Final = 1_000
"""Rows that are read at once."""
_PAGES: Final = 32
"""Pages that are read at once, at most."""


def read_records(
    connection: Connection,
    keys: LedgerKeys,
    since: float | None,
    until: float | None,
    limit: int | None,
    equals: Mapping[str, str],
) -> list[CallRecord]:
    """Matching records, newest first; of the same moment, the one with the larger id first."""
    check_fields(equals)
    wanted = {carried(name): str(clean(value)) for name, value in equals.items()}  # a tag's name is anybody's, too
    if limit is not None and limit <= 0:
        return []
    hits, rows = together(
        connection, _hits(keys, since, until, limit, wanted), _rows(keys, since, until, limit, wanted)
    )
    by_id = {found.id: found for found in (*hits, *rows)}  # a hit may have become a row meanwhile
    newest = sorted(by_id.values(), key=itemgetter(0, 1), reverse=True)
    records = [found.record() for found in newest[:limit]]
    return [record for record in records if record is not None]


def find_record(connection: Connection, keys: LedgerKeys, id: str) -> CallRecord | None:
    """The record with this id."""
    found = read_records(connection, keys, None, None, 1, {"id": id})
    return found[0] if found else None


def together(connection: Connection, *asking: Asking[T]) -> list[T]:
    """What each finds; what they ask at the same time is one round trip."""
    results: dict[int, T] = {}
    sent: dict[int, list[Any] | None] = dict.fromkeys(range(len(asking)))
    while sent:
        commands: dict[int, list[Command]] = {}
        for index, replies in sent.items():
            try:
                commands[index] = asking[index].send(replies) if replies is not None else next(asking[index])
            except StopIteration as stopped:
                results[index] = stopped.value
        flat = [command for some in commands.values() for command in some]
        replies, sent = connection.read(flat) if flat else [], {}
        start = 0
        for index, some in commands.items():
            sent[index] = replies[start : start + len(some)]
            start += len(some)
    return [results[index] for index in range(len(asking))]


def _rows(
    keys: LedgerKeys, since: float | None, until: float | None, limit: int | None, wanted: Mapping[str, str]
) -> Asking[list[Found]]:
    pairs = list(wanted.items())

    def kept(bodies: Sequence[bytes | None]) -> list[Found]:
        rows = [fields for fields in map(loaded, bodies) if fields is not None and matches(fields, pairs)]
        found = [Found(fields["started_at"], str(fields.get("id")), fields) for fields in rows]
        return [row for row in found if (since is None or row[0] >= since) and (until is None or row[0] < until)]

    if "id" in wanted:
        ((body,),) = yield [("HMGET", keys.rows, wanted["id"])]
        return kept([body])
    names = [name for name in SELECTIVE if name in wanted]
    key, at = yield from _fewest([keys.by(name, wanted[name]) for name in names] or [keys.at], since, until)
    found: dict[str, Found] = {}
    step = _MOST if limit is None else min(_MOST, limit if len(wanted) < 2 else max(_LEAST, 2 * limit))
    while limit is None or len(found) < limit:
        (ids,) = yield [("ZREVRANGE", key, at, at + step - 1)]
        last: dict[str, Any] | None = None
        if ids:
            (bodies,) = yield [("HMGET", keys.rows, *ids)]
            found.update((row.id, row) for row in kept(bodies))
            last = loaded(bodies[-1])
        if len(ids) < step or (since is not None and last is not None and last["started_at"] < since):
            break
        at, step = at + step, min(_MOST, max(_LEAST, 2 * step))
    return list(found.values())


def _hits(
    keys: LedgerKeys, since: float | None, until: float | None, limit: int | None, wanted: Mapping[str, str]
) -> Asking[list[Found]]:
    pairs = list(wanted.items())
    names = [name for name in ("id", *SELECTIVE) if name in wanted]
    end = None if until is None else until + SPREAD
    key, at = yield from _fewest([keys.paged_by(name, wanted[name]) for name in names] or [keys.paged], since, end)
    step, begun, rest = 1, False, inf
    found: dict[str, Found] = {}
    while limit is None or len(found) < limit or sorted(map(itemgetter(0), found.values()))[-limit] <= rest:
        commands: list[Command] = [("ZREVRANGE", key, at, at + step, "WITHSCORES")]
        replies = yield commands if begun else [*commands, ("HVALS", keys.loose)]  # loose ones first: they become pages
        if not begun:
            found.update((hit.id, hit) for hit in found_loose(replies[1], pairs, since, until))
        begun = True
        scored = [(number, score) for number, score in _scored(replies[0]) if since is None or score >= since]
        numbers = [number for number, _ in scored[:step]]
        if numbers:
            bodies, gone = yield [("HMGET", keys.page, *numbers), ("HMGET", keys.gone, *numbers)]
            for body, hidden in zip(bodies, gone, strict=True):
                found.update((hit.id, hit) for hit in found_in(body, hidden, pairs, since, until))
        if len(scored) <= step:
            break
        rest = scored[step][1]
        at, step = at + step, min(_PAGES, 2 * step)
    return list(found.values())


def _fewest(keys: Sequence[str], since: float | None, until: float | None) -> Asking[tuple[str, int]]:
    """The sorted set that has the fewest between two moments, and how many of it come after them."""
    if len(keys) == 1 and until is None:
        return keys[0], 0
    low, high = "-inf" if since is None else repr(since), "+inf" if until is None else f"({until!r}"
    counts = yield [("ZCOUNT", key, low, high) for key in keys]
    key = min(zip(counts, keys, strict=True))[1]
    if until is None:
        return key, 0
    (after,) = yield [("ZCOUNT", key, repr(until), "+inf")]
    return key, after


def _scored(reply: Sequence[Any]) -> list[tuple[bytes, float]]:
    """(member, score) pairs, in either version of the protocol."""
    if not reply or isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]
