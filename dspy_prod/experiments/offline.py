"""What variants are worth on examples, before anybody gets them: `exp.evaluate(...)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from dspy_prod.errors import ConfigError
from dspy_prod.views import Cell, Page, Shown, Table, usd
from dspy_prod.views.cells import Tone
from dspy_prod.views.frames import frame

if TYPE_CHECKING:
    import pandas

    from dspy_prod.statistics.paired import Paired

Result = Literal["pass", "fail", "inconclusive"]

SURE: Final = 0.05
"""A candidate fails when it is worse by more than the margin and chance would do so at most this often."""

_TONES: Final[dict[str, Tone]] = {"pass": "good", "fail": "bad", "inconclusive": "warn"}


@dataclass(frozen=True)
class OfflineScores:
    """What one variant did on the examples.

    Attributes:
        variant: its name. said: what it is, as it was given to the experiment.
        scores: by example, in their order; None where it could not be asked.
        failed: answers that failed by the program's own fault; each scores 0.
        usd_per_1000: dollars that a thousand answers cost at list price, whatever the cache has answered; None where a
            price is unknown.
        seconds: of an answer that came from upstream, mean; None where all were cached.
    """

    variant: str
    said: str
    scores: tuple[float | None, ...]
    failed: int
    usd_per_1000: float | None
    seconds: float | None

    @property
    def answered(self) -> int:
        """How many examples it has a score for."""
        return sum(score is not None for score in self.scores)

    @property
    def mean(self) -> float | None:
        """Of its scores."""
        told = [score for score in self.scores if score is not None]
        return sum(told) / len(told) if told else None


@dataclass(frozen=True, repr=False)
class OfflineReport(Shown):
    """Variants compared on the same examples. Immutable; it prints as a table, and shows itself in a notebook.

    Attributes:
        experiment: its name.
        examples: how many there were to answer.
        variants: what each did, control first.
        paired: each candidate against control, on the examples that both have a score for.
        margin: by how much a candidate's mean score may be lower than control's.
        stopped_by: `completed`, or `budget` when the money ended before the examples.
        spent_usd: what it cost, judges in the metric included; cached answers cost nothing. None where a price is
            unknown.
        budget_usd: the cap.
        url: MLflow's page that compares the first candidate with control; None without tracking, or where MLflow has
            not said so in time. Where MLflow is a database, it is the page of an `mlflow server` on this machine.
        faults: how often the metric raised, by what it raised; such answers score 0.

    Example:
        ```python
        report = exp.evaluate(devset, metric=accuracy, budget_usd=2.0)
        print(report)
        exp.start(gate=report)  # refused unless report.passed
        ```
    """

    experiment: str
    examples: int
    variants: tuple[OfflineScores, ...]
    paired: Mapping[str, Paired]
    margin: float = 0.0
    stopped_by: Literal["completed", "budget"] = "completed"
    spent_usd: float | None = 0.0
    budget_usd: float | None = None
    faults: Mapping[str, int] | None = None
    url: str | None = None

    @property
    def results(self) -> dict[str, Result]:
        """Of each candidate `pass`, `fail` or `inconclusive`.

        As a registry's gate has it: a candidate passes whose mean is at most `margin` below control's, on all examples.
        One that is lower fails where that can hardly be chance (sign-flip test, p <= 0.05); else it is inconclusive,
        and more examples would tell.
        """
        return {each.variant: self._result(each) for each in self.variants[1:]}

    @property
    def passed(self) -> bool:
        """Whether every candidate passes."""
        return all(result == "pass" for result in self.results.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known before the numbers are believed, in words."""
        return tuple(self._warnings())

    def refuse_unless_passed(self, experiment: str, variants: Mapping[str, str]) -> None:
        """Let an experiment begin only after this.

        Args:
            experiment: its name. variants: what they are, by name.

        Raises:
            ConfigError: the gate did not pass, or is of another experiment or of other variants.
        """
        where = f"Experiment({experiment!r}).start(gate=...)"
        if self.experiment != experiment or {each.variant: each.said for each in self.variants} != dict(variants):
            raise ConfigError(f"{where}: the report is of other variants; evaluate these: exp.evaluate(devset, metric)")
        if not self.passed:
            beware = "".join(f"; {warning}" for warning in self.warnings)
            raise ConfigError(
                f"{where}: {self.summary}{beware}. Give more examples, a larger margin= if so much worse is "
                "acceptable, or start without gate="
            )

    @property
    def summary(self) -> str:
        """The gate in one sentence."""
        told = [
            f"{name} {result}" + (f" ({self._compared(name)})" if name in self.paired else "")
            for name, result in self.results.items()
        ]
        ended = "" if self.stopped_by == "completed" else f"; the budget ended after {self._whole():,} examples"
        return f"offline: {', '.join(told)} on {self.examples:,} examples{ended}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("variants", "paired")},
            "variants": [{**asdict(each), "mean": each.mean, "answered": each.answered} for each in self.variants],
            "paired": {name: asdict(each) for name, each in self.paired.items()},
            "results": self.results, "passed": self.passed, "warnings": list(self.warnings),
        }  # fmt: skip

    def to_frame(self) -> pandas.DataFrame:
        """A row an example, a column a variant: its scores, NaN where it could not be asked.

        Raises:
            ConfigError: pandas is not installed.
        """
        names = [each.variant for each in self.variants]
        rows = zip(*(each.scores for each in self.variants), strict=True)
        return frame((dict(zip(names, row, strict=True)) for row in rows), names).astype(float)

    def _result(self, scores: OfflineScores) -> Result:
        found = self.paired.get(scores.variant)
        if found is None:
            return "inconclusive"
        if found.difference < -self.margin - 1e-12:
            return "fail" if found.p_value <= SURE else "inconclusive"
        return "pass" if found.n == self.examples else "inconclusive"

    def _whole(self) -> int:
        """Examples that all variants have a score for."""
        return sum(None not in row for row in zip(*(each.scores for each in self.variants), strict=True))

    def _compared(self, name: str) -> str:
        found = self.paired[name]
        return f"{found.difference:+.4g}, 95 % {found.low:+.4g} to {found.high:+.4g}"

    def _warnings(self) -> Iterator[str]:
        if self.stopped_by == "budget":
            yield (
                f"the budget of ${self.budget_usd:,.4g} ended after {self._whole():,} of {self.examples:,} examples: "
                "raise budget_usd; what the cache has is not paid again"
            )
        else:
            missing = self.examples - self._whole()
            if missing:
                yield (
                    f"on {missing:,} of {self.examples:,} examples a model could not be asked, so they are left out: "
                    "evaluate again; what the cache has is not paid again"
                )
        for fault, times in (self.faults or {}).items():
            yield f"the metric {fault} for {times:,} answers, which score 0"

    def _view(self) -> Page:
        rows = [self._row(each) for each in self.variants]
        spent = "unknown" if self.spent_usd is None else f"${self.spent_usd:,.4f}"
        cap = "" if self.budget_usd is None else f" of ${self.budget_usd:,.4g}"
        table = Table(
            f"{self.experiment}: offline on {self.examples:,} examples",
            ("variant", "score", "difference", "better/worse", "p", "gate", "USD per 1,000", "seconds", "failed"), rows,
            f"The same examples for all; margin {self.margin:g}; spent {spent}{cap}. USD at list price, as if no "
            "answer had been cached.",
        )  # fmt: skip
        linked = [] if self.url is None else [f"Side by side in MLflow: {self.url}"]
        return Page(table, *linked, *(f"Beware: {each}" for each in self.warnings))

    def _row(self, scores: OfflineScores) -> Sequence[Any]:
        found = self.paired.get(scores.variant)
        result = self.results.get(scores.variant)
        answered = None if scores.answered == self.examples else f"of {scores.answered:,}"
        difference: Any = Cell("", number=True)
        ways: Any = difference
        p_value: Any = difference
        if found is not None:
            between = f"{found.low:+.4g} to {found.high:+.4g}"
            difference = Cell(f"{found.difference:+.4g}", below=(between,), number=True)
            ways = Cell(f"{found.better:,}/{found.worse:,}", number=True)
            p_value = Cell("<0.0001" if found.p_value < 1e-4 else f"{found.p_value:.2g}", number=True)
        mean = "–" if scores.mean is None else f"{scores.mean:.4g}"
        return (
            Cell(scores.variant, below=(scores.said if scores.said != scores.variant else None,)),
            Cell(mean, "strong", (answered,), number=True), difference, ways, p_value,
            Cell("control" if result is None else result, "faint" if result is None else _TONES[result]),
            usd(scores.usd_per_1000, 4), scores.seconds, scores.failed,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<OfflineReport of {self.experiment!r}: {self.summary}>"
