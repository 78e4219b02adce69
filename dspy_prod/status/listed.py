"""Records as a list that shows itself as a table and gives a DataFrame."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dspy_prod.records import CallRecord
from dspy_prod.views import Cell, ShownList, Table, frame

if TYPE_CHECKING:
    import pandas


class Records(ShownList[CallRecord]):
    """Records of the ledger, in the order in which they were asked for.

    Example:
        ```python
        calls = lm.ledger.records(user="u1").to_frame()
        calls.groupby("model")[["cost_usd", "output_tokens"]].sum()
        ```
    """

    def to_frame(self) -> pandas.DataFrame:
        """A row for each record: the fields of `CallRecord`, its costs in USD, and a column `tag:<key>` for each tag.

        `started_at` is a time in UTC; a cost that is not known is missing, never zero.

        Raises:
            ConfigError: pandas is not installed.
        """
        return records_frame(self)

    def table(self, title: str) -> Table:
        """When, what, how it ended and what it cost, as a table with this title."""
        columns = ("when, user", "model and id", "outcome", "USD", "seconds")
        return Table(title, columns, map(_row, self), numbers=2)

    def _view(self) -> Table:
        return self.table(f"{len(self):,} {'call' if len(self) == 1 else 'calls'}")


def records_frame(records: Iterable[CallRecord]) -> pandas.DataFrame:
    """Records as a DataFrame, see `Records.to_frame`; for those that were collected by other ways than the ledger."""
    fields = [name for name in CallRecord._fields if name != "tags"]
    rows: list[dict[str, Any]] = []
    tags: dict[str, None] = {}
    for record in records:
        tagged = {f"tag:{name}": value for name, value in record.tags}
        tags |= dict.fromkeys(tagged)
        costs = {"cost_usd": record.cost_usd, "list_cost_usd": record.list_cost_usd}
        rows.append({**record._asdict(), **costs, **tagged})
    found = frame(rows, [*fields, "cost_usd", "list_cost_usd", *tags])
    at = (found.started_at.astype(float) * 1e6).round().astype("int64")
    return found.assign(started_at=at.astype("datetime64[us]").dt.tz_localize("UTC"))


def _row(record: CallRecord) -> tuple[Cell, ...]:
    route = "" if record.route == "primary" else ", fallback"
    again = f", try {record.attempt}" if record.attempt > 1 else ""
    prompt = None if record.prompt_version is None else f"prompt {record.prompt_version}"
    usd = "unknown" if record.cost_usd is None else f"{record.cost_usd:.6f}{'?' if record.estimated else ''}"
    tokens = None
    if record.input_tokens is not None:
        tokens = f"{record.input_tokens}+{'-' if record.output_tokens is None else record.output_tokens}"
    waited = f"+{record.waited:.2f} wait" if record.waited >= 0.005 else None
    return (
        Cell(when(record.started_at), below=(record.user,)),
        Cell(f"{record.model}{route}{again}", below=(record.id, prompt, record.trace_id)),
        Cell(record.outcome, below=(record.error,)),
        Cell(usd, below=(tokens,), number=True),
        Cell(f"{record.latency:.2f}", below=(waited,), number=True),
    )


def when(at: float) -> str:
    """A moment, as short as it can be told."""
    moment = dt.datetime.fromtimestamp(at)
    return moment.strftime("%H:%M:%S" if moment.date() == dt.datetime.now().date() else "%m-%d %H:%M")
