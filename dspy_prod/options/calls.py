"""How a call travels: retry, circuit breaker, rate limit and cache."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from dspy_prod.options.base import Count, Options, Seconds, SecondsOrZero, Share, not_bool

LONGEST_RECOVERY: Final = 600.0
"""Seconds for which a circuit is open at most, whatever a provider's `Retry-After` says, unless it is told another
`max_recovery_timeout`; its jitter comes on top."""


class Retry(Options):
    """Retries of transient upstream failures, in exactly one layer: ours.

    Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff and Jitter"); a provider's
    Retry-After that asks for more wins over it. `budget` is a retry budget in gRPC's style ("Retry throttling", gRFC
    A6): every retry costs one token, every success returns `budget_refill`; while fewer than half the tokens are left,
    failures are not retried, so an outage is not multiplied.

    Attributes:
        attempts: attempts per route, the first included; 1 means no retry.
        patience: seconds a call waits for a route in all (its limit, Retry-After, backoff) while another route is
            left; then that one is asked, and this one again should it fail. A `max_wait` of the route's own limit
            holds instead of it for the first admission.
        backoff: upper bound of the first pause, seconds; doubles with each retry.
        max_backoff: upper bound of any pause, seconds.
        budget: capacity of the retry budget in tokens, per route; None means no retry budget.
        budget_refill: tokens returned by a success.

    Example:
        ```python
        lm = dspy_prod.LM("openai/gpt-4o-mini", retry=dspy_prod.Retry(attempts=5, max_backoff=10))
        ```
    """

    attempts: Count = 3
    backoff: Seconds = 0.5
    max_backoff: Seconds = 20.0
    patience: SecondsOrZero = 2.0
    budget: Annotated[float, Field(gt=0)] | None = 100.0
    budget_refill: Annotated[float, Field(gt=0)] = 1.0


class CircuitBreaker(Options):
    """When to stop calling an upstream that fails, and how to try again (terms of Resilience4j and Polly).

    The circuit opens on any of: `failure_threshold` failures in a row; a failure rate of `failure_rate` over the
    window after `minimum_calls`; a share of `slow_call_rate` calls slower than `slow_call_duration`.

    Attributes:
        failure_threshold: consecutive failures that open the circuit; None disables this rule.
        failure_rate: share of failures in the window that opens the circuit; None disables this rule.
        window: size of the window: a number of calls, or, with `window_type="time"`, seconds.
        window_type: `"count"` or `"time"`.
        minimum_calls: calls the window must hold before a rate is judged.
        slow_call_duration: seconds above which a call counts as slow; None disables this rule.
        slow_call_rate: share of slow calls in the window that opens the circuit.
        recovery_timeout: seconds the circuit stays open before it lets probes through.
        max_recovery_timeout: upper bound of the open interval, which doubles with every trip in a row.
        jitter: share by which each open interval is randomly lengthened, 0 to 1.
        success_threshold: successful probes that close the circuit.
        half_open_probes: probes allowed at the same time while half-open.
        probe_lease: seconds after which a probe that never reported is written off as failed.
        shared: on a durable store, a circuit that opens in one worker is open in all of them, and probes are counted
            over all; each worker goes on to count its own calls. False: each worker finds out for itself, as it also
            does on a memory store and while the store cannot be used.

    Example:
        ```python
        breaker = dspy_prod.CircuitBreaker(failure_threshold=3, slow_call_duration=20, slow_call_rate=0.8)
        lm = dspy_prod.LM("openai/gpt-4o-mini", breaker=breaker)
        ```
    """

    failure_threshold: Count | None = 5
    failure_rate: Share | None = 0.5
    window: Count = 100
    window_type: Literal["count", "time"] = "count"
    minimum_calls: Count = 20
    slow_call_duration: Seconds | None = None
    slow_call_rate: Share = 1.0
    recovery_timeout: Seconds = 60.0
    max_recovery_timeout: Seconds = LONGEST_RECOVERY
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    success_threshold: Count = 3
    half_open_probes: Count = 1
    probe_lease: Seconds = 60.0
    shared: bool = True

    @model_validator(mode="after")
    def _possible(self) -> CircuitBreaker:
        if self.window_type == "count" and self.minimum_calls > self.window:
            raise ValueError(
                f"minimum_calls={self.minimum_calls} can never be reached in a window of {self.window} calls; "
                "lower minimum_calls or raise window"
            )
        if self.max_recovery_timeout < self.recovery_timeout:
            raise ValueError(
                f"max_recovery_timeout={self.max_recovery_timeout:g} is below "
                f"recovery_timeout={self.recovery_timeout:g}; raise it"
            )
        return self


class RateLimit(Options):
    """What may be sent to one provider key and model. Dimensions are admitted together or not at all.

    In ANY window of 60 s, requests stay within `rpm` and tokens within `tpm`, counting for each call the larger of
    real usage and what is still reserved. Callers wait in order instead of failing.

    Attributes:
        rpm: requests per minute.
        tpm: tokens per minute (input and output).
        concurrency: requests in flight at once.
        burst: requests that may go at once; in every `burst / (rpm / 60)` seconds at most this many are sent. The
            default is one second's worth, at least 1.
        max_wait: longest wait for admission in seconds; default: the call's deadline, else 60 s.
        guard: seconds added to the 60 s window to absorb arrival jitter at the provider.
        estimate: how tokens are reserved: `"upper"` (never above the limit) or `"learned"` (running p90 of real
            output: better utilisation, no strict bound).
        adaptive: slow down after a 429 (AIMD) and recover while the limit is really used.
        floor: lowest rate adaptation may reach, as a share of the configured rate.
        fair_by: `"tenant"` or `"user"`: waiting callers of one do not delay those of another.
        on_store_failure: what becomes of calls while a durable store cannot decide. `"local"`: this process goes on
            with its part of the limit, which is the limit divided by `workers`, and at least one request a minute.
            `"refuse"`: StoreUnavailableError. A call with a budget as well goes by its budget first.
        workers: how many processes share the limit; default: as many as were last seen to hold something.

    Example:
        ```python
        limit = dspy_prod.RateLimit(rpm=500, tpm=200_000, concurrency=32, fair_by="tenant")
        lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=200, limit=limit)
        ```
    """

    rpm: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False)] | None = None
    tpm: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False)] | None = None
    concurrency: Count | None = None
    burst: Count | None = None
    max_wait: SecondsOrZero | None = None
    guard: SecondsOrZero = 1.0
    estimate: Literal["upper", "learned"] = "upper"
    adaptive: bool = True
    floor: Share = 0.1
    fair_by: Literal["tenant", "user"] | None = None
    on_store_failure: Literal["local", "refuse"] = "local"
    workers: Count | None = None

    @model_validator(mode="after")
    def _possible(self) -> RateLimit:
        if self.rpm is not None and self.rpm < 1:
            raise ValueError(f"rpm={self.rpm:g} admits no request in any minute; use rpm >= 1")
        if self.burst is not None and self.rpm is None:
            raise ValueError("burst shapes rpm into slices; set rpm too, or use concurrency")
        if self.burst is not None and self.rpm is not None and self.burst > self.rpm:
            raise ValueError(f"burst={self.burst} is above rpm={self.rpm:g}; no minute could hold it: lower burst")
        return self


class Cache(Options):
    """The response cache.

    Attributes:
        ttl: seconds an answer stays fresh; None means no expiry.
        ttl_jitter: share by which each TTL is randomly shortened, so that entries do not expire together.
        max_entries: answers kept in memory and, apart from that, in the store.
        max_bytes: bytes of answers kept in memory and, apart from that, in the store.
        single_flight: identical concurrent calls share one upstream call.
        stale_if_error: seconds past expiry during which an answer is served, marked stale, when every route is
            open or refused.
        shared: answers may cross tenants. Off, a tenant's answer is only ever served to that tenant.
        persist: also keep answers in the store, for other processes and after a restart.

    Example:
        ```python
        lm = dspy_prod.LM("openai/gpt-4o-mini", cache=dspy_prod.Cache(ttl=300, stale_if_error=3600))
        ```
    """

    ttl: Seconds | None = None
    ttl_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_entries: Count = 10_000
    max_bytes: Count = 256 * 1024 * 1024
    single_flight: bool = True
    stale_if_error: SecondsOrZero = 0.0
    shared: bool = False
    persist: bool = True


PRIORITIES: Final = {"high": 0, "normal": 1, "low": 2}
"""Order of service; smaller goes first."""
