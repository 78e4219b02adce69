"""What is read of an experiment in Redis, from the keys that `trial_steps` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from dspy_prod.stores.redis.asking import named, packed, unpacked
from dspy_prod.stores.redis.trial_writing import CALLS, HALF, metric_part
from dspy_prod.stores.trial_terms import (
    Arm,
    Calls,
    Checkpoint,
    Decision,
    Ended,
    Matured,
    Tally,
    Trial,
    Values,
    Waiting,
)

Look = Callable[[Sequence[tuple[Any, ...]]], list[Any]]
"""Gives the replies of some commands."""

CHECKPOINT: Final = ("checkpoint", "checkpoint_revision", "checkpoint_at")
TALLY: Final = ("units", "mixed", "late", "stray", "unkept", "early", "unpriced", "repeated")
NOTHING: Final = "!"
"""Stands for no metric at all."""
PAGE: Final = 500
"""Units read in one step at the server, which does nothing else meanwhile."""

READ: Final = """
-- Units whose numbers lie between two, and what counts for them; reads only. (metric, from, to) -> {a line of each
-- unit, "number mixed row"; a line of each that has calls, "number sums", or of each value, "number value at"}
local metric, first, last = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local numbers, units, told = {}, {}, {}
for number = first, last do numbers[#numbers + 1] = string.format('%d', number) end
local rows, mixed = redis.call('HMGET', KEYS[1], unpack(numbers)), redis.call('HMGET', KEYS[2], unpack(numbers))
local calls = metric == '*' and redis.call('HMGET', KEYS[3], unpack(numbers)) or {}
for i, number in ipairs(numbers) do
  if rows[i] then units[#units + 1] = number .. ' ' .. (mixed[i] or '0') .. ' ' .. rows[i] end
  if calls[i] then told[#told + 1] = number .. ' ' .. calls[i] end
end
if metric ~= '*' and metric ~= '!' then
  local from, to = string.format('[%s %012d ', metric, first), string.format('(%s %012d!', metric, last)
  for _, id in ipairs(redis.call('ZRANGEBYLEX', KEYS[4], from, to)) do
    local value = redis.call('HGET', KEYS[5], id)
    if value then told[#told + 1] = string.match(id, '^%S* 0*(%d+)') .. ' ' .. value end
  end
end
return {table.concat(units, '\\n'), table.concat(told, '\\n')}
"""


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
    return [Arm(*key, *(each.get(what, 0) for what in (b"u", b"f", b"m", b"e"))) for key, each in sorted(sums.items())]


def ended_of(row: list[bytes]) -> list[Ended]:
    """How calls ended, by arm, of the hash as it is."""
    sums: dict[str, dict[bytes, int]] = {}
    for field, count in zip(row[::2], row[1::2], strict=True):
        what, arm = field.split(b" ", 1)
        sums.setdefault(named(arm), {})[what] = int(count)
    return [Ended(arm, *(each.get(what, 0) for what in (b"c", b"f", b"b", b"a"))) for arm, each in sorted(sums.items())]


def tally_of(row: list[Any], dropped: int) -> Tally:
    """What is in the fields `TALLY`, and what this process had no room for."""
    found = Tally(*(int(each or 0) for each in row))
    return found._replace(unkept=found.unkept + dropped)


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
    for end in range(last, first, -PAGE):
        numbers = range(end, max(first, end - PAGE), -1)
        (rows,) = look([("HMGET", f"{key}:units", *numbers)])
        for number, row in zip(numbers, rows, strict=True):
            if row is not None and float(row.split(b" ", 1)[0]) <= before:
                return number
    return 0


def exposed(look: Look, key: str, first: int, last: int) -> list[Matured]:
    """The units after number `first` up to `last`, with nothing of what became of them."""
    return [_unit(line) for told, _ in _read(look, key, NOTHING, first, last) for line in told.splitlines()]


def waiting(look: Look, key: str, trial: Trial) -> dict[str | None, Waiting]:
    """Who is still waited for, by metric."""
    metrics = list(trial.windows)
    (row,) = look([("HMGET", key, "units", *(f"read {metric_part(metric)}" for metric in metrics))])
    units, *marks = (int(each or 0) for each in row)
    asked = [
        command
        for mark in marks
        for command in (("HGET", f"{key}:units", mark + 1), ("ZSCORE", f"{key}:calling", mark + 1))
    ]
    replies = look(asked)
    found = {}
    for metric, mark, unit, calling in zip(metrics, marks, replies[::2], replies[1::2], strict=True):
        if mark >= units or unit is None:
            found[metric] = Waiting()
        else:
            until = float(unit.split(b" ", 1)[0]) + trial.windows[metric] + trial.grace
            found[metric] = Waiting(units - mark, max(until, float(calling or 0.0)))
    return found


def _read(look: Look, key: str, part: str, first: int, last: int) -> list[Any]:
    keys = [f"{key}:{name}" for name in ("units", "mixed", "calls", "ids", "values")]
    pages = [(begin + 1, min(last, begin + PAGE)) for begin in range(first, last, PAGE)]
    return look([("EVAL", READ, len(keys), *keys, part, *page) for page in pages])


def matured(look: Look, key: str, metric: str | None, first: int, last: int) -> list[Matured]:
    """The units after number `first` up to `last`, which were all told already, so that nothing changes any more."""
    replies = _read(look, key, metric_part(metric), first, last)
    units = [_unit(line) for told, _ in replies for line in told.splitlines()]
    rows = [line.split(b" ") for _, told in replies for line in told.splitlines()]
    if metric is None:
        calls = {int(number): (_calls(sums[:8]), _calls([b"1", *sums[8:]])) for number, *sums in rows}
        return [
            unit._replace(calls=calls[unit.number][0], first_call=calls[unit.number][1])
            if unit.number in calls
            else unit
            for unit in units
        ]
    found: dict[int, list[tuple[float, float]]] = {}
    for number, value, at in rows:
        found.setdefault(int(number), []).append((float(value), float(at)))
    return [unit._replace(values=Values.of(found[unit.number])) if unit.number in found else unit for unit in units]


def _unit(line: bytes) -> Matured:
    number, mixed, at, stage, full, propensity, arm, unit = line.split(b" ")
    return Matured(
        int(number), named(unit), int(stage), named(arm), float(propensity), float(at), int(full), mixed == b"1"
    )


def _calls(sums: list[bytes]) -> Calls:
    calls, failed, fell_back, high, low, timed, latency, unpriced = sums
    nano = int(high) * HALF + int(low)
    return Calls(int(calls), int(failed), int(fell_back), nano, int(timed), float(latency), int(unpriced))
