"""A gate: what a version has to show before an alias moves to it.

It answers `pass`, `fail`, `inconclusive` or `error`. No data never passes, and neither does NaN or infinity.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import dspy

from dspy_prod.context.scoring import raising
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.error_text import error_text
from dspy_prod.registry.errors import RegistryError, UnknownVersionError
from dspy_prod.registry.files import plain
from dspy_prod.registry.names import Reference
from dspy_prod.registry.published.loading import exact, put_into
from dspy_prod.registry.published.manifest import ProgramVersion
from dspy_prod.registry.server import Server

Result = Literal["pass", "fail", "inconclusive", "error"]
Threshold = float | tuple[str, float]
SCORE: Final = "score"
"""Name of the metric that a list of scores gives: their mean."""

EXAMPLES: Final = "examples"
"""Key under which a dict of metrics may tell how many examples they were measured on."""

_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True)
class Check:
    """One condition of a gate.

    Attributes:
        name: what was checked, such as `"accuracy"`, `"accuracy vs triage@production"` or `"examples"`.
        result: `pass`, `fail` or `inconclusive`.
        reason: the comparison in words.

    Example:
        ```python
        report = registry.GateReport("fail", (registry.Check("accuracy", "fail", "accuracy 0.7 is below 0.85"),))
        print([check.reason for check in report.checks])
        ```
    """

    name: str
    result: Result
    reason: str


@dataclass(frozen=True)
class GateReport:
    """What a gate found.

    Attributes:
        result: `fail` if any check failed, else `inconclusive` if any is, else `pass`; `error` when the evaluation
            raised.
        checks: each condition.
        metrics: what was measured.
        baseline: what was measured on the baseline.
        examples: how many examples it was measured on, None when the evaluation did not tell.
        seconds: how long it took.
        error: the error, as class name and text.

    Example:
        ```python
        try:
            registry.promote("triage", second, gate=strict, program=program)
        except registry.PromotionRefusedError as error:
            print(error.report.result, error.report.metrics)  # fail {'accuracy': 0.7}
        ```
    """

    result: Result
    checks: tuple[Check, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    examples: int | None = None
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"the gate had an error ({self.error})"
        telling = [check for check in self.checks if check.result != "pass"] or list(self.checks)
        return f"the gate says {self.result} ({'; '.join(check.reason for check in telling)})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows neither NaN nor infinity: those become text."""
        return dict(plain(self))


class PromotionRefusedError(RegistryError):
    """The gate did not pass, so the alias was not moved; the attempt is in the history.

    Attributes:
        report: what the gate found.

    Example:
        ```python
        try:
            registry.promote("triage", second, gate=strict, program=program)
        except registry.PromotionRefusedError as error:
            print(error, error.report.checks)
        ```
    """

    def __init__(self, message: str, report: GateReport) -> None:
        super().__init__(message)
        self.report = report


def refused_error(alias: str, version: object, report: GateReport) -> PromotionRefusedError:
    remedy = "; a person may overrule it with force=True and a reason" if report.result == "inconclusive" else ""
    return PromotionRefusedError(f"{version} was not promoted to {alias}: {report}{remedy}", report)


