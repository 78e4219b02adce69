"""What one call of a `Production` did: `CallReport`, and how it is gathered and found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal

import dspy
from dspy.dsp.utils.settings import settings as dspy_settings
from dspy.streaming.messages import StatusMessage
from pydantic import BaseModel, ConfigDict

from dspy_prod.context.current import SETTING, CallContext
from dspy_prod.records import ANSWERED, NANO, CallRecord, usd
from dspy_prod.runtime.clock import Clock
from dspy_prod.status.spending import Reason as Refusal
from dspy_prod.views import Cell, Shown, Table
from dspy_prod.views import usd as in_usd
from dspy_prod.views.cells import Tone

Status = Literal["ok", "cached", "fallback"]
Reason = Literal[Refusal, "upstream_error", "parse_error", "unexpected_error"]

_ATTRIBUTE: Final = "_dspy_prod_report"  # Prediction keeps names with an underscore out of its fields


class TokenUsage(BaseModel):
    """Tokens as told by the providers, summed over all attempts; None when none of them told."""

    model_config = ConfigDict(frozen=True)

    input_tokens: int | None = None
    output_tokens: int | None = None


class CallReport(Shown, BaseModel):
    """What one call of a `Production` did. Immutable.

    Attributes:
        status: `ok`: the program answered; `cached`: so it did, and every LM call was answered from a cache;
            `fallback`: the `fallback_response` answered.
        reason: why the fallback answered, None otherwise.
        error: the error behind it, as class name and short text, without keys, prompts and answers.
        cost_usd: cost of all LM calls, those of a fallback module included; None when any of it is unknown.
        usage: tokens, as far as the providers told.
        attempts: requests that were sent upstream, retries and model fallbacks included.
        model: the model that gave the last answer; None when no model answered.
        route: its route, `"primary"` or the fallback model's name; None for a model outside this library.
        latency: seconds from call to answer.
        waited: seconds of it spent waiting for limits, budgets or an identical call.
        program: the `Production`'s name.
        variant: the experiment's variant that was in force.
        trace_id: id of the trace the call belongs to, when one was active.
        call_ids: ids of the LM calls, as in the ledger.
    """

    model_config = ConfigDict(frozen=True)

    status: Status
    reason: Reason | None = None
    error: str | None = None
    cost_usd: float | None = None
    usage: TokenUsage = TokenUsage()
    attempts: int = 0
    model: str | None = None
    route: str | None = None
    latency: float = 0.0
    waited: float = 0.0
    program: str | None = None
    variant: str | None = None
    trace_id: str | None = None
    call_ids: tuple[str, ...] = ()

    def _view(self) -> Table:
        tone: Tone = "warn" if self.status == "fallback" else "good"
        by = None if self.model is None else Cell(self.model, below=(f"route {self.route}" if self.route else None,))
        rows: list[tuple[str, Any]] = [
            ("status", Cell(self.status, tone, (self.reason, self.error))),
            ("answered by", by),
            ("cost, USD", in_usd(self.cost_usd, 9)),
            ("attempts upstream", self.attempts),
            ("tokens in", self.usage.input_tokens),
            ("tokens out", self.usage.output_tokens),
            ("seconds", Cell(f"{self.latency:.2f}", below=(f"{self.waited:.2f} of them waiting",), number=True)),
            *((name, value) for name, value in (("variant", self.variant), ("trace", self.trace_id)) if value),
        ]
        return Table(f"A call of {self.program or 'a program'}", ("", ""), rows)


def call_report(prediction: Any) -> CallReport:
    """What the call did that gave this prediction.

    It sees the calls of `dspy_prod.LM`, and those of a plain `dspy.LM` as far as DSPy's history tells, when that is
    on. An attempt that was abandoned at its deadline and still runs upstream is in the ledger once it ends.

    Args:
        prediction: as returned (or streamed last) by a `Production`.

    Raises:
        ValueError: the prediction did not come from a `Production`, or was copied since.
    """
    report = report_of(prediction)
    if report is None:
        raise ValueError(
            "call_report takes the Prediction that a dspy_prod.Production returned, itself and not a copy; "
            f"this {type(prediction).__name__} has no report. Wrap the program: prod = dspy_prod.Production(program)"
        )
    return report


def report_of(prediction: Any) -> CallReport | None:
    """The report that a prediction carries, None without one."""
    report = getattr(prediction, "__dict__", {}).get(_ATTRIBUTE)
    return report if isinstance(report, CallReport) else None


class Records(list[CallRecord]):
    """Collects records, and passes them on to the collector of an enclosing call."""

    def __init__(self, outer: list[CallRecord] | None) -> None:
        super().__init__()
        self._outer = outer

    def append(self, record: CallRecord) -> None:
        """Add a record here and outside."""
        super().append(record)
        if self._outer is not None:
            self._outer.append(record)


class _Stream:
    """A stream that knows whether something of an answer was sent through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.visible = False

    async def send(self, item: Any) -> None:
        """Send an item."""
        if not isinstance(item, StatusMessage):
            self.visible = True
        await self._stream.send(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Calls:
    """Stands among DSPy's calling modules, so that the history of every LM call reaches it."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def foreign(self) -> list[CallRecord]:
        """The calls of LMs that are not ours, which leave no record of their own."""
        return [_record(entry) for entry in self.history if "cached" not in entry]


class Watch:
    """Watches one call of a `Production`: puts its context in force, and reports in the end.

    Attributes:
        visible: something of a streamed answer was sent.
    """

    def __init__(self, name: str, outer: CallContext, inner: CallContext, clock: Clock) -> None:
        self.name = name
        self.records = Records(outer.records)
        self._outer = outer._replace(program=name, records=self.records)
        self._inner = inner._replace(records=self.records)
        self._calls = _Calls()
        self._clock = clock
        self._started = clock.monotonic()
        self._stream: _Stream | None = None
        self._before_fallback = (0, 0)

    @property
    def visible(self) -> bool:
        return self._stream is not None and self._stream.visible

    def program(self) -> AbstractContextManager[None]:
        """The scope in which the program runs."""
        stream = dspy_settings.send_stream
        if stream is None:
            return self._under(self._inner)
        self._stream = _Stream(stream)
        return self._under(self._inner, send_stream=self._stream)

    @contextmanager
    def fallback(self, error: Exception) -> Iterator[None]:
        """The scope in which a fallback answers for an error: under the caller's deadline, not the `Production`'s."""
        self._before_fallback = (len(self.records), len(self._calls.foreign()))
        with self._under(self._outer):
            try:
                yield
            except Exception as second:
                raise second from error

    def _under(self, context: CallContext, **more: Any) -> AbstractContextManager[None]:
        callers = [*(dspy_settings.caller_modules or []), self._calls]
        found: AbstractContextManager[None] = dspy.context(**{SETTING: context, "caller_modules": callers}, **more)
        return found

    def finish(self, result: Any, reason: Reason | None = None, error: str | None = None) -> Any:
        """Attach the report to a prediction; anything else a program returns cannot carry one."""
        if isinstance(result, dspy.Prediction):
            object.__setattr__(result, _ATTRIBUTE, self._report(reason, error))
        return result

    def _report(self, reason: Reason | None, error: str | None) -> CallReport:
        records = tuple(self.records)
        foreign = self._calls.foreign()
        before, foreign_before = self._before_fallback
        answered = [one for one in records[before:] if one.outcome in ANSWERED]
        answer = next(iter([*reversed(answered), *reversed(foreign[foreign_before:])]), None)
        all_calls = [*records, *foreign]
        costs = [one.cost_nano for one in all_calls]
        status: Status = "ok"
        if reason is not None:
            status = "fallback"
        elif all_calls and all(one.cached for one in all_calls):
            status = "cached"
        waited: dict[str, float] = {}
        for record in records:
            waited[record.call_id] = max(waited.get(record.call_id, 0.0), record.waited)
        last = records[-1] if records else None
        return CallReport(
            status=status,
            reason=reason,
            error=error,
            cost_usd=None if None in costs else usd(_sum([0, *costs])),
            usage=TokenUsage(
                input_tokens=_sum([one.input_tokens for one in all_calls]),
                output_tokens=_sum([one.output_tokens for one in all_calls]),
            ),
            attempts=sum(not one.cached for one in all_calls),
            model=answer.model if answer is not None else None,
            route=(answer.route or None) if answer is not None else None,
            latency=self._clock.monotonic() - self._started,
            waited=sum(waited.values()),
            program=self.name,
            variant=(last.variant if last is not None else None) or self._outer.variant,
            trace_id=(last.trace_id if last is not None else None) or self._outer.trace_id,
            call_ids=tuple(waited),
        )


def _record(entry: dict[str, Any]) -> CallRecord:
    """What DSPy's history tells of the call of an LM that is not ours."""
    cost, usage = entry.get("cost"), entry.get("usage") or {}
    # DSPy empties the usage of a cached answer and repeats its cost; an answer without usage has no cost either.
    cached = entry.get("cache_hit") is True or (not usage and cost is not None)
    nano = 0 if cached else None if cost is None else round(cost * NANO)
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    inputs, outputs = (count if isinstance(count, int) else None for count in counts)
    return CallRecord(
        "", "", 0.0, str(entry.get("model")), "", 1, "cached" if cached else "ok", nano,
        input_tokens=inputs, output_tokens=outputs, cached=cached,
        saved_nano=round(cost * NANO) if cached and cost is not None else None,
    )  # fmt: skip


def _sum(numbers: Sequence[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    told = [number for number in numbers if number is not None]
    return sum(told) if told else None
