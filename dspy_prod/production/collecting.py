"""What the LM calls of a program were, and whether a call has hung for which something else answered."""

from __future__ import annotations

import sys

from dspy_prod.production.reasons import has_hung
from dspy_prod.production.report import CallReport
from dspy_prod.records import CallRecord


class Records(list[CallRecord]):
    """Collects records, and passes them on to the collector of an enclosing call.

    Whatever its caller was handling when the call began is none of its own.

    Attributes:
        hung: the reports of fallbacks that answered for a call which was sent and not answered in time, whose record
            may come later.
    """

    def __init__(self, outer: list[CallRecord] | None) -> None:
        super().__init__()
        self._outer = outer
        self._handled = sys.exc_info()[1]
        self.hung: list[CallReport] = []

    def append(self, record: CallRecord) -> None:
        """Add a record here and outside."""
        super().append(record)
        if self._outer is not None:
            self._outer.append(record)

    def fell_back(self, report: CallReport, error: BaseException | None, inner: CallReport | None) -> None:
        """A fallback has answered, here and outside.

        Args:
            report: of its answer. error: what it answered for; None where the answer of a `Production` inside is passed
                on, whose report is `inner`.
        """
        if has_hung(error, self._handled) or any(each is inner for each in self.hung):
            self.hung.append(report)
        if isinstance(self._outer, Records):
            self._outer.fell_back(report, error, inner)

    def has_hung(self, error: BaseException | None, report: CallReport | None) -> bool:
        """Whether a call has hung that this error is of; where there is none, the answer with this report."""
        if error is not None:
            return has_hung(error, self._handled)
        return any(each is report for each in self.hung)
