"""The frozen options of every policy. They validate at construction and refuse unknown or impossible values.

Durations are seconds (float) or a `timedelta`. Prices are USD per million tokens, as on price lists.
Behaviour lives elsewhere (`policies/`, `pipeline/`); nothing here sleeps, counts or does I/O.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from dspy_prod.errors import ConfigError, OptionError

if TYPE_CHECKING:
    from typing_extensions import Self


def _seconds(value: Any) -> Any:
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        raise ValueError("a duration is a number of seconds or a timedelta, not a bool")
    return value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a bool")
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Usd = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """Base of all options: frozen, hashable, and strict about names.

    Raises:
        ConfigError: an option is unknown or impossible; the message names it, and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, *args: Any, **data: Any) -> None:
        if args:
            name, fields = type(self).__name__, ", ".join(type(self).model_fields)
            raise TypeError(f"{name} takes keyword arguments only: {name}({fields})")
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explained(type(self), error.errors(include_url=False)[0]) from None

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Self:
        """Options from a mapping, checked as at construction."""
        try:
            return super().model_validate(obj, **how)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            told = first.get("ctx", {}).get("error")  # what the constructor said
            raise (told if isinstance(told, OptionError) else _explained(cls, first)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some options changed; unlike pydantic's, it checks them as at construction."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **update})

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise ConfigError(f"{kind} does not change; make another: options.model_copy(update={{{name!r}: ...}})")

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """What an earlier version pickled has the defaults of the options that came later."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(name, field.default)


def _explained(kind: type[Options], first: Any) -> OptionError:
    """What pydantic found first, in words that name the option, what was given and what is allowed."""
    field, given = str(first["loc"][0]) if first["loc"] else "", first["input"]
    expected = list(kind.model_fields)
    if first["type"] == "extra_forbidden":
        hidden = any(word in field.lower() for word in ("key", "token", "secret", "password"))
        got = "" if hidden else f", got {given!r}"
        problem = f"is no option of {kind.__name__}{got}{_meant(field, expected)}; it has {', '.join(expected)}"
    elif first["type"] == "missing":
        problem = f"is missing; add it, e.g. {field} = ..."
    else:
        problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        problem = problem[:1].lower() + problem[1:]
        if field:
            problem += f", got {given!r}"
        if first["type"] == "literal_error" and isinstance(given, str):
            problem += _meant(given, re.findall("'([^']*)'", first["ctx"]["expected"]))
    name = f"{kind.__name__}: {field}: " if field else f"{kind.__name__}: "
    return OptionError(name + problem, field=field, problem=problem)


def _meant(given: str, choices: list[str]) -> str:
    near = get_close_matches(given, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


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
    """

    failure_threshold: Count | None = 5
    failure_rate: Share | None = 0.5
    window: Count = 100
    window_type: Literal["count", "time"] = "count"
    minimum_calls: Count = 20
    slow_call_duration: Seconds | None = None
    slow_call_rate: Share = 1.0
    recovery_timeout: Seconds = 60.0
    max_recovery_timeout: Seconds = 600.0
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    success_threshold: Count = 3
    half_open_probes: Count = 1
    probe_lease: Seconds = 60.0

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
    """

    rpm: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)] | None = None
    tpm: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)] | None = None
    concurrency: Count | None = None
    burst: Count | None = None
    max_wait: SecondsOrZero | None = None
    guard: SecondsOrZero = 1.0
    estimate: Literal["upper", "learned"] = "upper"
    adaptive: bool = True
    floor: Share = 0.1
    fair_by: Literal["tenant", "user"] | None = None

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
    """

    ttl: Seconds | None = None
    ttl_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_entries: Count = 10_000
    max_bytes: Count = 256 * 1024 * 1024
    single_flight: bool = True
    stale_if_error: SecondsOrZero = 0.0
    shared: bool = False
    persist: bool = True


class Budget(Options):
    """A hard limit on money. It is never exceeded while each call's cost stays within its reserved upper bound.

    Attributes:
        usd: the limit in USD.
        per: the window: `"hour"`, `"day"`, `"month"`, `"total"`, or `"run"` (`call_context(run=...)`, else this
            process). `"call"` caps every single call with all its attempts, fallbacks and `n` answers: what could
            cost more is refused before it is sent, and retries end when the rest would not suffice.
        scope: `"global"`, `"tenant"`, `"user"`, `"model"` or `"tag:<key>"`: each value has a limit of its own.
        name: the budget's identity in its store and namespace; defaults to window and scope.
        timezone: IANA name of the zone in which days and months begin.
        require: refuse a call that does not say its tenant, user or tag, instead of counting it as "anonymous".
        soft: share of the limit at which a `budget_soft` event is emitted.
        degrade_to: model used for the rest of the window once the soft threshold is passed.
        max_wait: longest wait for money that other calls hold, in seconds; default: the deadline, else 60 s.
        shrink_last: clamp `max_tokens` to what is left instead of refusing the last call.
    """

    usd: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False, le=1e9)]
    per: Literal["call", "hour", "day", "month", "total", "run"] = "total"
    scope: str = "global"
    name: str | None = None
    timezone: str = "UTC"
    require: bool = False
    soft: Share | None = None
    degrade_to: str | None = None
    max_wait: SecondsOrZero | None = None
    shrink_last: bool = False

    @field_validator("scope")
    @classmethod
    def _known_scope(cls, value: str) -> str:
        if value in ("global", "tenant", "user", "model") or (value.startswith("tag:") and len(value) > 4):
            return value
        raise ValueError(f"scope={value!r} is not one of 'global', 'tenant', 'user', 'model', 'tag:<key>'")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"timezone={value!r} is not an IANA zone such as 'Europe/Berlin'") from None
        return value

    @model_validator(mode="after")
    def _possible(self) -> Budget:
        if self.per == "call":
            for name in ("scope", "require", "soft", "degrade_to", "max_wait", "shrink_last"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"per='call' caps every single call, for which {name} has no meaning; leave it out"
                    )
        if self.degrade_to is not None and self.soft is None:
            raise ValueError("degrade_to needs soft=, the share of the budget after which it applies")
        return self

    @property
    def limit_nano(self) -> int:
        """The limit in nano-USD, rounded down so that the limit itself is never exceeded."""
        return math.floor(self.usd * 1e9 + 1e-3)

    @property
    def title(self) -> str:
        """The name under which the budget's accounts are kept."""
        return self.name or (self.per if self.scope == "global" else f"{self.per}/{self.scope}")


