"""What one call of a `Production` did: `CallReport`, and how it is found again."""

from __future__ import annotations

from typing import Any, Final, Literal

import dspy
from pydantic import BaseModel, ConfigDict

from dspy_prod.production.reasons import Reason
from dspy_prod.views import Cell, Shown, Table
from dspy_prod.views import usd as in_usd
from dspy_prod.views.cells import Tone

Status = Literal["ok", "cached", "fallback"]

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
        experiment, variant, stage: of the innermost experiment that it ran in; else the first two of one within it.
        prompt_version: the published version of the program, e.g. `"triage/7"`, when it is one.
        trace_id: id of the trace the call belongs to, when one was active.
        call_ids: ids of the LM calls, as in the ledger.
        list_cost_usd: what all LM calls would have cost without a cache; None when any of it is unknown.
        id: id of the call's record, see `lm.ledger.program_calls`; None where none was kept.

    Example:
        ```python
        report = dspy_prod.call_report(service(message="The app crashes."))
        print(report.status, report.reason, report.model, report.cost_usd)
        ```
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
    experiment: str | None = None
    variant: str | None = None
    stage: str | None = None
    prompt_version: str | None = None
    trace_id: str | None = None
    call_ids: tuple[str, ...] = ()
    list_cost_usd: float | None = None
    id: str | None = None

    def _view(self) -> Table:
        tone: Tone = "warn" if self.status == "fallback" else "good"
        by = None if self.model is None else Cell(self.model, below=(f"route {self.route}" if self.route else None,))
        rows: list[tuple[str, Any]] = [
            ("status", Cell(self.status, tone, (self.reason, self.error))),
            ("answered by", by),
            ("cost, USD", in_usd(self.cost_usd, 9)),
            *([("list cost, USD", in_usd(self.list_cost_usd, 9))] if self.list_cost_usd != self.cost_usd else []),
            ("attempts upstream", self.attempts),
            ("tokens in", self.usage.input_tokens),
            ("tokens out", self.usage.output_tokens),
            ("seconds", Cell(f"{self.latency:.2f}", below=(f"{self.waited:.2f} of them waiting",), number=True)),
            *((name, value) for name, value in self._belongs() if value),
        ]
        return Table(f"A call of {self.program or 'a program'}", ("", ""), rows)

    def _belongs(self) -> list[tuple[str, str | None]]:
        """What it was a part of."""
        where = [("experiment", self.experiment), ("variant", self.variant), ("stage", self.stage)]
        return [*where, ("program version", self.prompt_version), ("trace", self.trace_id)]


def call_report(prediction: Any) -> CallReport:
    """What the call did that gave this prediction.

    It sees the calls of `dspy_prod.LM`, and those of a plain `dspy.LM` as far as DSPy's history tells, when that is
    on. An attempt that was abandoned at its deadline and still runs upstream is in the ledger once it ends.

    Args:
        prediction: as returned (or streamed last) by a `Production`.

    Raises:
        ValueError: the prediction did not come from a `Production`, or was copied since.

    Example:
        ```python
        prediction = service(message="The app crashes.")
        print(dspy_prod.call_report(prediction).status)  # ok
        ```
    """
    report = report_of(prediction)
    if report is None:
        raise ValueError(
            "call_report takes the Prediction that a dspy_prod.Production returned, itself and not a copy; "
            f"this {type(prediction).__name__} has no report. Wrap the program: prod = dspy_prod.Production(program)"
        )
    return report


def attach(report: CallReport, prediction: dspy.Prediction) -> None:
    """Make a report that of a prediction."""
    object.__setattr__(prediction, _ATTRIBUTE, report)


def report_of(prediction: Any) -> CallReport | None:
    """The report that a prediction carries, None without one."""
    report = getattr(prediction, "__dict__", {}).get(_ATTRIBUTE)
    return report if isinstance(report, CallReport) else None
