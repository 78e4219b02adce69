"""The ledger, for people: its records, sums, and the unconfirmed ones to settle by hand.

The ledger is append-only and the truth about money; MLflow and logs are views of it. Reading flushes what was posted
first, so a call that has returned is in it; where that cannot be written, reading raises `StoreUnavailableError` rather
than show too little.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from typing import Final

from dspy_prod.privacy.redactor import known_as
from dspy_prod.records import NANO, CallRecord, Totals, summed_as
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.status.costs import check_dimension, check_limit, check_written, cost_row
from dspy_prod.status.listed import Records
from dspy_prod.status.programs import ProgramRecords, ProgramRows, check_program_dimension, program_rows
from dspy_prod.status.spending import CostRow
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory_rows import TAG

Moment = float | dt.datetime | dt.date | dt.timedelta
"""Seconds since the epoch; a datetime (a naive one is local time, as everywhere in Python); a date, which begins at
midnight UTC; or a timedelta: so long ago."""

MOST_USD: Final = 1_000_000_000
"""No call costs more; a sum of such would leave 64 bits of nano-USD."""


class Ledger:
    """The records of one store and namespace.

    Args:
        store: where they are.
        clock: what "ago" and "today" refer to.
    """

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._clock = clock

    def __repr__(self) -> str:
        return f"Ledger({self._store.url!r}, namespace={self._store.namespace!r})"

    def records(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        limit: int | None = None,
        user: str | None = None,
        tenant: str | None = None,
        session: str | None = None,
        model: str | None = None,
        program: str | None = None,
        experiment: str | None = None,
        variant: str | None = None,
        prompt_version: str | None = None,
        outcome: str | None = None,
        call_id: str | None = None,
        trace_id: str | None = None,
        run: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Records:
        """The records that match everything given, newest first: of every attempt that has ended, refusals included.

        An attempt ends when its answer is there, or when whoever left it lets go of it: DSPy closes the stream behind
        an abandoned `streamify` a moment after its reader has gone, and what is cut off on LiteLLM's route goes on in
        a thread until its own time limit. Until then it is held (`costs().held_usd`), not recorded.

        Args:
            since, until: the first moment, and the first moment after.
            limit: at most this many.
            user, tenant, ...: fields of `CallRecord` to compare. While a `dspy_prod.Redactor` is installed, the real
                name of a user, tenant, session or tag finds the records of its pseudonym.
            tags: tags that a record has, whatever others it has beside. They have no index: in a ledger of millions
                name the run, a user or a `since` as well.

        Example:
            ```python
            lm.ledger.records(run="nightly", tags={"feature": "triage"}, limit=50).to_frame()
            ```

        Returns:
            A list, which a notebook shows as a table; `to_frame()` gives it as a pandas DataFrame.
        """
        check_limit(limit)
        fields = {
            "user": known_as(user), "tenant": known_as(tenant), "session": known_as(session), "model": model,
            "program": program, "experiment": experiment, "variant": variant, "prompt_version": prompt_version,
            "outcome": outcome, "call_id": call_id, "trace_id": trace_id, "run": run,
            **{f"{TAG}{name}": known_as(str(value)) for name, value in (tags or {}).items()},
        }  # fmt: skip
        equals = {name: value for name, value in fields.items() if value is not None}
        begin, end = self._epoch("since", since), self._epoch("until", until)
        records = self._read().records(since=begin, until=end, limit=limit, **equals)
        return Records(sorted(records, key=lambda record: -record.started_at))  # a store may have them as they ended

    def unconfirmed(self, *, since: Moment | None = None) -> Records:
        """The records whose cost is an upper bound because the provider did not tell, newest first.

        `resolve` settles one by the provider's bill.
        """
        found = self._read().unconfirmed(self._epoch("since", since))
        return Records(sorted(found, key=lambda record: -record.started_at))

    def resolve(self, id: str, usd: float, *, overwrite: bool = False) -> CallRecord:
        """Set the true cost of an unconfirmed record, and mend the budgets and sums it went into.

        Args:
            id: the record's `id`.
            usd: what the provider billed for it, in USD.
            overwrite: also replace a cost the provider told.

        Returns:
            The record as it is now.

        Raises:
            LookupError: there is no such record.
            ValueError: an impossible cost, or a record that needs no resolving.
        """
        if isinstance(usd, bool) or not isinstance(usd, (int, float)) or not 0 <= usd <= MOST_USD:
            raise ValueError(f"usd={usd!r} must be a cost in USD, 0 to {MOST_USD:,}")
        record = self._find(id)
        if not record.estimated and record.cost_usd is not None and not overwrite:
            raise ValueError(
                f"The record {id!r} is not unconfirmed: its cost of {record.cost_usd:.9f} USD is known. "
                "Pass overwrite=True to replace it"
            )
        if not self._read().correct(id, round(usd * NANO)):
            raise _unknown(id)
        return self._find(id)

    def total(
        self,
        *,
        since: dt.date | None = None,
        until: dt.date | None = None,
        by: str = "day",
        value: str | None = None,
    ) -> CostRow:
        """The sums of whole days (UTC), also where old records are no longer kept.

        Args:
            since, until: the first and the last day.
            by, value: a dimension as in `LM.costs(by=...)` and the value to sum, e.g. `by="user", value="u1"`;
                as in `records`, a real name finds its pseudonym. A variant is `"experiment/variant"`.
        """
        check_dimension(by)
        if (by == "day") is not (value is None):
            raise ValueError("total() takes by= and value= together, e.g. total(by='user', value='u1')")
        if by in ("user", "tenant") or by.startswith("tag:"):
            value = known_as(value)
        rows = self._read().totals(
            dimension="all" if by == "day" else by,
            since_day=None if since is None else _date("since", since),
            until_day=None if until is None else _date("until", until),
            value=None if value is None else summed_as(value),
        )
        totals = Totals()
        for _, _, sums in rows:
            totals = totals.plus(sums)
        return cost_row(summed_as(value or ""), totals)

    def program_calls(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        limit: int | None = None,
        program: str | None = None,
        status: str | None = None,
        reason: str | None = None,
        user: str | None = None,
        tenant: str | None = None,
        session: str | None = None,
        run: str | None = None,
        experiment: str | None = None,
        variant: str | None = None,
        stage: str | None = None,
        prompt_version: str | None = None,
        trace_id: str | None = None,
        id: str | None = None,
    ) -> ProgramRecords:
        """How calls of each `Production` ended that match everything given, newest first.

        Args:
            since, until: the first moment, and the first moment after; a call counts when it began.
            limit: at most this many.
            program, status, ...: fields of `ProgramCall` to compare; real names find their pseudonyms as in `records`.

        Example:
            ```python
            lm.ledger.program_calls(program="triage", status="refused", limit=20)
            ```
        """
        check_limit(limit)
        fields = {
            "user": known_as(user), "tenant": known_as(tenant), "session": known_as(session), "program": program,
            "status": status, "reason": reason, "run": run, "experiment": experiment, "variant": variant,
            "stage": stage, "prompt_version": prompt_version, "trace_id": trace_id, "id": id,
        }  # fmt: skip
        wanted = {name: value for name, value in fields.items() if value is not None}
        begin, end = self._epoch("since", since), self._epoch("until", until)
        return ProgramRecords(self._read().programs.calls(since=begin, until=end, limit=limit, **wanted))

    def programs(
        self, *, by: str = "program", since: dt.date | None = None, until: dt.date | None = None
    ) -> ProgramRows:
        """How many calls of programs ended how and why, their error and fallback rates, from sums of whole days (UTC).

        It is as quick however many calls there were, and counts those whose records are no longer kept.

        Args:
            by: `"day"`, `"program"`, `"tenant"`, `"experiment"`, `"variant"` (rows are called `experiment/variant`),
                `"prompt"` or `"tag:<key>"`.
            since, until: the first and the last day.

        Raises:
            ConfigError: an unknown dimension.
        """
        check_program_dimension(by)
        first, last = (None if day is None else _date(name, day) for name, day in (("since", since), ("until", until)))
        dimension = "all" if by == "day" else by
        return program_rows(self._read().programs.sums(dimension=dimension, since_day=first, until_day=last), by)

    def _read(self) -> Store:
        """The store, once all that has ended is written to it."""
        check_written(self._store)
        return self._store

    def _find(self, id: str) -> CallRecord:
        records = self._read().records(id=id, limit=1)
        if not records:
            raise _unknown(id)
        return records[0]

    def _epoch(self, name: str, moment: Moment | None) -> float | None:
        if moment is None:
            return None
        if isinstance(moment, dt.timedelta):
            return self._clock.time() - moment.total_seconds()
        if isinstance(moment, dt.datetime):
            return moment.timestamp()
        if isinstance(moment, dt.date):
            return dt.datetime(moment.year, moment.month, moment.day, tzinfo=dt.timezone.utc).timestamp()
        if isinstance(moment, (int, float)) and not isinstance(moment, bool) and math.isfinite(moment):
            return float(moment)
        raise TypeError(f"{name}={moment!r}: pass seconds since the epoch, a datetime, a date, or a timedelta (ago)")


def _unknown(id: str) -> LookupError:
    return LookupError(
        f"The ledger has no record {id!r}; take the id of a CallRecord from ledger.unconfirmed() or ledger.records()"
    )


def _date(name: str, day: dt.date) -> str:
    if isinstance(day, dt.datetime) or not isinstance(day, dt.date):
        raise TypeError(f"{name}={day!r}: sums are kept by whole days; pass a datetime.date")
    return day.isoformat()
