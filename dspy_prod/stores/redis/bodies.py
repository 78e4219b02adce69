"""Between records and the JSON that Redis keeps of them: by the names of fields, so that another release reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, Final

import orjson

from dspy_prod.records import CallRecord
from dspy_prod.stores.memory_rows import TAG
from dspy_prod.stores.sqlite.pages import equal
from dspy_prod.stores.sqlite.rows import clean_record

SELECTIVE: Final = (
    *("call_id", "trace_id", "session", "user", "tenant", "run", "prompt_version", "variant", "experiment"),
    *("program", "model", "outcome"),
)
"""Fields by whose values records are found, the same as in `ledger.lua`."""

SUMMED: Final = ("cost_nano", "saved_nano", "input_tokens", "output_tokens")
"""Fields whose numbers are added up."""

_MOST: Final = 2**53
"""Whole numbers beyond this are not exact everywhere they go."""

_OMITTED: Final[dict[str, Any]] = {**CallRecord._field_defaults, "cost_nano": None}
_NAMES: Final = CallRecord._fields
_IF: Final = tuple(_OMITTED.get(name, _OMITTED) for name in _NAMES)  # no value equals what stands for "always"
_TEXTS: Final = itemgetter(*map(_NAMES.index, ("id", *SELECTIVE)))
_SUMMED: Final = itemgetter(*map(_NAMES.index, SUMMED))
_REAL: Final = (float, int)


def fitting(record: CallRecord) -> CallRecord:
    """The record as it can be kept: itself, where JSON and the sums can carry all of its values."""
    exact = all(number is None or (type(number) is int and -_MOST <= number <= _MOST) for number in _SUMMED(record))
    if exact and not {*map(type, _TEXTS(record))} - {str, type(None)}:
        try:
            orjson.dumps(tuple(record))
            return record
        except TypeError:  # halves of characters, objects
            pass
    fit = clean_record(record)._asdict()
    fit |= {name: str(fit[name]) for name in ("id", *SELECTIVE) if fit[name] is not None}
    fit |= {name: fit[name] if type(fit[name]) is int else None for name in SUMMED}
    fit |= {name: bool(fit[name]) for name in ("estimated", "cached")}
    return CallRecord(**fit)


def body_of(record: CallRecord) -> bytes:
    """A record as JSON, without what is as it is most often.

    Raises:
        TypeError: a value that JSON cannot carry, see `fitting`.
    """
    return orjson.dumps({name: value for name, value, usual in zip(_NAMES, record, _IF, strict=True) if value != usual})


def loaded(body: bytes | None) -> dict[str, Any] | None:
    """The fields in a value of `rows`, after the day on which it came; None where it is gone or damaged."""
    if body is None:
        return None
    try:
        fields = orjson.loads(body.partition(b"|")[2])
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("started_at"), _REAL) else None


def record_of(fields: Mapping[str, Any]) -> CallRecord | None:
    """The record with these fields; None where one is missing."""
    known = {**_OMITTED, **fields}
    try:
        known["tags"] = tuple((name, text) for name, text in known["tags"])
        known["accounts"] = tuple(known["accounts"])
        known["latency"], known["waited"] = known["latency"] or 0.0, known["waited"] or 0.0
        return CallRecord._make(map(known.__getitem__, _NAMES))
    except (KeyError, TypeError, ValueError):
        return None


def matches(fields: Mapping[str, Any], wanted: Iterable[tuple[str, str]]) -> bool:
    """Whether the fields have these values."""
    for name, value in wanted:
        if name.startswith(TAG):
            if [name.removeprefix(TAG), value] not in map(list, fields.get("tags") or ()):
                return False
        elif not equal(fields[name] if name in fields else _OMITTED.get(name), value):
            return False
    return True
