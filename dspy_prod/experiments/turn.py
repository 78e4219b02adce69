"""One call of an experiment: the variant that answers, the context it answers in, and what the store is told of it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from dspy_prod.compat.dspy import InForce
from dspy_prod.context.assignments import Assignment
from dspy_prod.context.current import CallContext, assigned, begin
from dspy_prod.experiments.flights import Flight, Flights
from dspy_prod.experiments.shadow import OURS, Answered, list_nano
from dspy_prod.experiments.variants import Variant
from dspy_prod.options.experiments import SHADOW
from dspy_prod.production.collecting import Records
from dspy_prod.production.leaving import Caller
from dspy_prod.production.reasons import reason_of
from dspy_prod.production.report import CallReport, report_of
from dspy_prod.records import NANO
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.trials import Call, Once, Trials


class Turn:
    """A call, as a context manager around the variant's program.

    Args:
        variant: what answers. place: who calls, and how it came by the variant; None: for nobody, and nothing is said
            of the experiment. trials: where the call is told; None for one that counts for nothing.
        outer: the context in force. flights: where it is known for as long as it goes on.
        made: when the experiment was, see `stores.trials.Exposure`.

    Attributes:
        prediction: what was answered, once it was. unpriced: what an LM call of it cost is not known.
        over: the store was told how it ended. Where it is not, once its caller is gone or was interrupted, see `end`.
    """

    __slots__ = (
        "_made",
        *("_at", "_began", "_ended", "_failed", "_fell_back", "_place", "_records", "_scope", "_trace", "_trials"),
        *("_call", "_caller", "_flight", "_flights", "_inner", "_refused", "_report", "_told", "_until"),
        *("over", "prediction", "unpriced", "variant"),
    )

    def __init__(
        self,
        variant: Variant,
        place: Assignment | None,
        trials: Trials | None,
        outer: CallContext,
        flights: Flights | None = None,
        made: float | None = None,
    ) -> None:
        self.variant, self._made = variant, made
        self._place, self._trials = place, trials
        self._records = Records(outer.records)
        inner = outer if place is None else assigned(outer, place)
        self._inner = inner._replace(records=self._records)
        self._scope: InForce | None = None
        self._fell_back = self._failed = self._ended = self._refused = False
        self._at = 0.0 if trials is None else trials.now()
        self._began = time.monotonic()
        self._until: float | None = None
        self._flights = flights
        self._flight: Flight | None = None
        if flights is not None and trials is not None and place is not None and place.unit is not None:
            self._flight = flights.flight(place.unit, outer.deadline)
        self._caller = Caller()
        self._told = self.over = False
        self._call: Call | None = None
        self._trace = outer.trace_id
        self._report: CallReport | None = None
        self.prediction: Any = None
        self.unpriced = False

    def __enter__(self) -> Turn:
        REAPER.start()  # there may have been no thread to be had, or no LM of ours in the process
        self._caller.begin()
        if self._flights is not None and self._flight is not None:
            self._flights.begin(self._flight)
        self._scope = begin(self._inner)
        return self

    def answered(self, result: Any) -> Any:
        """See whether the variant or its fallback has answered."""
        report = report_of(result)
        self.prediction = result
        self._trace = self._trace if report is None else report.trace_id or self._trace
        if report is not None:
            self._fell_back = report.status == "fallback"
            self._refused = self._fell_back and report.reason in OURS
            self._report = report
            self.unpriced = report.cost_usd is None
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception) and not self._caller.left(error)
        self._ended, self._failed = error is None or failed, failed
        self._refused |= self._failed and error is not None and reason_of(error) in OURS
        self._refused = self._refused and not self._records.has_hung(error, self._report)  # sent: it has failed
        self._until = time.monotonic()
        if self._scope is not None:
            self._scope.end()
        self._caller.end()
        if self._ended:
            self.end()
        else:  # perhaps inside the garbage collector, on a thread that has a lock which this takes
            REAPER.post(self.end)

    def end(self) -> None:
        """Say what the call was, and that it is over. Whoever calls it again does what an interruption, which may come
        anywhere, has kept from being done."""
        if self.over:
            return
        try:
            if self._trials is not None and self._place is not None and not self._told:
                self._call = self._call or self._was(self._place)
                self._told = self._trials.call(self._call) is None  # type: ignore[func-returns-value]  # nothing comes between
        finally:
            if self._flights is not None and self._flight is not None:
                self._flights.end(self._flight)
        self.over = True

    @property
    def shadowed(self) -> bool:
        """Whether candidates may be asked once more what was asked: it was answered, in a shadow stage, or failed for
        another reason than a limit, a budget or a deadline that kept it from being sent."""
        return self._ended and not self._refused and self._place is not None and self._place.stage == SHADOW

    @property
    def outcome(self) -> Answered:
        """How it was answered, once it is over."""
        return Answered(self._failed, self._fell_back, None if self._nano is None else self._nano / NANO)

    @property
    def _nano(self) -> int | None:
        return list_nano(self._report, self._records)

    @property
    def counted(self) -> tuple[str, float, str | None] | None:
        """(unit, when it called, its trace's id if it has one) of a call that counts, once it is over; else None."""
        if self._trials is None or self._place is None or self._place.unit is None:
            return None
        trace = self._trace or next((each.trace_id for each in self._records if each.trace_id), None)
        return self._place.unit, self._at, trace

    @property
    def abandoned(self) -> bool:
        """Whether its caller left before it had ended."""
        return not self._ended

    @property
    def failed(self) -> bool:
        """Whether it raised, or was abandoned."""
        return self._failed or not self._ended

    def _was(self, place: Assignment) -> Call:
        """What the call was, whether it ended or was abandoned, as a stream that nobody reads to its end."""
        assert place.unit is not None
        cached = any(each.cached for each in self._records)
        until = time.monotonic() if self._until is None else self._until
        latency = None if cached else until - self._began  # clocks are set now and then
        return Call(
            place.experiment, place.unit, self._at, self._failed, self._fell_back, self._nano, latency,
            place.variant, not self._ended, self._made, Once(),
        )  # fmt: skip
