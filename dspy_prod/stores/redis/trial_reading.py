"""What is read of an experiment in Redis, from the keys that `trial_steps` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from dspy_prod.stores.redis.asking import named, packed, unpacked
from dspy_prod.stores.redis.trial_writing import CALLS, HALF, metric_part
from dspy_prod.stores.trial_terms import Arm, Calls, Checkpoint, Decision, Matured, Tally, Trial, Values

Look = Callable[[Sequence[tuple[Any, ...]]], list[Any]]
"""Gives the replies of some commands."""

CHECKPOINT: Final = ("checkpoint", "checkpoint_revision", "checkpoint_at")
TALLY: Final = ("units", "mixed", "late", "stray", "unkept")
_PAGE: Final = 1_000


def trial_of(name: str, row: list[Any] | None) -> Trial | None:
    """The experiment in the fields `HEAD`; None where there is none."""
    if not row or any(each is None for each in row):
        return None
    declaration, windows, grace, state, stage, since, revision, created = row
    return Trial(
        name, unpacked(declaration), windows_of(windows), float(grace), state.decode(), int(stage), float(since),
        int(revision), float(created),
    )  # fmt: skip


def windows_text(windows: dict[str | None, float]) -> bytes:
    """Windows as JSON."""
    return orjson.dumps({metric_part(metric): float(seconds) for metric, seconds in windows.items()})


def windows_of(text: bytes) -> dict[str | None, float]:
    """The windows in JSON."""
    return {None if metric == CALLS else named(metric): seconds for metric, seconds in orjson.loads(text).items()}


def arms_of(row: list[bytes]) -> list[Arm]:
    """Units by stage, arm and what was full, of the hash as it is."""
    sums: dict[tuple[int, str, int], dict[bytes, int]] = {}
    for field, count in zip(row[::2], row[1::2], strict=True):
        what, stage, full, arm = field.split(b" ", 3)
        sums.setdefault((int(stage), named(arm), int(full)), {})[what] = int(count)
    return [Arm(*key, *(each.get(what, 0) for what in (b"u", b"f", b"m"))) for key, each in sorted(sums.items())]


def tally_of(row: list[Any], dropped: int) -> Tally:
    """What is in the fields `TALLY`, and what this process had no room for."""
    units, mixed, late, stray, unkept = (int(each or 0) for each in row)
    return Tally(units, mixed, late, stray, unkept + dropped)


def checkpoint_of(row: list[Any]) -> Checkpoint | None:
    """What is in the fields `CHECKPOINT`."""
    state, revision, at = row
    return None if state is None else Checkpoint(unpacked(state), int(revision), float(at))


def decision_text(decision: tuple[str, str, str], at: float) -> bytes:
    """A line of the audit as JSON."""
    return orjson.dumps([*decision, at])


def decisions_of(rows: list[bytes]) -> list[Decision]:
    """The lines of the audit."""
    found = []
    for number, row in enumerate(rows, 1):
        what, by, evidence, at = orjson.loads(row)
        found.append(Decision(what, by, evidence, at, number))
    return found


def seen(look: Look, key: str, unit: str) -> str | None:
    """The arm in which a unit was seen last."""
    (number,) = look([("HGET", f"{key}:numbers", packed(unit))])
    if number is None:
        return None
    row, later = look([("HGET", f"{key}:units", number), ("HGET", f"{key}:later", number)])
    if later:
        stages = [line.split(b" ", 2) for line in later.splitlines()]
        return named(max(stages, key=lambda each: int(each[0]))[2])
    return None if row is None else named(row.split(b" ", 5)[4])


def last_over(look: Look, key: str, before: float, first: int, last: int) -> int:
    """The last unit that is over, among those after `first` up to `last`; 0 where there is none."""
    for end in range(last, first, -_PAGE):
        numbers = range(end, max(first, end - _PAGE), -1)
        (rows,) = look([("HMGET", f"{key}:units", *numbers)])
        for number, row in zip(numbers, rows, strict=True):
            if row is not None and float(row.split(b" ", 1)[0]) <= before:
                return number
    return 0


def matured(look: Look, key: str, metric: str | None, first: int, last: int) -> list[Matured]:
    """The units after number `first` up to `last`, which were all told already, so that nothing changes any more."""
    if last <= first:
        return []
    numbers = range(first + 1, last + 1)
    commands: list[tuple[Any, ...]] = [("HMGET", f"{key}:{part}", *numbers) for part in ("units", "mixed")]
    if metric is None:
        commands.append(("HMGET", f"{key}:calls", *numbers))
    else:
        part = metric_part(metric)
        commands.append(("ZRANGEBYLEX", f"{key}:ids", f"[{part} {first + 1:012d} ", f"({part} {last:012d}!"))
    units, mixed, more = look(commands)
    values = {} if metric is None else _values(look, key, more)
    calls = more if metric is None else [None] * len(numbers)
    return [
        _with_calls(_unit(number, unit, out)._replace(values=values.get(number, Values())), sums)
        for number, unit, out, sums in zip(numbers, units, mixed, calls, strict=True)
        if unit is not None
    ]


def _unit(number: int, row: bytes, mixed: bytes | None) -> Matured:
    at, stage, full, propensity, arm, unit = row.split(b" ", 5)
    return Matured(
        number, unpacked(unit), int(stage), named(arm), float(propensity), float(at), int(full), mixed == b"1"
    )


def _with_calls(unit: Matured, row: bytes | None) -> Matured:
    if row is None:
        return unit
    sums = [float(each) for each in row.split(b" ")]
    return unit._replace(calls=_calls(sums[:7]), first_call=_calls([1, *sums[7:]]))


def _calls(sums: list[float]) -> Calls:
    calls, failed, fell_back, high, low, timed, latency = sums
    return Calls(int(calls), int(failed), int(fell_back), int(high) * HALF + int(low), int(timed), latency)


def _values(look: Look, key: str, fields: list[bytes]) -> dict[int, Values]:
    if not fields:
        return {}
    found: dict[int, list[tuple[float, float]]] = {}
    (rows,) = look([("HMGET", f"{key}:values", *fields)])
    for field, row in zip(fields, rows, strict=True):
        if row is not None:
            value, at = row.split(b" ")
            found.setdefault(int(field.split(b" ", 2)[1]), []).append((float(value), float(at)))
    return {number: Values.of(values) for number, values in found.items()}
