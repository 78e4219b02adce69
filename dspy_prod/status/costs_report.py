"""What was spent, by whom and for what, as a report of its own: an HTML file with charts and tables.

Made from the ledger's daily sums, never from its records, so it takes no longer when more calls were made.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.names import bare_url
from dspy_prod.records import NANO, OTHER, ROLLUP_DIMENSIONS, Totals, called
from dspy_prod.runtime.clock import Clock
from dspy_prod.status.costs import check_dimension, check_written, cost_row
from dspy_prod.status.spending import CostRow, CostRows
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory_ledger import day_of
from dspy_prod.views import Cell, Page, Shown, Table, usd
from dspy_prod.views.charts import COLOURS, Bars, Layer
from dspy_prod.views.document import document

DIMENSIONS: Final = ("model", "prompt", "user", "tenant", "variant", "program")
"""What a report shows unless it is told otherwise."""
DAYS: Final = 30
"""Days that a report goes back unless it is told otherwise, with today."""
MOST_DAYS: Final = 92
"""Days up to which there is a bar for each; longer reports have one for each week, then for each month."""
MOST_WEEKS: Final = 104

_NAMES: Final = {"prompt": "version"}
_DAY: Final = dt.timedelta(days=1)


@dataclass(frozen=True)
class CostsReport(Shown):
    """What a store and namespace has spent.

    Attributes:
        namespace: of the ledger; `store`: its URL, without a password.
        since, until: the first and the last day, in UTC.
        total: all calls of these days.
        days: USD by day, empty days included.
        by: of each dimension, the sums of its values, the dearest first; calls without a value are in none.
        daily: of each dimension, USD by value and day.
    """

    store: str
    namespace: str
    since: dt.date
    until: dt.date
    total: CostRow
    days: Mapping[dt.date, float]
    by: Mapping[str, CostRows]
    daily: Mapping[str, Mapping[str, Mapping[dt.date, float]]]

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one HTML file, which loads nothing and runs nothing; also written to `path`, if given."""
        text = document(f"Costs in {self.namespace}, {self.since} to {self.until}", self._view())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "store": self.store,
            "namespace": self.namespace,
            "since": str(self.since),
            "until": str(self.until),
            "total": self.total.model_dump(mode="json"),
            "days": {str(day): spent for day, spent in self.days.items()},
            "by": {name: [row.model_dump(mode="json") for row in rows] for name, rows in self.by.items()},
        }

    def _view(self) -> Page:
        charts = [self._bars(name) for name in self.by if self.by[name]]
        none = [_NAMES.get(name, name) for name in self.by if not self.by[name]]
        parts: list[Table | Bars | str] = [self._summary(), *charts]
        parts += [self._table(name) for name in self.by if self.by[name]]
        if none:
            parts.append(f"No call of these days has a {' or a '.join(none)}.")
        parts.append(
            "Each chart shows the dearest values by themselves and all others as (other); (none) are calls that have "
            "no such value. Days are those of UTC. Cost includes retries and fallbacks; unconfirmed cost is an upper "
            "bound, because the provider did not tell what it charged."
        )
        return Page(*parts)

    def _summary(self) -> Table:
        total, days = self.total, len(self.days)
        unknown = (f"{total.unknown_cost:,} attempts more, whose cost is not known",) if total.unknown_cost else ()
        return Table(
            "Summary",
            ("", ""),
            [
                ("spent", Cell(f"{total.usd:.6f} USD", "strong", unknown)),
                ("of it unconfirmed", f"{total.unconfirmed_usd:.6f} USD"),
                ("a day, on average", f"{total.usd / days if days else 0.0:.6f} USD"),
                ("attempts upstream", f"{total.attempts:,}"),
                ("of them failed", f"{total.failed:,}"),
                ("answers from the cache", f"{total.cached:,}"),
                ("tokens in, out", f"{total.input_tokens:,}, {total.output_tokens:,}"),
                ("ledger", f"{self.store}, namespace {self.namespace!r}"),
            ],
        )

    def _table(self, dimension: str) -> Table:
        rows = self.by[dimension]
        rest = self.total.usd - fsum(row.usd for row in rows)
        table = rows.table(f"Costs by {_NAMES.get(dimension, dimension)}")
        notes = [f"{usd(rest).text} USD more are of calls without one."] if rest > 5e-10 else []
        if any(row.rest for row in rows):
            notes.append("(other) are values beyond those that the ledger keeps apart in a day.")
        return Table(table.title, table.columns, table.rows, " ".join(notes), table.numbers, table.last)

    def _bars(self, dimension: str) -> Bars:
        label, spans = _spans(list(self.days))
        daily, rows = self.daily[dimension], self.by[dimension]
        named = [row for row in rows if not row.rest]
        alone, rest = named[: len(COLOURS)], [*named[len(COLOURS) :], *(row for row in rows if row.rest)]
        layers = [Layer(_told(row), _summed([daily[_key(row)]], spans)) for row in alone]
        if rest:
            many = sum(not row.rest for row in rest)
            note = f"{many:,} more" if many else "beyond those that the ledger keeps apart"
            layers.append(Layer(OTHER, _summed([daily[_key(row)] for row in rest], spans), True, note))
        bare = _summed([self.days], spans)
        left = [
            max(0.0, whole - fsum(given)) for whole, *given in zip(bare, *(each.values for each in layers), strict=True)
        ]
        if fsum(left) > 5e-10:
            layers.append(Layer("(none)", [value if value > 5e-10 else 0.0 for value in left], True))
        name = _NAMES.get(dimension, dimension)
        return Bars(f"Cost per {label} by {name}", [str(each[0]) for each in spans], layers)


