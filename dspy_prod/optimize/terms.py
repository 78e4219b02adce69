"""What an optimization may use, and how it is to go about it: the options of `BudgetedOptimizer`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dspy_prod.options.base import Count, Options, Seconds, SecondsOrZero, not_bool

View = Literal["auto", "bar", "table", "log"]


class Terms(Options):
    """The terms of a run. `BudgetedOptimizer` documents each of them.

    Attributes:
        budget_usd: dollars, at most. max_calls: upstream attempts. max_tokens: input and output together.
        max_time: seconds.
        racing: with which probability the winner of full evaluation must be kept; None evaluates everything.
        margin: how much worse than the best, in units of the score, does not matter to a race.
        reserve: share of the caps that is kept for evaluating finalists; `"auto"` measures it.
        stop_at: a score that is good enough. patience: candidates without a better one after which to stop.
        priority: of the run's calls, among others under the same limits.
        patience_outage: seconds that an outage of the models may last.
        foreign: what to do about calls that no cap could hold.
        view: how the run is shown. track: whether MLflow gets its candidates; None: when tracking is on.
        sample: share of the run's traces that tracking keeps.
    """

    budget_usd: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False, le=1e9)] | None = None
    max_calls: Count | None = None
    max_tokens: Count | None = None
    max_time: Seconds | None = None
    racing: Annotated[float, BeforeValidator(not_bool), Field(ge=0.5, le=0.99)] | None = None
    margin: Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)] = 0.0
    reserve: Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    stop_at: Annotated[float, BeforeValidator(not_bool), Field(allow_inf_nan=False)] | None = None
    patience: Count | None = None
    priority: Literal["high", "normal", "low"] = "low"
    patience_outage: SecondsOrZero = 120.0
    foreign: Literal["refuse", "allow"] = "refuse"
    view: View | None = "auto"
    track: bool | None = None
    sample: Annotated[float, BeforeValidator(not_bool), Field(ge=0, le=1)] = 0.02
