"""One call of an experiment: the variant that answers, the context it answers in, and what the store is told of it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from dspy_prod.context.assignments import Assignment as Place
from dspy_prod.context.current import CallContext, assigned, use
from dspy_prod.experiments.assignment import Assignment
from dspy_prod.experiments.variants import Variant
from dspy_prod.production.report import Records, report_of
from dspy_prod.records import CallRecord
from dspy_prod.stores.trials import Call, Trials


class Turn:
    """A call by one unit, as a context manager around the variant's program.

    Args:
        experiment: its name. trials: where the call is told; None for one that counts for nothing.
        unit: who calls. variant: what answers. assignment: how the unit came by it.
        stage: of the rollout, in words. outer: the context in force. now: the store's time.
    """

    __slots__ = ("_assignment", "_at", "_experiment", "_fell_back", "_records", "_scope", "_trials", "_unit", "variant")

    def __init__(
        self,
        experiment: str,
        trials: Trials | None,
        unit: str | None,
        variant: Variant,
        assignment: Assignment | None,
        stage: str | None,
        outer: CallContext,
    ) -> None:
        self.variant = variant
        self._experiment, self._trials, self._unit, self._assignment = experiment, trials, unit, assignment
        self._records = Records(outer.records)
        propensity = None if assignment is None else assignment.propensity
        place = Place(experiment, variant.name, stage, unit, propensity)
        self._scope = use(assigned(outer, place)._replace(records=self._records))
        self._fell_back = False
        self._at = 0.0

    def __enter__(self) -> Turn:
        self._at = 0.0 if self._trials is None else self._trials.now()
        self._scope.__enter__()
        return self

    def answered(self, result: Any) -> Any:
        """See whether the variant or its fallback has answered."""
        report = report_of(result)
        self._fell_back = report is not None and report.status == "fallback"
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._scope.__exit__(kind, error, traceback)
        finally:
            if self._trials is not None and self._unit is not None:
                self._tell(isinstance(error, Exception))

    def _tell(self, failed: bool) -> None:
        """Post what the call was, whether it ended or was abandoned, as a stream that nobody reads to its end."""
        assert self._trials is not None
        assert self._unit is not None
        records: list[CallRecord] = self._records
        upstream = [each for each in records if not each.cached]
        ended = self._trials.now()
        self._trials.call(
            Call(
                self._experiment, self._unit, self._at, failed, self._fell_back,
                sum([each.list_nano or 0 for each in records]), ended - self._at if upstream else None,
            )
        )  # fmt: skip
