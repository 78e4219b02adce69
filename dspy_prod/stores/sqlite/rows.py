"""Between the core's objects and SQLite's rows."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any, Final

import orjson

from dspy_prod.options import Budget
from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.holds import Drawn, Hold
from dspy_prod.stores.base import AccountState, Terms

Row = tuple[Any, ...]

RECORD_COLUMNS: Final = ", ".join(f'"{name}"' for name in CallRecord._fields)

_TAGS: Final = CallRecord._fields.index("tags")
_ACCOUNTS: Final = CallRecord._fields.index("accounts")
_FLAGS: Final = tuple(CallRecord._fields.index(name) for name in ("estimated", "cached"))
_WHOLE: Final = ((int, type(None)), None)
_REAL: Final = ((float, int), 0.0)
_NUMBERS: Final = tuple(
    (CallRecord._fields.index(name), *kinds)
    for name, kinds in {
        **dict.fromkeys(("started_at", "latency", "waited"), _REAL),
        "attempt": ((int,), 0),
        **dict.fromkeys(("cost_nano", "status", "saved_nano"), _WHOLE),
        **dict.fromkeys(("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"), _WHOLE),
    }.items()
)
"""Fields that hold numbers: where, of which types, and what a damaged one is taken for."""
_MOST: Final = 2**53
_OLD_DEBIT: Final = 5


def record_row(ns: int, record: CallRecord) -> Row:
    """A record as a row of `records`, after the namespace."""
    row: list[Any] = [ns, *record]
    row[1 + _TAGS] = orjson.dumps(dict(record.tags)).decode() if record.tags else None
    row[1 + _ACCOUNTS] = _names(record.accounts) if record.accounts else None
    return tuple(row)


def record_of(row: Row) -> CallRecord:
    """The record in a row of `RECORD_COLUMNS`."""
    values = list(row)
    tags = values[_TAGS]
    values[_TAGS] = tuple(_loaded(tags, dict).items()) if tags else ()
    values[_ACCOUNTS] = _listed(values[_ACCOUNTS])
    for index in _FLAGS:
        values[index] = bool(values[index])
    for index, kinds, otherwise in _NUMBERS:
        if type(values[index]) not in kinds:  # damaged: what is known of the call is still shown
            values[index] = otherwise
    if bytes in map(type, values):
        values = [value.decode("utf-8", "replace") if type(value) is bytes else value for value in values]
    return CallRecord(*values)


def hold_row(ns: int, owner: str, hold: Hold) -> Row:
    """A hold as a row of `holds`."""
    debit = debit_json(hold)
    accounts, stub = _names(hold.accounts), stub_json(hold.stub)
    return ns, hold.id, owner, hold.lease_until, hold.amount, accounts, hold.limit_key, debit, stub


def debit_json(hold: Hold) -> bytes | None:
    """The debit of one call, or what makes the hold one for several."""
    if hold.drawn is not None:
        return orjson.dumps(asdict(hold.drawn))
    return None if hold.debit is None else orjson.dumps(hold.debit)


def hold_of(row: Row) -> Hold:
    """The hold in (id, ends_at, amount, accounts, limit_key, debit, stub)."""
    id, ends_at, amount, accounts, limit_key, debit, stub = row
    taken: Any = None if debit is None else _loaded(debit, list) or None
    drawn = None if debit is None or taken is not None else _drawn(_loaded(debit, dict))
    if taken is not None and len(taken) == _OLD_DEBIT:
        taken.append(0)  # of an earlier release, whose limiters are begun anew
    try:
        record = None if stub is None else CallRecord.from_dict({"cost_nano": None, **_loaded(stub, dict)})
    except (TypeError, ValueError, AttributeError):
        record = None
    return Hold(id, _listed(accounts), amount, limit_key, taken, ends_at, record, drawn)


def _drawn(found: dict[str, Any]) -> Drawn | None:
    values = [value for name in Drawn.__dataclass_fields__ if isinstance(value := found.get(name), int)]
    return Drawn(*values) if len(values) == len(Drawn.__dataclass_fields__) else None


def _loaded(text: Any, kind: type[Any]) -> Any:
    """What a column of JSON holds; nothing where it is damaged, for one row must not stop all others."""
    try:
        value = orjson.loads(text)
    except (TypeError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _listed(text: Any) -> tuple[str, ...]:
    return tuple(_loaded(text, list)) if text else ()


TERMS: Final = "built, in_force, revision"


def terms_row(ns: int, terms: Terms) -> Row:
    """The terms of a budget as a row of `budgets`."""
    built, in_force, revision = terms
    return ns, carried(in_force.title), built.model_dump_json(), in_force.model_dump_json(), revision


def terms_of(row: Row) -> Terms | None:
    """The terms in a row of `TERMS`, by name because another version may have written them.

    None where that wrote what this one does not understand: an account is then held to its caller's own limit.
    """
    built, in_force, revision = row
    if type(revision) is not int:
        return None
    try:
        return Terms(_budget(built), _budget(in_force), revision)
    except (ValueError, TypeError, AttributeError):
        return None


@lru_cache(maxsize=1000)
def _budget(text: str) -> Budget:
    return Budget(**{name: value for name, value in orjson.loads(text).items() if name in Budget.model_fields})


def stub_json(stub: CallRecord | None) -> bytes | None:
    """A stub record as JSON, by field name because the hold may be read by another version."""
    if stub is None:
        return None
    return orjson.dumps({name: value for name, value in stub._asdict().items() if value is not None})


@lru_cache(maxsize=1024)
def _names(names: tuple[str, ...]) -> str | None:
    return orjson.dumps(names).decode() if names else None


def clean(value: Any) -> Any:
    """A value that SQLite and JSON can carry, as near to the original as possible."""
    if isinstance(value, str):
        return carried(value)
    if isinstance(value, int):
        return min(max(int(value), -_MOST), _MOST)
    if value is None or isinstance(value, float | bytes):
        return value
    if isinstance(value, dict):
        return {carried(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(clean(item) for item in value)
    return carried(str(value))


def account_of(key: str, row: Row) -> AccountState:
    """What an account holds.

    Raises:
        ValueError: a damaged or changed file has something else than numbers there: what is spent is not known.
    """
    if not all(type(number) is int for number in row):
        raise ValueError(f"the account {key!r} holds what is no number; correct it, or begin a new file")
    return AccountState(*row)


def clean_record(record: CallRecord) -> CallRecord:
    """`clean` for every field of a record."""
    return CallRecord(*(clean(value) for value in record))


def clean_hold(hold: Hold) -> Hold:
    """`clean` for every field of a hold."""
    stub = None if hold.stub is None else clean_record(hold.stub)
    debit, key = clean(hold.debit), clean(hold.limit_key)
    return Hold(clean(hold.id), clean(hold.accounts), clean(hold.amount), key, debit, hold.lease_until, stub)


def text_of(value: Any) -> str:
    """A name; one that is damaged can still be shown."""
    if type(value) is str:
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