@dataclass(frozen=True)
class Gate:
    """What a version has to show.

    Args:
        evaluate: takes a program, gives its metrics: a dict of numbers (`{"accuracy": 0.9, "usd": 0.002}`, with
            `"examples"` for their number), a list of scores (their mean is the metric `"score"`), or what
            `dspy.Evaluate` returns. It runs under `dspy_prod.context.scoring.raising()`, so no canned answer is scored.
        thresholds: by metric, the minimum as a number, or `("<=", x)` for costs and latencies.
        baseline: metrics to be no worse than, or a reference such as `"triage@production"` to evaluate beside it.
        margin: by how much a metric may be worse than the baseline's.
        min_examples: on fewer examples the gate is inconclusive.

    Raises:
        ConfigError: it could not fail, or a threshold is no number.

    Example:
        ```python
        def evaluate(program):  # or a function that returns what dspy.Evaluate does
            return {"accuracy": 0.9, "usd": 0.002, "examples": 200}


        gate = registry.Gate(evaluate, thresholds={"accuracy": 0.85, "usd": ("<=", 0.01)}, min_examples=100)
        registry.promote("triage", second, alias="staging", gate=gate, program=program)
        ```
    """

    evaluate: Callable[[Any], Any]
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    baseline: Mapping[str, float] | str | None = None
    margin: float = 0.0
    min_examples: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise ConfigError("Gate(evaluate=...) takes a function of the program")
        if not self.thresholds and self.baseline is None:
            raise ConfigError(
                "a Gate without thresholds and baseline checks nothing; give thresholds={'accuracy': 0.85}"
            )
        for name in self.thresholds:
            sign, bound = self._bound(name)
            if sign not in (">=", "<=") or not _is_finite(bound):
                raise ConfigError(
                    f"thresholds[{name!r}]={self.thresholds[name]!r}: give the minimum as a number, or ('<=', maximum)"
                )
        if isinstance(self.baseline, str):
            Reference.of(self.baseline)
        if not _is_finite(self.margin) or self.margin < 0:
            raise ConfigError(f"margin={self.margin!r} is a number, 0 or more")

    def check(self, server: Server, candidate: ProgramVersion | dspy.Module, program: Any) -> GateReport:
        """Evaluate a candidate. Never raises an `Exception`: that is the result `error`.

        Args:
            server: where the candidate and the baseline are.
            candidate: a version, which is put into a copy of `program`, or a program as it is.
            program: the program from the code.
        """
        began = time.monotonic()
        try:
            metrics, examples = self._measured(server, candidate, program)
            baseline, unknown = self._baseline(server, program)
        except (Exception, SystemExit) as error:  # sys.exit(0) in an evaluation would look like success to a shell
            _log.exception(
                "The gate of %s raised", candidate if isinstance(candidate, ProgramVersion) else "the program"
            )
            return GateReport("error", seconds=time.monotonic() - began, error=error_text(error))
        checks = (*self._checks(metrics, baseline, unknown), *self._count(examples))
        results = {check.result for check in checks}
        result: Result = "fail" if "fail" in results else "inconclusive" if "inconclusive" in results else "pass"
        return GateReport(result, checks, metrics, baseline, examples, time.monotonic() - began)

    def _measured(
        self, server: Server, candidate: ProgramVersion | Reference | dspy.Module, program: Any
    ) -> tuple[dict[str, float], int | None]:
        if isinstance(candidate, ProgramVersion):
            candidate = Reference(candidate.name, candidate.version)
        if isinstance(candidate, Reference):
            copy = program.deepcopy()
            put_into(copy, exact(server, candidate))
        else:
            copy = candidate.deepcopy()
        with raising():
            return _metrics(self.evaluate(copy))

    def _baseline(self, server: Server, program: Any) -> tuple[dict[str, float], str | None]:
        """(the baseline's metrics, why there are none)."""
        if self.baseline is None:
            return {}, None
        if not isinstance(self.baseline, str):
            return dict(self.baseline), None
        try:
            return self._measured(server, Reference.of(self.baseline), program)[0], None
        except UnknownVersionError:
            return {}, f"there is no {self.baseline} to compare with yet"

    def _checks(self, metrics: dict[str, float], baseline: dict[str, float], unknown: str | None) -> list[Check]:
        checks = []
        for name in self.thresholds:
            sign, bound = self._bound(name)
            checks.append(_compared(name, metrics, sign, bound, "the threshold"))
        if self.baseline is None:
            return checks
        if unknown is not None:
            return [*checks, Check("baseline", "inconclusive", unknown)]
        known = self.baseline if isinstance(self.baseline, str) else "the baseline"
        for name in self.thresholds or baseline:
            sign = self._bound(name)[0] if name in self.thresholds else ">="
            base = baseline.get(name, math.nan)
            bound = base - self.margin if sign == ">=" else base + self.margin
            checks.append(_compared(name, metrics, sign, bound, known, f"{name} vs {known}"))
        return checks or [Check("baseline", "inconclusive", f"{known} has no metrics to compare with")]

    def _count(self, examples: int | None) -> list[Check]:
        if examples == 0:
            return [Check(EXAMPLES, "inconclusive", "there were no examples")]
        if self.min_examples is None:
            return []
        if examples is None:
            reason = f"the evaluation does not tell its number of examples, {self.min_examples} are needed"
            return [Check(EXAMPLES, "inconclusive", reason)]
        enough = examples >= self.min_examples
        reason = f"{examples} examples, {self.min_examples} are needed"
        return [Check(EXAMPLES, "pass" if enough else "inconclusive", reason)]

    def _bound(self, name: str) -> tuple[str, Any]:
        given: Any = self.thresholds[name]
        if isinstance(given, (tuple, list)):
            return (str(given[0]), given[1]) if len(given) == 2 else ("", math.nan)
        return ">=", given


def _compared(
    metric: str, metrics: Mapping[str, float], sign: str, bound: float, what: str, name: str | None = None
) -> Check:
    label = name or metric
    if metric not in metrics:
        return Check(label, "inconclusive", f"{metric} was not measured")
    value = metrics[metric]
    if not math.isfinite(value):
        return Check(label, "inconclusive", f"{metric} is {value}, which is no measurement")
    if not math.isfinite(bound):
        return Check(label, "inconclusive", f"{what} has no {metric} to compare with")
    holds = value >= bound if sign == ">=" else value <= bound
    word = "at least" if sign == ">=" else "at most"
    return Check(label, "pass" if holds else "fail", f"{metric} is {value:g}, {what} asks for {word} {bound:g}")


def _metrics(found: Any) -> tuple[dict[str, float], int | None]:
    """What an evaluation gave, as (metrics, number of examples)."""
    if isinstance(found, dspy.Prediction) and "score" in found:  # of dspy.Evaluate
        results = found.get("results")
        return {SCORE: float(found.score)}, None if results is None else len(results)
    if isinstance(found, Mapping):
        metrics = {str(name): float(value) for name, value in found.items()}
        count = metrics.pop(EXAMPLES, None if metrics else 0)
        return metrics, count if count is None else max(0, int(count)) if math.isfinite(count) else 0
    if isinstance(found, Sequence) and not isinstance(found, (str, bytes, bytearray)):
        scores = [float(score) for score in found]
        return ({SCORE: math.fsum(scores) / len(scores)} if scores else {}), len(scores)
    raise TypeError(f"Gate(evaluate=...) gave a {type(found).__name__}; give a dict of metrics or a list of scores")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
