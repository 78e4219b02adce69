"""The `CallRecord`: one row of the ledger, the truth about money."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

REFUSED = "refused"
"""The outcome of a call that a policy of this library did not send."""

ANSWERED = ("ok", "cached", "stale", "replayed")
"""The outcomes of what ended in an answer."""

NANO = 1_000_000_000
"""Nano-USD per USD. Money is integer nano-USD inside and float only at the edge."""


MOST_TOKENS = 2**31 - 1
"""No call takes more: a counter beyond it is a provider's mistake, and counts as not told."""


def usd(nano: int | None) -> float | None:
    """Nano-USD as USD; None stays None (unknown is never zero)."""
    return None if nano is None else nano / NANO


class CallRecord(NamedTuple):
    """One upstream attempt, or one answer from the cache. Immutable; money is kept as integer nano-USD.

    Attributes:
        id: unique id of this record; also the id of its budget reservation.
        call_id: shared by all attempts of one LM call.
        started_at: seconds since the epoch when the attempt was sent (or the cache answered).
        model: the model string that was asked, e.g. `"openai/gpt-4o-mini"`.
        route: name of the route, `"primary"` or the fallback's model.
        attempt: 1 for the first attempt on its route.
        outcome: `ok`, `cached`, `stale`, `replayed` (from the log of a `Run`), `error`, `timeout`, `cancelled`,
            `abandoned`; `refused` for a call that a policy of this library did not send: it costs nothing and is
            counted in no sum.
        cost_nano: cost in nano-USD; None when the price is unknown.
        estimated: the provider did not tell the usage; `cost_nano` is the reserved upper bound ("unconfirmed").
        error: class name of the error, without its text.
        status: HTTP status of a failed attempt, when known.
        input_tokens, output_tokens, cached_tokens, reasoning_tokens: usage as told by the provider, None if not.
        cached: answered from the cache, or from a run's log; costs nothing.
        latency: seconds from sending to the end of the answer.
        waited: seconds spent waiting for the limiter, the budget or another identical call.
        user, tenant, session, priority, program, experiment, variant, prompt_version, tags: from the call's context.
        trace_id: id of the trace the call belongs to, when one was active.
        accounts: keys of the budget accounts that were charged.
        reason: of a refused call, the word of `RejectedError.reason` and what said no, e.g.
            `"budget_exceeded: day/tenant=acme"`. Of refusals that follow fast on each other one in a while is
            recorded, and tells how many it stands for: `"... (and 137 more)"`.
        run: name of the run the call belongs to, when the context names one.
        saved_nano: of an answer from a cache, what it cost when it was asked upstream, in nano-USD; None when that is
            not known.

    Example:
        ```python
        lm("hello")
        record = lm.ledger.records(limit=1)[0]
        print(record.model, record.outcome, record.cost_usd, record.estimated)
        ```
    """

    id: str
    call_id: str
    started_at: float
    model: str
    route: str
    attempt: int
    outcome: str
    cost_nano: int | None
    estimated: bool = False
    error: str | None = None
    status: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached: bool = False
    latency: float = 0.0
    waited: float = 0.0
    user: str | None = None
    tenant: str | None = None
    session: str | None = None
    priority: str = "normal"
    program: str | None = None
    experiment: str | None = None
    variant: str | None = None
    prompt_version: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    trace_id: str | None = None
    accounts: tuple[str, ...] = ()
    reason: str | None = None
    run: str | None = None
    saved_nano: int | None = None

    @property
    def cost_usd(self) -> float | None:
        """Cost in USD, None when unknown."""
        return usd(self.cost_nano)

    @property
    def list_nano(self) -> int | None:
        """The list cost in nano-USD: what the call would have cost without a cache, None when unknown.

        That of an upstream attempt is its cost. Two programs that ask alike have the same list cost, however warm the
        cache of each is.
        """
        return self.saved_nano if self.cached else self.cost_nano

    @property
    def list_cost_usd(self) -> float | None:
        """The list cost in USD, None when unknown."""
        return usd(self.list_nano)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-friendly values, with `cost_usd` and `list_cost_usd`."""
        row: dict[str, Any] = self._asdict()
        row["tags"] = dict(self.tags)
        row["accounts"] = list(self.accounts)
        row["cost_usd"], row["list_cost_usd"] = self.cost_usd, self.list_cost_usd
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> CallRecord:
        """The record that `to_dict` described; unknown keys are ignored."""
        fields = {name: row[name] for name in cls._fields if name in row}
        fields["tags"] = tuple((str(k), str(v)) for k, v in dict(row.get("tags") or {}).items())
        fields["accounts"] = tuple(row.get("accounts") or ())
        return cls(**fields)


class Totals(NamedTuple):
    """Sums over records, as kept in the ledger's rollups.

    Attributes:
        cost_nano: known cost, estimated cost included.
        unconfirmed_nano: the part of `cost_nano` that is an upper bound, not told by the provider.
        unknown_cost: attempts whose cost is not known at all.
        attempts: upstream attempts. cached: answers from the cache. failed: attempts that did not end in an answer.
        input_tokens, output_tokens: told usage.
        saved_nano: what answers from the cache would have cost. saved: those of which that is known.
    """

    cost_nano: int = 0
    unconfirmed_nano: int = 0
    unknown_cost: int = 0
    attempts: int = 0
    cached: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    saved_nano: int = 0
    saved: int = 0

    @property
    def list_nano(self) -> int:
        """The list cost, as far as it is known: what all this would have cost without a cache."""
        return self.cost_nano + self.saved_nano

    @property
    def unknown_list(self) -> int:
        """Attempts and cached answers whose list cost is not known; those of earlier releases are among them."""
        return self.unknown_cost + self.cached - self.saved

    @classmethod
    def of(cls, *records: CallRecord) -> Totals:
        """What records add up to."""
        asked = [record for record in records if not record.cached]
        saved = [record.saved_nano for record in records if record.cached and record.saved_nano is not None]
        return cls(
            sum([record.cost_nano or 0 for record in records]),
            sum([record.cost_nano or 0 for record in records if record.estimated]),
            len([record for record in records if record.cost_nano is None]),
            len(asked),
            len(records) - len(asked),
            len([record for record in asked if record.outcome != "ok"]),
            sum([record.input_tokens or 0 for record in records]),
            sum([record.output_tokens or 0 for record in records]),
            sum(saved),
            len(saved),
        )

    @classmethod
    def of_hits(cls, saved: Sequence[int | None]) -> Totals:
        """What cached answers that used nothing add up to, each by what it would have cost."""
        known = [nano for nano in saved if nano is not None]
        return cls(cached=len(saved), saved_nano=sum(known), saved=len(known))

    def plus(self, other: Totals) -> Totals:
        """The sum of both."""
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


def _fields(*names: str) -> Callable[[CallRecord], tuple[Any, ...]]:
    return itemgetter(*map(CallRecord._fields.index, names))


alike: Final = _fields("model", "user", "tenant", "program", "experiment", "variant", "prompt_version", "tags", "run")
"""What the `rollup_keys` of a record depend on: records that have it in common are summed together."""


ROLLUP_DIMENSIONS = ("model", "user", "tenant", "program", "experiment", "variant", "prompt", "run")


def rollup_keys(record: CallRecord) -> list[tuple[str, str]]:
    """The (dimension, value) pairs under which a record is summed per day; `("all", "")` is always first.

    None for a refused call: nothing was sent, and strangers who are refused must not fill the table.
    """
    if record.outcome == REFUSED:
        return []
    keys = [("all", ""), ("model", record.model)]
    if record.user is not None:
        keys.append(("user", record.user))
    if record.tenant is not None:
        keys.append(("tenant", record.tenant))
    if record.program is not None:
        keys.append(("program", record.program))
    if record.experiment is not None:
        keys.append(("experiment", record.experiment))
    if record.variant is not None:
        keys.append(("variant", variant_key(record.experiment, record.variant)))
    if record.prompt_version is not None:
        keys.append(("prompt", record.prompt_version))
    if record.run is not None:
        keys.append(("run", record.run))
    keys.extend((f"tag:{name}", value) for name, value in record.tags)
    return [(dimension, summed_as(value)) for dimension, value in keys]


def variant_key(experiment: str | None, variant: str) -> str:
    """How a variant is summed: `experiment/variant`, for every experiment has a `control`; alone without an experiment.

    A slash or a percent sign within a name is written `%2F` or `%25`, so that no two pairs are summed as one. Sums that
    earlier releases wrote have the variant alone.
    """
    return _part(variant) if experiment is None else f"{_part(experiment)}/{_part(variant)}"


def _part(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


OTHER = "(other)"
"""Stands for all values of a dimension that a store no longer tells apart."""


def summed_as(value: str) -> str:
    """How a value stands in the sums: one that is itself called `(other)` has a backslash before it."""
    if isinstance(value, str) and value.endswith(OTHER) and not value[: -len(OTHER)].strip("\\"):
        return f"\\{value}"
    return value


def called(value: str) -> str:
    """The value that stands so in the sums, `OTHER` aside."""
    if OTHER not in value or value == OTHER:
        return value
    return value[1:] if summed_as(value) != value else value
