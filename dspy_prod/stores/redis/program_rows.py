"""Between a `ProgramCall` and what Redis keeps of it, see `program_steps`."""

from __future__ import annotations

import logging
import struct
from math import isfinite
from typing import Any, Final

import orjson

from dspy_prod.stores.programs import ProgramCall, ProgramTotals

_log = logging.getLogger("dspy_prod")

_FIELDS: Final = frozenset(ProgramCall._fields)
_NEEDED: Final = ("id", "started_at", "program", "status")
_UNKNOWN: Final = ("cost_nano", "list_nano")
"""Fields whose None is something else than what they are by default."""
_SIGN: Final = 1 << 63


def call_row(call: ProgramCall) -> bytes:
    """A call as JSON, by the names of its fields because another version may read it.

    Raises:
        ValueError, TypeError: something in it fits no JSON, or is no number.
    """
    if not (isfinite(call.started_at) and isfinite(call.latency) and isfinite(call.waited)):
        raise ValueError("started_at, latency and waited must be finite numbers")
    if not (isinstance(call.id, str) and isinstance(call.program, str)):
        raise TypeError("id and program must be text")
    ProgramTotals.of(call)
    row: dict[str, Any] = {
        name: value for name, value in call._asdict().items() if value is not None or name in _UNKNOWN
    }
    return orjson.dumps({**row, "tags": dict(call.tags)})


def call_of(row: bytes) -> ProgramCall | None:
    """The call in a row; None, and a log, where that is damaged."""
    try:
        found = {name: value for name, value in orjson.loads(row).items() if name in _FIELDS}
        if all(found.get(name) is not None for name in _NEEDED):
            tags = tuple((str(name), str(value)) for name, value in (found.pop("tags", None) or {}).items())
            return ProgramCall(**found, tags=tags)
    except (ValueError, TypeError, AttributeError):
        pass
    _log.warning("A record of a call of a program is damaged and passed over")
    return None


def moment(at: float, place: int) -> bytes:
    """A moment, and a place among those of the same one, as text that sorts as they do."""
    return b"%b%016x" % (moment_from(at), place)


def moment_from(at: float) -> bytes:
    """Where the moments from this one on begin."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", at + 0.0))
    return b"%016x" % (bits ^ _SIGN if bits < _SIGN else ~bits & (2 * _SIGN - 1))
