"""What this library refuses, and why: every refusal is a typed, non-retryable DSPy `LMError`.

Upstream failures keep DSPy's own classes (`LMTimeoutError`, `LMServerError`, ...). The classes here mean that *we*
said no, before or instead of sending a request. Each carries data (`reason`, `retry_after`, ...) and a sentence that
names the remedy. None derives from the classes that DSPy retries, so a refusal is final for DSPy.
`UnusableAnswerError` alone is an upstream failure: DSPy has no class for an answer with nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dspy.utils.exceptions import LMError, LMServerError


class ConfigError(ValueError):
    """An option is impossible, unknown or contradictory; the message names the field and the remedy.

    Example:
        ```python
        try:
            dspy_prod.RateLimit(rpm=0)
        except dspy_prod.ConfigError as error:
            print(error)  # names the field, and what is allowed
        ```
    """


class OptionError(ConfigError):
    """An option of a policy is impossible or unknown.

    Attributes:
        field: its name; empty when several options contradict each other.
        problem: what is wrong with it, and what is allowed.
    """

    def __init__(self, message: str, *, field: str = "", problem: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.problem = problem


def _rebuild(cls: type[RejectedError], message: str, state: dict[str, Any]) -> RejectedError:
    error = cls(message)
    error.__dict__.update(state)
    error.args = (str(state.get("_text", message)),)
    return error


class RejectedError(LMError):
    """A call this library refused.

    Attributes:
        reason: stable machine-readable word, see the subclasses.
        retry_after: seconds after which the same call may succeed, or None when waiting will not help or the
            moment is unknown.
        route: the model route that refused, when one did.
        timed_out: the call was sent before, its upstream did not answer in time, and it was refused another attempt.

    Example:
        ```python
        try:
            lm("hello")
        except dspy_prod.RejectedError as error:
            print(error.reason, error.retry_after)  # such as budget_exceeded None
        ```
    """

    reason: str = "rejected"
    default_code = "rejected"
    timed_out: bool = False

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: float | None = None,
        route: str | None = None,
        model: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, model=model, code=self.reason, retry_after=retry_after)
        self.route = route
        for name, value in details.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Callable[..., RejectedError], tuple[()]]:
        # Exceptions travel between processes (multiprocessing pools); keyword-only arguments defeat the default.
        return partial(_rebuild, type(self), self.message, {**self.__dict__, "_text": str(self)}), ()


class CircuitOpenError(RejectedError):
    """The route's circuit breaker is open: the upstream failed recently, so the call was not sent.

    Attributes:
        cause_text: what opened the circuit, as text without secrets.

    Example:
        ```python
        lm.breaker("force_open")
        try:
            lm("a question that is in no cache")
        except dspy_prod.CircuitOpenError as error:
            print(error.route, error.cause_text, error.retry_after)
        lm.breaker("reset")
        ```
    """

    reason = "circuit_open"
    default_code = "circuit_open"
    cause_text: str = ""


class RateLimitedError(RejectedError):
    """The rate limit cannot admit the call within `max_wait`, or never could (weight above the limit).

    Attributes:
        dimension: which limit: `requests`, `tokens`, `concurrency`.
        never: no minute could ever hold the call, however long it waited.

    Example:
        ```python
        try:
            lm("hello")
        except dspy_prod.RateLimitedError as error:
            print(error.dimension, error.retry_after)  # such as tokens 12.5
        ```
    """

    reason = "rate_limited"
    default_code = "rate_limited"
    dimension: str = ""
    never: bool = False


class BudgetExceededError(RejectedError):
    """The budget cannot cover the call's upper bound.

    Attributes:
        budget: the budget's name and scope, e.g. `"day/tenant=acme"`.
        limit_usd, spent_usd, held_usd, bound_usd: the arithmetic behind the refusal, in USD.
        missing: what the call does not say and the budget requires: `tenant`, `user` or `tag:<key>`; else empty.
        retry_after: seconds until the budget's next window, where the call would fit into that.

    Example:
        ```python
        small = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=200, budget=dspy_prod.Budget(usd=1e-6, name="small"))
        try:
            small("hello")
        except dspy_prod.BudgetExceededError as error:
            print(error.budget, error.spent_usd, error.bound_usd, error.limit_usd)
        ```
    """

    reason = "budget_exceeded"
    default_code = "budget_exceeded"
    budget: str = ""
    limit_usd: float = 0.0
    spent_usd: float = 0.0
    held_usd: float = 0.0
    bound_usd: float = 0.0
    missing: str = ""

    @property
    def never(self) -> bool:
        """Whether the call may cost more than the whole budget, so that no window would hold it."""
        return self.bound_usd > self.limit_usd


class RunStoppedError(RejectedError):
    """The `Run` that the call belongs to was stopped, so nothing is sent for it any more.

    Attributes:
        run: the run's name.

    Example:
        ```python
        run = dspy_prod.Run("nightly")
        run.stop()
        try:
            with dspy_prod.call_context(run=run):
                lm("hello")
        except dspy_prod.RunStoppedError as error:
            print(error.run)
        ```
    """

    reason = "run_stopped"
    default_code = "run_stopped"
    run: str = ""


class StoppedError(RejectedError):
    """An operator has stopped the program, the model, the tenant, or everything, so nothing is sent for it.

    Of a model that is stopped the next route is asked; anything else is refused for good, until it is resumed.

    Attributes:
        scope: `program`, `model`, `tenant` or `all`. value: which one; empty for `all`.
        why: the operator's reason.

    Example:
        >>> try:  # doctest: +SKIP
        ...     program(question="...")
        ... except StoppedError as error:
        ...     print(error.scope, error.value, error.why)
    """

    reason = "stopped"
    default_code = "stopped"
    scope: str = ""
    value: str = ""
    why: str = ""


class OutageError(RejectedError):
    """No upstream has answered the `Run` that the call belongs to for as long as that waits, `Run(outage=)`.

    The error of the upstream is its `__cause__`. The next answer ends the outage: the run can go on.

    Attributes:
        run: the run's name. models: what did not answer.
        since: when the first of the failures was, in seconds since the epoch. seconds: how long ago that is.

    Example:
        ```python
        try:
            with dspy_prod.call_context(run=dspy_prod.Run("nightly", outage=120)):
                lm("hello")
        except dspy_prod.OutageError as error:
            print(error.models, error.seconds, error.__cause__)
        ```
    """

    reason = "outage"
    default_code = "outage"
    run: str = ""
    models: tuple[str, ...] = ()
    since: float = 0.0
    seconds: float = 0.0


class DeadlineExceededError(RejectedError):
    """The call's own deadline passed while it waited, retried, or while the upstream was working.

    Attributes:
        working: the upstream was being asked; the ledger has (or will have) a record of that attempt, which cost
            nothing if no connection was made in time.

    Example:
        ```python
        try:
            with dspy_prod.call_context(deadline=8.0):
                lm("hello")
        except dspy_prod.DeadlineExceededError as error:
            print(error.working)  # True: the upstream may bill it
        ```
    """

    reason = "deadline_exceeded"
    default_code = "deadline_exceeded"
    working: bool = False


class UnpricedModelError(RejectedError):
    """A budget applies but the call's cost cannot be bounded: no known price, output limit or media size.

    Example:
        ```python
        unknown = dspy_prod.LM("openai/my-model", max_tokens=200, budget=dspy_prod.Budget(usd=5, name="unknown"))
        try:
            unknown("hello")
        except dspy_prod.UnpricedModelError as error:
            print(error)  # names prices={"openai/my-model": ...}
        ```
    """

    reason = "unpriced_model"
    default_code = "unpriced_model"


class StoreUnavailableError(RejectedError):
    """The state store cannot record what a budget or shared limit needs, so nothing was sent.

    Attributes:
        retry_after: seconds until the store is looked at again, where somebody looks.

    Example:
        ```python
        try:
            lm("hello")
        except dspy_prod.StoreUnavailableError as error:
            print(error, lm.health().store)
        ```
    """

    reason = "store_unavailable"
    default_code = "store_unavailable"


class UnusableAnswerError(LMServerError):
    """The upstream answered, and nobody can use the answer. It was retried, and fell back, like any failure of its own.

    Attributes:
        flaw: `empty` (no choices, or nothing in them), `error` (it ended with one), `no_end` (it never said why it
            ended) or `filtered` (a content filter left nothing).
        partial: the answer as it came.

    Example:
        ```python
        try:
            lm("hello")
        except dspy_prod.UnusableAnswerError as error:
            print(error.flaw, error.partial)
        ```
    """

    default_code = "unusable_answer"
    flaw: str = "empty"
    partial: Any = None
