"""Between the core's objects and what Redis keeps of them, which is JSON: other versions may read it."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any, Final

import orjson

from dspy_prod.options import Budget, RateLimit
from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.holds import Drawn, Hold
from dspy_prod.stores.base import Terms

_MOST: Final = 2**53
_DRAWN: Final = tuple(Drawn.__dataclass_fields__)


def packed(value: Any) -> bytes:
    """JSON of a value, as near to it as JSON can carry."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(_fit(value))


def _fit(value: Any) -> Any:
    if isinstance(value, str):
        return carried(value)
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return min(max(value, -_MOST), _MOST)
    if isinstance(value, dict):
        return {carried(str(key)): _fit(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fit(item) for item in value]
    return carried(str(value))


def hold_json(hold: Hold) -> bytes:
    """A hold, without its id."""
    stub = hold.stub
    told = None if stub is None else {name: value for name, value in stub._asdict().items() if value is not None}
    drawn = None if hold.drawn is None else asdict(hold.drawn)
    return packed([hold.amount, hold.accounts, hold.limit_key, hold.debit, told, drawn])


def hold_of(id: bytes, text: bytes) -> Hold | None:
    """The hold that was kept under an id; None where it is damaged."""
    try:
        amount, accounts, limit_key, debit, told, drawn = orjson.loads(text)
        part = None if drawn is None else Drawn(**{name: int(drawn[name]) for name in _DRAWN})
        taken = None if debit is None else tuple(debit)
        name = id.decode("utf-8", "replace")
        return Hold(name, tuple(accounts), int(amount), limit_key, taken, 0.0, _record(told), part)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _record(told: Any) -> CallRecord | None:
    try:
        return None if told is None else CallRecord.from_dict({"cost_nano": None, **told})
    except (TypeError, ValueError, AttributeError):
        return None


def terms_json(terms: Terms) -> bytes:
    """The terms of a budget."""
    built, in_force, revision = terms
    return packed([built.model_dump(mode="json"), in_force.model_dump(mode="json"), revision])


@lru_cache(maxsize=1000)
def terms_of(text: bytes) -> Terms | None:
    """The terms that were kept; None where another version wrote what this one does not understand."""
    try:
        built, in_force, revision = orjson.loads(text)
        return Terms(_budget(built), _budget(in_force), int(revision))
    except (ValueError, TypeError, AttributeError):
        return None


def _budget(told: dict[str, Any]) -> Budget:
    return Budget(**{name: value for name, value in told.items() if name in Budget.model_fields})


@lru_cache(maxsize=1024)
def limit_json(limit: RateLimit) -> bytes:
    """The settings of a limiter."""
    return limit.model_dump_json().encode()


@lru_cache(maxsize=1024)
def limit_of(text: bytes) -> RateLimit:
    """The settings that a limiter was used with last."""
    try:
        return RateLimit.model_validate_json(text)
    except ValueError:  # of another version
        return RateLimit()