def report(
    store: Store,
    clock: Clock,
    *,
    since: dt.date | dt.timedelta | None = None,
    by: Sequence[str] | None = None,
) -> CostsReport:
    """The costs of a store and namespace.

    Args:
        store: where they are kept. clock: whose day is today.
        since: the first day (UTC), or so long ago; default: the last 30 days with today.
        by: dimensions, as `LM.costs(by=...)` takes them, except `"day"`.

    Raises:
        ConfigError: an unknown dimension. TypeError: a `since` that tells no day.
        StoreUnavailableError: some records could not be written yet, so the sums would be too low.
    """
    dimensions = [name for name in DIMENSIONS if name in ROLLUP_DIMENSIONS] if by is None else list(dict.fromkeys(by))
    for name in dimensions:
        check_dimension(name)
        if name == "day":
            raise ConfigError('by="day": every chart of a costs report is by day; pass what the days are made of')
    check_written(store)
    today = dt.date.fromisoformat(day_of(clock.time()))
    first = _first(since, today, clock)
    whole = [(dt.date.fromisoformat(day), sums) for day, _, sums in store.totals(since_day=str(first))]
    begin = max(first, min([day for day, _ in whole], default=today))
    end = max([today, *(day for day, _ in whole)])
    spent: defaultdict[dt.date, int] = defaultdict(int)
    for day, sums in whole:
        spent[day] += sums.cost_nano
    days = {day: spent[day] / NANO for day in (begin + n * _DAY for n in range((end - begin).days + 1))}
    found = {name: _dimension(store, name, first) for name in dimensions}
    return CostsReport(
        store=bare_url(store.url),
        namespace=store.namespace,
        since=begin,
        until=end,
        total=cost_row("total", _plus(sums for _, sums in whole)),
        days=days,
        by={name: rows for name, (rows, _) in found.items()},
        daily={name: daily for name, (_, daily) in found.items()},
    )


def _first(since: dt.date | dt.timedelta | None, today: dt.date, clock: Clock) -> dt.date:
    if since is None:
        return today - (DAYS - 1) * _DAY
    if isinstance(since, dt.timedelta):
        since = dt.datetime.fromtimestamp(clock.time() - since.total_seconds(), dt.timezone.utc)
    if isinstance(since, dt.datetime):
        return since.astimezone(dt.timezone.utc).date()
    if not isinstance(since, dt.date):
        raise TypeError(f"since={since!r}: sums are kept by whole days; pass a datetime.date, or a timedelta (ago)")
    return since


def _dimension(store: Store, name: str, first: dt.date) -> tuple[CostRows, dict[str, dict[dt.date, float]]]:
    """The sums of each value, and its USD by day; by the value as it stands in the sums."""
    sums: defaultdict[str, list[Totals]] = defaultdict(list)
    daily: defaultdict[str, dict[dt.date, float]] = defaultdict(dict)
    for day, value, totals in store.totals(dimension=name, since_day=str(first)):
        sums[value].append(totals)
        daily[value][dt.date.fromisoformat(day)] = totals.cost_nano / NANO
    rows = [cost_row(value, _plus(each)) for value, each in sums.items()]
    named = {(called(value), value == OTHER): value for value in sums}
    ordered = sorted(rows, key=lambda row: (-row.usd, row.value))
    return CostRows(ordered, name), {_key(row): daily[named[row.value, row.rest]] for row in ordered}


def _key(row: CostRow) -> str:
    """A value, told apart from the rest if it is called like it."""
    return f"={row.value}" if not row.rest else OTHER


def _told(row: CostRow) -> str:
    return repr(row.value) if row.value in (OTHER, "(none)") else row.value


def _plus(some: Iterable[Totals]) -> Totals:
    whole = Totals()
    for one in some:
        whole = whole.plus(one)
    return whole


def _summed(some: Sequence[Mapping[dt.date, float]], spans: Sequence[Sequence[dt.date]]) -> list[float]:
    return [fsum(each.get(day, 0.0) for each in some for day in span) for span in spans]


def _spans(days: Sequence[dt.date]) -> tuple[str, list[list[dt.date]]]:
    """What one bar stands for, and the days of each."""
    if len(days) <= MOST_DAYS:
        return "day", [[day] for day in days]
    weeks = len(days) <= 7 * MOST_WEEKS
    spans: dict[tuple[int, int], list[dt.date]] = {}
    for day in days:
        year, week, _ = day.isocalendar()
        spans.setdefault((year, week) if weeks else (day.year, day.month), []).append(day)
    return "week" if weeks else "month", list(spans.values())
