"""The calls of whole programs, for people: records, and how many ended how, read from sums per day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.records import NANO, OTHER, called
from dspy_prod.status.listed import when
from dspy_prod.stores.programs import DIMENSIONS, ProgramCall, ProgramSums, ProgramTotals
from dspy_prod.telemetry.tap import Frozen
from dspy_prod.views import Cell, ShownList, Table, frame

if TYPE_CHECKING:
    import pandas


class ProgramRecords(ShownList[ProgramCall]):
    """Calls of programs, in the order in which they were asked for."""

    def to_frame(self) -> pandas.DataFrame:
        """A row for each call: the fields of `ProgramCall`, `cost_usd`, `list_cost_usd`, a column for each tag.

        `started_at` is a time in UTC; a cost that is not known is missing, never zero.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows = [{**call.to_dict(), **{f"tag:{name}": value for name, value in call.tags}} for call in self]
        tags = dict.fromkeys(f"tag:{name}" for call in self for name, _ in call.tags)
        fields = [name for name in ProgramCall._fields if name != "tags"]
        found = frame(
            [{name: value for name, value in row.items() if name != "tags"} for row in rows],
            [*fields, "cost_usd", "list_cost_usd", *tags],
        )
        at = (found.started_at.astype(float) * 1e6).round().astype("int64")
        return found.assign(started_at=at.astype("datetime64[us]").dt.tz_localize("UTC"))

    def table(self, title: str) -> Table:
        """When, what, how it ended and what it cost, as a table with this title."""
        columns = ("when, user", "program and id", "how it ended", "USD", "seconds")
        return Table(title, columns, map(_row, self), numbers=2)

    def _view(self) -> Table:
        return self.table(f"{len(self):,} {'call' if len(self) == 1 else 'calls'} of programs")


class ProgramRow(Frozen):
    """How the calls of programs ended that have one value in common.

    Attributes:
        value: the day, program, variant, ... they have in common.
        rest: the row collects values beyond the number a store keeps apart per day; its value is `"(other)"`.
        calls: all of them.
        ok, cached, fallback, refused, error, abandoned: those that ended so, as in `ProgramCall.status`.
        reasons: reason → how many fallbacks, refusals and errors had it.
        error_rate: share that raised (`refused` and `error`) of those that nobody abandoned; None without any.
        fallback_rate: the same of `fallback`.
        usd, list_usd: known cost and list cost. unknown_cost, unknown_list: calls of which it is not known.
        attempts: requests sent upstream.
        seconds: mean from call to end.
    """

    value: str
    calls: int
    ok: int
    cached: int
    fallback: int
    refused: int
    error: int
    abandoned: int
    reasons: dict[str, int]
    error_rate: float | None
    fallback_rate: float | None
    usd: float
    list_usd: float
    unknown_cost: int
    unknown_list: int
    attempts: int
    seconds: float
    rest: bool = False


class ProgramRows(ShownList[ProgramRow]):
    """How calls ended, for each value of a dimension.

    Attributes:
        by: the dimension.
    """

    def __init__(self, rows: Iterable[ProgramRow] = (), by: str = "program") -> None:
        super().__init__(rows)
        self.by = by

    def to_frame(self) -> pandas.DataFrame:
        """A row for each value, in the column that is called like the dimension; `reasons` are left out.

        Raises:
            ConfigError: pandas is not installed.
        """
        columns = [name for name in ProgramRow.model_fields if name not in ("value", "rest", "reasons")]
        rows = [{self.by: row.value, **{name: getattr(row, name) for name in columns}} for row in self]
        return frame(rows, [self.by, *columns])

    def table(self, title: str) -> Table:
        """How many ended how, as a table with this title."""
        counts = ("calls", "ok", "cached", "fallback", "refused", "error", "abandoned")
        columns = (self.by, *counts, "errors %", "fallbacks %", "list USD", "seconds")
        rows = [
            (
                Cell(row.value, below=(", ".join(f"{count} {name}" for name, count in row.reasons.items()) or None,)),
                *(Cell(str(getattr(row, name)), number=True) for name in counts),
                *(Cell("" if rate is None else f"{100 * rate:.1f}", number=True) for rate in _rates(row)),
                Cell(f"{row.list_usd:.6f}", number=True),
                Cell(f"{row.seconds:.2f}", number=True),
            )
            for row in self
        ]
        return Table(title, columns, rows, numbers=len(columns) - 1)

    def _view(self) -> Table:
        return self.table(f"Calls by {self.by}")


def check_program_dimension(by: str) -> None:
    """Refuse an unknown dimension by name."""
    if by == "day" or by in DIMENSIONS or (isinstance(by, str) and by.startswith("tag:") and len(by) > 4):
        return
    choices = ", ".join(map(repr, ("day", *DIMENSIONS, "tag:<key>")))
    raise ConfigError(f"programs(by={by!r}): use one of {choices}")


def program_rows(sums: Iterable[ProgramSums], by: str) -> ProgramRows:
    """Rows of sums: of days in order, of any other dimension the one with most calls first."""
    values: dict[str, list[ProgramSums]] = {}
    for each in sums:
        values.setdefault(each.day if by == "day" else each.value, []).append(each)
    rows = [_summed(value, some) for value, some in values.items()]
    return ProgramRows(rows if by == "day" else sorted(rows, key=lambda row: (-row.calls, row.value)), by)


_ENDS: Final = ("ok", "cached", "fallback", "refused", "error", "abandoned")


def _summed(value: str, some: Sequence[ProgramSums]) -> ProgramRow:
    ends, reasons, whole = dict.fromkeys(_ENDS, 0), dict[str, int](), ProgramTotals()
    for each in some:
        ends[each.status] = ends.get(each.status, 0) + each.totals.calls
        if each.reason:
            reasons[each.reason] = reasons.get(each.reason, 0) + each.totals.calls
        whole = whole.plus(each.totals)
    stayed = whole.calls - ends["abandoned"]
    return ProgramRow(
        value=called(value),
        rest=value == OTHER,
        calls=whole.calls,
        **{name: ends[name] for name in _ENDS},
        reasons=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        error_rate=(ends["refused"] + ends["error"]) / stayed if stayed else None,
        fallback_rate=ends["fallback"] / stayed if stayed else None,
        usd=whole.cost_nano / NANO,
        list_usd=whole.list_nano / NANO,
        unknown_cost=whole.unknown_cost,
        unknown_list=whole.unknown_list,
        attempts=whole.attempts,
        seconds=whole.latency_us / 1e6 / whole.calls if whole.calls else 0.0,
    )


def _rates(row: ProgramRow) -> tuple[float | None, float | None]:
    return row.error_rate, row.fallback_rate


def _row(call: ProgramCall) -> tuple[Any, ...]:
    variant = None if call.variant is None else f"{call.experiment or ''}/{call.variant}"
    version = None if call.prompt_version is None else f"prompt {call.prompt_version}"
    usd = "unknown" if call.cost_usd is None else f"{call.cost_usd:.6f}"
    return (
        Cell(when(call.started_at), below=(call.user,)),
        Cell(call.program, below=(call.id, variant, version, call.trace_id)),
        Cell(call.status, below=(call.reason, call.error)),
        Cell(usd, below=(f"{call.attempts} sent, {call.cached} cached",), number=True),
        Cell(f"{call.latency:.2f}", number=True),
    )
