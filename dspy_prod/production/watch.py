"""Watching one call of a `Production`: its context while it runs, its report, and the record of how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal

import dspy
from dspy.dsp.utils.settings import settings as dspy_settings

from dspy_prod.context.current import SETTING, CallContext
from dspy_prod.context.scoring import is_raising
from dspy_prod.privacy.error_text import error_text
from dspy_prod.production.collecting import Records
from dspy_prod.production.leaving import Caller
from dspy_prod.production.reasons import REFUSALS, Reason, reason_of
from dspy_prod.production.report import CallReport, Status, TokenUsage, attach, report_of
from dspy_prod.records import ANSWERED, NANO, CallRecord
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.ids import IDS
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.programs import ProgramCall, ProgramCalls

Raised = Literal["refused", "error", "abandoned"]
"""How a call ended that returned nothing."""


class _Calls:
    """Stands among DSPy's calling modules, so that the history of every LM call reaches it."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def foreign(self) -> list[CallRecord]:
        """The calls of LMs that are not ours, which leave no record of their own."""
        return [_record(entry) for entry in self.history if "cached" not in entry]


class Watch:
    """Watches one call of a `Production`, as a context manager: puts its context in force, reports and records its end.

    Attributes:
        visible: something of a streamed answer was sent.

    Args:
        programs: where the call is recorded; None: nowhere. Nor is it inside `dspy.Evaluate` and an optimizer's
            `compile`: what they score is not what users were answered.
    """

    def __init__(
        self, name: str, outer: CallContext, inner: CallContext, clock: Clock, programs: ProgramCalls | None = None
    ) -> None:
        self.name = name
        self.records = Records(outer.records)
        self._programs = None if programs is None or is_raising() else programs
        self._outer = outer._replace(program=name, records=self.records)
        self._inner = inner._replace(records=self.records)
        self._calls = _Calls()
        self._clock = clock
        self._began_at = clock.time()
        self._started = clock.monotonic()
        self._before_fallback = (0, 0)
        self._caller = Caller()
        self._finished = False

    @property
    def visible(self) -> bool:
        return self._caller.sees_something

    def left(self, error: BaseException) -> bool:
        """Whether an error only says that whoever waited has gone, so that nobody is to be answered."""
        return self._caller.left(error)

    def __enter__(self) -> Watch:
        REAPER.start()  # there may have been no thread to be had, or no LM of ours in the process
        self._caller.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._finished:
            self._raised(error)
        self._caller.end()

    def _raised(self, error: BaseException) -> None:
        kind, latency = type(error), self._clock.monotonic() - self._started
        if isinstance(error, Exception) and not self.left(error):
            reason = reason_of(error)
            self._keep(self._ended("refused" if reason in REFUSALS else "error", reason, kind, latency))
        else:
            # the caller left, perhaps inside the garbage collector, and what was under way is still being settled
            REAPER.post(lambda: self._keep(self._ended("abandoned", None, kind, latency)))

    def program(self) -> AbstractContextManager[None]:
        """The scope in which the program runs."""
        return self._under(self._inner)

    @contextmanager
    def fallback(self, error: Exception) -> Iterator[None]:
        """The scope in which a fallback answers for an error: under the caller's deadline, not the `Production`'s."""
        self._before_fallback = (len(self.records), len(self._calls.foreign()))
        with self._under(self._outer):
            try:
                yield
            except Exception as second:
                raise second from error

    def _under(self, context: CallContext) -> AbstractContextManager[None]:
        callers = [*(dspy_settings.caller_modules or []), self._calls]
        found: AbstractContextManager[None] = dspy.context(**{SETTING: context, "caller_modules": callers})
        return found

    def finish(self, result: Any, error: Exception | None = None) -> None:
        """The call was answered: by the program, or by the fallback for an error.

        The report is attached to a prediction; anything else a program returns cannot carry one.
        """
        reason = None if error is None else reason_of(error)
        text = None if error is None else error_text(error)
        latency = self._clock.monotonic() - self._started
        inner = report_of(result) if error is None else None  # of a `Production` inside, whose answer is passed on
        fell_back = inner is not None and inner.status == "fallback"
        if inner is not None and fell_back:
            reason, text = inner.reason, inner.error
        kind = None if error is None else type(error)
        call = self._ended("ok" if error is None and not fell_back else "fallback", reason, kind, latency)
        if inner is not None and call.stage is None and call.experiment == inner.experiment:
            call = call._replace(stage=inner.stage)
        if isinstance(result, dspy.Prediction):
            report = self._report(call, reason, text)
            if call.status == "fallback":
                self.records.fell_back(report, error, inner)
            attach(report, result)
        self._finished = True
        self._keep(call)

    def _keep(self, call: ProgramCall) -> None:
        if self._programs is not None:
            self._programs.append(call)

    def _ended(
        self, status: Status | Raised, reason: Reason | None, error: type[BaseException] | None, latency: float
    ) -> ProgramCall:
        """The record of how the call ended."""
        context, records = self._inner, tuple(self.records)
        last = records[-1] if records else None
        every = [*records, *self._calls.foreign()]
        cached = sum(one.cached for one in every)
        if status == "ok" and cached and cached == len(every):
            status = "cached"
        waited: dict[str, float] = {}
        for record in records:
            waited[record.call_id] = max(waited.get(record.call_id, 0.0), record.waited)
        experiment, variant = context.experiment, context.variant
        if experiment is None and variant is None and last is not None:
            experiment, variant = last.experiment, last.variant
        version = context.prompt_version or (None if last is None else last.prompt_version)
        return ProgramCall(
            IDS.make(), self._began_at, self.name, status, reason, None if error is None else error.__name__,
            latency, sum(waited.values()), _known([one.cost_nano for one in every]),
            _known([one.list_nano for one in every]), len(every) - cached, cached, context.user, context.tenant,
            context.session, context.run, experiment, variant,
            context.assignments[-1].stage if context.assignments else None, None if version is None else str(version),
            (None if last is None else last.trace_id) or context.trace_id, context.tags,
        )  # fmt: skip

    def _report(self, call: ProgramCall, reason: Reason | None, error: str | None) -> CallReport:
        records, foreign = tuple(self.records), self._calls.foreign()
        before, foreign_before = self._before_fallback
        answered = [one for one in records[before:] if one.outcome in ANSWERED]
        answer = next(iter([*reversed(answered), *reversed(foreign[foreign_before:])]), None)
        every = [*records, *foreign]
        return CallReport(
            status=call.status,  # type: ignore[arg-type]  # it was answered
            reason=reason,
            error=error,
            cost_usd=call.cost_usd,
            usage=TokenUsage(
                input_tokens=_sum([one.input_tokens for one in every]),
                output_tokens=_sum([one.output_tokens for one in every]),
            ),
            attempts=call.attempts,
            model=answer.model if answer is not None else None,
            route=(answer.route or None) if answer is not None else None,
            latency=call.latency,
            waited=call.waited,
            program=self.name,
            experiment=call.experiment,
            variant=call.variant,
            stage=call.stage,
            prompt_version=call.prompt_version,
            trace_id=call.trace_id,
            call_ids=tuple(dict.fromkeys(record.call_id for record in records)),
            list_cost_usd=call.list_cost_usd,
            id=None if self._programs is None else call.id,
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


def _known(numbers: Sequence[int | None]) -> int | None:
    """The sum; None when any is unknown."""
    told = [number for number in numbers if number is not None]
    return sum(told) if len(told) == len(numbers) else None


def _sum(numbers: Sequence[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    told = [number for number in numbers if number is not None]
    return sum(told) if told else None