_LEAST_USD_PER_MILLION: Final = 0.001  # the cheapest model costs ten times as much, the dearest token less


class Price(Options):
    """What a model costs, in USD per million tokens (`per_request` in USD per request).

    A price below $0.001 per million warns: it is the price of one token, most likely (`1.5e-07` where `0.15` is meant).

    Attributes:
        input, output: plain input and output tokens.
        cached_input: input tokens read from the provider's prompt cache; default: `input`.
        cache_write: input tokens written to it; default: `input`.
        reasoning: reasoning tokens; default: `output`.
        per_request: a fee per request, in USD.
        max_output_tokens: the model's own output limit, used to bound a call without `max_tokens`.
        max_input_tokens: the model's context limit, used to bound media whose length nobody tells.
    """

    input: Usd
    output: Usd
    cached_input: Usd | None = None
    cache_write: Usd | None = None
    reasoning: Usd | None = None
    per_request: Usd = 0.0
    max_output_tokens: Count | None = None
    max_input_tokens: Count | None = None

    @model_validator(mode="after")
    def _per_million(self) -> Price:
        rates = {name: getattr(self, name) for name in ("input", "output", "cached_input", "cache_write", "reasoning")}
        tiny = {name: usd for name, usd in rates.items() if usd and usd < _LEAST_USD_PER_MILLION}
        if tiny:
            given = ", ".join(f"{name}={usd!r}" for name, usd in tiny.items())
            meant = ", ".join(f"{name}={float(f'{usd * 1e6:.12g}')!r}" for name, usd in tiny.items())
            warnings.warn(
                f"Price({given}): per million? A Price is in USD per million tokens, and no model is that cheap; "
                f"if this is the price of one token, say Price({meant}). As it stands, a budget spends far too much",
                stacklevel=4,
            )
        return self


PRIORITIES: Final = {"high": 0, "normal": 1, "low": 2}
"""Order of service; smaller goes first."""
