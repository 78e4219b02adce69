"""What a run of an optimizer found and what it cost: `best.optimization`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.candidates import Candidate
from dspy_prod.optimize.facts import Facts, Selection, Spent
from dspy_prod.views import Shown
from dspy_prod.views.frames import frame

if TYPE_CHECKING:
    import dspy
    import pandas

    from dspy_prod.views import Page

__all__ = ["OptimizationReport", "Selection", "Spent"]

_COLUMNS = (
    "candidate", "origin", "parents", "status", "score", "predicted", "examples", "cost_usd", "usd_per_answer",
    "tokens", "latency", "demos", "found_usd", "prompts",
)  # fmt: skip

_NUMBERS = ("score", "predicted", "cost_usd", "usd_per_answer", "latency", "found_usd")
_COUNTS = ("candidate", "examples", "tokens", "demos")
"""Columns that are numbers, also where no candidate has one, and where there is no candidate."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class OptimizationReport(Shown, Facts):
    """What a run of an optimizer found, what it cost, and why it ended: `best.optimization`, `optimizer.report`.

    It belongs to the program object in this process. `copy.deepcopy(best)` has the very same report;
    `best.save()` and `dump_state()` do not have it, and where a program is pickled as a whole, `None` takes its
    place, since all candidates would go along: keep it with `to_dict()`, or in MLflow.

    Its facts are the attributes of `dspy_prod.optimize.facts.Facts`.

    Example:
        ```python
        report = best.optimization
        print(report)
        cheap = report.cheapest(within=0.01)
        ```
    """

    def program(self, index: int) -> dspy.Module:
        """A candidate as a program of its own: a copy of the given one with its instructions, demos and settings.

        Args:
            index: the candidate's number, as in `to_frame()`; 0 is the given program.

        Raises:
            ConfigError: there is no such candidate.
        """
        found = next((one for one in self.candidates if one.index == index), None)
        if found is None:
            known = ", ".join(str(one.index) for one in self.candidates[:20]) or "none"
            raise ConfigError(f"program({index!r}): there is no such candidate; numbers are {known}")
        return self._made(found)

    def cheapest(self, within: float = 0.01) -> dspy.Module:
        """The program with the cheapest answers among those that are about as good as the best.

        Args:
            within: how much lower its score on the selection set may be, in units of the metric.

        Raises:
            ConfigError: no cost per answer is known, or no candidate is complete.
        """
        return self._made(self.cheapest_candidate(within))

    def cheapest_candidate(self, within: float = 0.01) -> Candidate:
        """The candidate whose program `cheapest` returns, to read what it costs; raises as `cheapest`."""
        if isinstance(within, bool) or not isinstance(within, (int, float)) or not isfinite(within) or within < 0:
            raise ConfigError(f"cheapest(within={within!r}): a score of 0 or more by which it may be worse")
        complete = [one for one in self.candidates if one.status == "complete" and one.score is not None]
        if not complete:
            raise ConfigError("cheapest(): no candidate was evaluated on the whole selection set; give the run more")
        top = max(one.score for one in complete if one.score is not None)
        # A score 0.01 below the best must count as within 0.01 of it, whatever floats say.
        near = [one for one in complete if one.score is not None and one.score >= top - within - 1e-12]
        priced = [one for one in near if one.usd_per_answer is not None]
        if not priced:
            raise ConfigError("cheapest(): no cost per answer is known; give the LM's prices, dspy_prod.LM(prices=...)")
        return min(priced, key=lambda one: (one.usd_per_answer, -(one.score or 0.0), one.index))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the programs' states, as plain values for JSON.

        Example:
            ```python
            Path("report.json").write_text(json.dumps(report.to_dict()))
            ```
        """
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "_make"}
        told["baseline"], told["best"] = (None if one is None else one.index for one in (self.baseline, self.best))
        plain: dict[str, Any] = _plain(told)
        return plain

    def to_frame(self) -> pandas.DataFrame:
        """A row a candidate, in the order in which they were tried; what a candidate has no number of is NaN.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows = (
            {
                **{name: getattr(one, name) for name in _COLUMNS[1:]},
                "candidate": one.index,
                "demos": sum(one.demos.values()),
                "prompts": "\n\n".join(one.prompts.values()),
            }
            for one in self.candidates
        )
        found = frame(rows, _COLUMNS)
        return found.astype(dict.fromkeys(_NUMBERS, float) | dict.fromkeys(_COUNTS, int))

    def _made(self, candidate: Candidate) -> dspy.Module:
        if self._make is None:
            raise ConfigError("this report has no programs: it was not made by a run in this process")
        return self._make(candidate)

    def _view(self) -> Page:
        from dspy_prod.optimize.pages import page

        return page(self)

    def _repr_html_(self) -> str:
        from dspy_prod.optimize.pages import page

        return page(self, pictures=True).html()

    def __repr__(self) -> str:
        found = "nothing complete" if self.best_score is None else f"best score {self.best_score:.4g}"
        return (
            f"<OptimizationReport of {self.optimizer} {self.run!r}: {self.stopped_by}, {found}, "
            f"${self.spent_usd:.4f}, {len(self.candidates)} candidates>"
        )

    def __copy__(self) -> OptimizationReport:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizationReport:
        return self  # frozen, and a copy of a program was found by the same run

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # see the class; whoever unpickles the program needs nothing of ours for it


def _plain(value: Any) -> Any:
    """The value as JSON has it; of a candidate all but its state."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if one.name != "state"}
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
