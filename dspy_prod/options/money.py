"""What calls may cost, and what models do: budgets and prices."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dspy_prod.options.base import Count, Options, SecondsOrZero, Share, Usd, not_bool


class Caps(Options):
    """What a run may use in all; None: as much as it likes.

    Attributes:
        usd: dollars. calls: upstream attempts, retries and fallbacks included. tokens: input and output together.
    """

    usd: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False, le=1e9)] | None = None
    calls: Count | None = None
    tokens: Count | None = None

    @property
    def usd_nano(self) -> int | None:
        """The dollars in nano-USD."""
        return None if self.usd is None else _nano(self.usd)


class Budget(Options):
    """A hard limit on money. It is never exceeded while each call's cost stays within its reserved upper bound.

    Attributes:
        usd: the limit in USD.
        per: the window: `"hour"`, `"day"`, `"month"`, `"total"`, or `"run"` (`call_context(run=...)`, else this
            process). `"call"` caps every single call with all its attempts, fallbacks and `n` answers: what could
            cost more is refused before it is sent, and retries end when the rest would not suffice.
        scope: `"global"`, `"tenant"`, `"user"`, `"model"` or `"tag:<key>"`: each value has a limit of its own.
        name: the budget's identity in its store and namespace; defaults to window and scope. Under a name, settings may
            change while what is spent stays; but each window, scope and time zone has accounts of its own.
        timezone: IANA name of the zone in which days and months begin.
        require: refuse a call that does not say its tenant, user or tag, instead of counting it as "anonymous".
        soft: share of the limit at which a `budget_soft` event is emitted.
        degrade_to: model used for the rest of the window once the soft threshold is passed.
        max_wait: longest wait for money that other calls hold, in seconds; default: the deadline, else 60 s.
        shrink_last: clamp `max_tokens` to what is left instead of refusing the last call.
        on_store_failure: what becomes of calls while a durable store cannot decide. `"refuse"`: StoreUnavailableError.
            `"local"`: this process goes on within a tenth of what was left when it saw the budget last, or half of that
            divided by the number of processes if that is less; then, or where it has not seen it, it refuses. What was
            spent is charged when the store is back; a process that is killed before takes it along.

    Example:
        ```python
        daily = dspy_prod.Budget(usd=50, per="day", timezone="Europe/Berlin", soft=0.8)
        each = dspy_prod.Budget(usd=1, per="month", scope="tenant", require=True)
        lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=200, budget=[daily, each])
        ```
    """

    usd: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False, le=1e9)]
    per: Literal["call", "hour", "day", "month", "total", "run"] = "total"
    scope: str = "global"
    name: str | None = None
    timezone: str = "UTC"
    require: bool = False
    soft: Share | None = None
    degrade_to: str | None = None
    max_wait: SecondsOrZero | None = None
    shrink_last: bool = False
    on_store_failure: Literal["refuse", "local"] = "refuse"

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
            for name in ("scope", "require", "soft", "degrade_to", "max_wait", "shrink_last", "on_store_failure"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"per='call' caps every single call, for which {name} has no meaning; leave it out"
                    )
        if self.degrade_to is not None and self.soft is None:
            raise ValueError("degrade_to needs soft=, the share of the budget after which it applies")
        return self

    @property
    def limit_nano(self) -> int:
        """The limit in nano-USD."""
        return _nano(self.usd)

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

    Example:
        ```python
        mine = dspy_prod.Price(input=0.15, output=0.60, max_output_tokens=4_096)
        lm = dspy_prod.LM("openai/my-model", prices={"openai/my-model": mine})
        ```
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


def _nano(usd: float) -> int:
    """Dollars in nano-USD, rounded down so that the limit itself is never exceeded."""
    return math.floor(usd * 1e9 + 1e-3)
