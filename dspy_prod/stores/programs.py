"""What every store keeps of the calls of whole programs, see `base`: one small record each, and sums per day."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, Final, NamedTuple, Protocol

from dspy_prod.records import summed_as, usd, variant_key

STATUSES: Final = ("ok", "cached", "fallback", "refused", "error", "abandoned")

DIMENSIONS: Final = ("program", "tenant", "experiment", "variant", "prompt")
"""By what calls are summed, beside `all` and the tags."""


class ProgramCall(NamedTuple):
    """How one call of a whole program ended: what its caller saw, and not what each of its LM calls was.

    Attributes:
        id: unique id, that of the call's report.
        started_at: seconds since the epoch when it began.
        program: name of the `Production`.
        status: `ok`; `cached`: so it was, and every LM call was answered from a cache; `fallback`: the last fallback
            answered; `refused`: it raised a refusal of this library; `error`: it raised anything else; `abandoned`:
            whoever called it left, as from a stream, or it was cancelled.
        reason: of a fallback, a refusal or an error, the word that `call_report` has for it.
        error: class name of the error behind it, without its text.
        latency: seconds from call to end. waited: those of them spent waiting for limits, budgets or an identical call.
        cost_nano: cost of all LM calls in nano-USD; None when any of it is unknown.
        list_nano: what they would have cost without a cache; None when any of it is unknown.
        attempts: requests sent upstream. cached: answers from a cache.
        user, tenant, session, run, experiment, variant, prompt_version, tags, trace_id: from the call's context.
        stage: the stage of the experiment's rollout.

    Example:
        ```python
        service(message="The app crashes.")
        for call in lm.ledger.program_calls():
            print(call.program, call.status, call.cost_usd)
        ```
    """

    id: str
    started_at: float
    program: str
    status: str
    reason: str | None = None
    error: str | None = None
    latency: float = 0.0
    waited: float = 0.0
    cost_nano: int | None = 0
    list_nano: int | None = 0
    attempts: int = 0
    cached: int = 0
    user: str | None = None
    tenant: str | None = None
    session: str | None = None
    run: str | None = None
    experiment: str | None = None
    variant: str | None = None
    stage: str | None = None
    prompt_version: str | None = None
    trace_id: str | None = None
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def cost_usd(self) -> float | None:
        """Cost in USD, None when unknown."""
        return usd(self.cost_nano)

    @property
    def list_cost_usd(self) -> float | None:
        """The list cost in USD, None when unknown."""
        return usd(self.list_nano)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-friendly values, with `cost_usd` and `list_cost_usd`."""
        row: dict[str, Any] = {**self._asdict(), "tags": dict(self.tags)}
        return {**row, "cost_usd": self.cost_usd, "list_cost_usd": self.list_cost_usd}


class ProgramTotals(NamedTuple):
    """Sums over calls of programs.

    Attributes:
        calls: how many.
        cost_nano: known cost. unknown_cost: calls whose cost is not known.
        list_nano: known list cost. unknown_list: calls whose list cost is not known.
        attempts: requests sent upstream. cached: answers from a cache.
        latency_us: microseconds from call to end.
    """

    calls: int = 0
    cost_nano: int = 0
    unknown_cost: int = 0
    list_nano: int = 0
    unknown_list: int = 0
    attempts: int = 0
    cached: int = 0
    latency_us: int = 0

    @classmethod
    def of(cls, *calls: ProgramCall) -> ProgramTotals:
        """What calls add up to."""
        return cls(
            len(calls),
            sum([call.cost_nano or 0 for call in calls]),
            sum([call.cost_nano is None for call in calls]),
            sum([call.list_nano or 0 for call in calls]),
            sum([call.list_nano is None for call in calls]),
            sum([call.attempts for call in calls]),
            sum([call.cached for call in calls]),
            sum([round(call.latency * 1e6) for call in calls]),
        )

    def plus(self, other: ProgramTotals) -> ProgramTotals:
        """The sum of both."""
        return ProgramTotals(*(a + b for a, b in zip(self, other, strict=True)))


class ProgramSums(NamedTuple):
    """The calls of one day that have a value in common and ended alike.

    Attributes:
        day: `YYYY-MM-DD`, UTC.
        reason: "" where there is none.
    """

    day: str
    value: str
    status: str
    reason: str
    totals: ProgramTotals


def program_keys(call: ProgramCall) -> list[tuple[str, str]]:
    """The (dimension, value) pairs under which a call is summed per day; `("all", "")` is always first."""
    variant = None if call.variant is None else variant_key(call.experiment, call.variant)
    values = zip(DIMENSIONS, (call.program, call.tenant, call.experiment, variant, call.prompt_version), strict=True)
    tags = ((f"tag:{name}", value) for name, value in call.tags)
    pairs = [*[(name, value) for name, value in values if value is not None], *tags]
    return [("all", ""), *[(name, summed_as(value)) for name, value in pairs]]


_alike: Final = itemgetter(
    *map(
        ProgramCall._fields.index,
        ("program", "tenant", "experiment", "variant", "prompt_version", "tags", "status", "reason"),
    )
)


def together(calls: Iterable[ProgramCall]) -> list[list[ProgramCall]]:
    """Calls by what they are summed under, for adding up many alike costs little more than adding one."""
    groups: dict[tuple[Any, ...], list[ProgramCall]] = {}
    for call in calls:
        groups.setdefault((call.started_at // 86_400, _alike(call)), []).append(call)
    return list(groups.values())


COMPARED: Final = (
    *("id", "trace_id", "session", "user", "run", "prompt_version", "variant", "stage", "experiment"),
    *("reason", "tenant", "program", "status"),
)
"""Fields that calls are looked up by: a value of the first has the fewest calls."""


def check_compared(equals: Mapping[str, str]) -> None:
    """Refuse what calls cannot be compared by.

    Raises:
        ValueError: names the field and those that exist.
    """
    for name in equals:
        if name not in COMPARED:
            raise ValueError(f"{name!r} is no field to compare; use one of {', '.join(sorted(COMPARED))}")


class ProgramCalls(Protocol):
    """Records of the calls of whole programs, as many as the ledger keeps records, and sums of all."""

    def append(self, call: ProgramCall) -> None:
        """Keep a record. Posted: never waits, blocks or raises."""
        ...

    def calls(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[ProgramCall]:
        """Records, newest first; `equals` compares fields.

        Raises:
            StoreUnavailableError: it cannot be read. ValueError: an unknown field.
        """
        ...

    def sums(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[ProgramSums]:
        """Sums per day, value, status and reason, of a dimension or of one value of it; oldest day first.

        Raises:
            StoreUnavailableError: it cannot be read.
        """
        ...
