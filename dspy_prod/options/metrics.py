"""What an experiment measures: outcomes of a program's users, what is good, and how much worse is still acceptable."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dspy_prod.options.base import Options, not_bool

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def duration(value: Any) -> Any:
    """Seconds, of a timedelta or of text such as `\"3d\"`; anything else as it is, a ValueError for what cannot be."""
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        raise ValueError("a window is a number of seconds, a timedelta or text such as '3d', not a bool")
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", value)
        if found is None:
            raise ValueError("a window in words is a number and one of s, m, h, d, w, such as '30m', '12h' or '3d'")
        return float(found[1]) * _UNITS[found[2]]
    return value


LARGEST: Final = 1e60
"""No value is larger: of what is, no sums and squares could be kept."""

Window = Annotated[float, BeforeValidator(duration), Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False)]


class Metric(Options):
    """One outcome by which the variants of an experiment are compared, one value a unit (a user, say).

    Three kinds of values are understood. Scores lie between `bounds`: right or wrong, a rating, a failure; margins are
    in the same unit, so 0.02 is two points of a share. With `relative=True` values are amounts from 0 on, such as
    cost; a margin of 0.10 means ten per cent of control's mean. With `tail=0.95` values are amounts too, of which the
    share above control's 95th percentile counts, and a margin of 0.02 means two points of that share.

    Attributes:
        name: under which outcomes are recorded.
        direction: whether `"higher"` or `"lower"` values are better.
        margin: by how much worse a variant may be and still be promoted. A guardrail needs one. Of a success metric,
            None means that it is never asked to be proven no worse.
        role: a `"success"` metric is what a variant can win by; a `"guardrail"` is what it must not harm.
        per: a unit's value is the mean over all its calls in the window (`"unit"`), or that of its first (`"first"`).
        window: seconds (or a timedelta, or `"30m"`, `"12h"`, `"3d"`) after its exposure at which a unit's outcome is
            counted: the same for all, so that a faster variant does not look better for answering sooner.
        missing: what a unit counts for that nothing was recorded of; `"exclude"` leaves it out, and guards the share of
            units that answer: if the variants differ in it, the metric says nothing.
        bounds: least and largest score.
        relative: values are amounts from 0 on, compared as a ratio.
        cap: amounts above it count as `cap` where means are compared, of a relative metric only; None means ten times
            the mean of control's first units.
        tail: a quantile; see above.
        judge: `"untrusted"` or `"trusted"` for scores that a language model gives. An untrusted judge alone never
            promotes: what it likes about a variant's style would count as quality.

    Raises:
        ConfigError: a value is impossible; the message names the field and the remedy.

    Example:
        >>> Metric(name="resolved", margin=0.02, window="3d").window
        259200.0
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    direction: Literal["higher", "lower"] = "higher"
    margin: _Positive | None = None
    role: Literal["success", "guardrail"] = "success"
    per: Literal["unit", "first"] = "unit"
    window: Window = 0.0
    missing: Annotated[float, BeforeValidator(not_bool), Field(allow_inf_nan=False)] | Literal["exclude"] = 0.0
    bounds: tuple[float, float] = (0.0, 1.0)
    relative: bool = False
    cap: _Positive | None = None
    tail: Annotated[float, BeforeValidator(not_bool), Field(ge=0.5, lt=1)] | None = None
    judge: Literal["trusted", "untrusted"] | None = None

    def __init__(self, name: str | None = None, /, **data: Any) -> None:
        super().__init__(**({} if name is None else {"name": name}), **data)

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not -LARGEST <= low < high <= LARGEST:
            raise ValueError("bounds are the least and the largest score, such as (0, 1) or (1, 5)")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Metric:
        low, high = self.bounds
        amounts = self.relative or self.tail is not None
        if self.relative and self.tail is not None:
            raise ValueError("relative and tail exclude each other: leave one out, or make two metrics")
        if amounts and self.bounds != (0.0, 1.0):
            raise ValueError("bounds are for scores; leave them out of an amount, and set cap= to bound a relative one")
        if self.cap is not None and not self.relative:
            raise ValueError("cap bounds amounts; set relative=True too, or use bounds=")
        if self.tail is not None and self.direction != "lower":
            raise ValueError("tail counts what is too high; set direction='lower'")
        if self.role == "guardrail" and self.margin is None:
            raise ValueError("margin is missing: a guardrail must say how much worse is acceptable, e.g. margin=0.02")
        if self.margin is not None:
            reach = 1.0 if self.tail is not None else high - low
            if self.relative and self.direction == "higher" and self.margin >= 1:
                raise ValueError(f"margin={self.margin:g} accepts losing everything; use a share below 1, e.g. 0.1")
            if not self.relative and self.margin >= reach:
                raise ValueError(f"margin={self.margin:g} accepts everything: scores differ by {reach:g} at most")
        if self.missing != "exclude" and not (self.missing >= 0 if amounts else low <= self.missing <= high):
            least = 0.0 if amounts else low
            raise ValueError(
                f"missing={self.missing:g} is no value that the metric can have; say what a unit without an answer "
                f"counts for, e.g. missing={least:g}, or missing='exclude'"
            )
        return self

    @property
    def some(self) -> bool:
        """Whether only some units have an amount, for reasons that tell nothing of them: see `neighbours`."""
        return self.tail is not None and self.missing == "exclude"

    def checked(self, value: float) -> float:
        """The value as a float, if a unit can have it.

        Raises:
            ValueError: it is no finite number, lies outside `bounds`, or is an amount below 0 or beyond `LARGEST`.
        """
        number = float(value)
        amounts = self.relative or self.tail is not None
        low, high = (0.0, LARGEST) if amounts else self.bounds
        if not low <= number <= high:
            meant = f"an amount of 0 or more, up to {LARGEST:g}" if amounts else f"a score between {low:g} and {high:g}"
            raise ValueError(f"{self.name}={value!r} is not {meant}; scale it, or declare it otherwise in its Metric")
        return number


def error_rate(margin: float = 0.02, **options: Any) -> Metric:
    """Share of a unit's calls that failed; two points more are acceptable by default.

    Without a window it is the unit's first call alone that counts, which can be compared at once; what happens later is
    on the scorecard, by variant, with a warning where it says otherwise. With one (`window="1d"`) it is the mean of all
    calls within it, once it is over. The guardrails that calls tell have one window together.

    A unit whose first call takes long is waited for until the call ends: until its deadline, or for ten minutes where
    it has none. One that goes on beyond, and one whose process was lost a minute ago, counts as one that failed: a
    program that takes its process with it is no success. A call that its caller leaves (a time-out of his own, a stream
    that nobody reads) has not failed, since nobody knows whether it would have; the scorecard has the share of them by
    variant, and warns where it differs. Give calls a deadline (`call_context(deadline=)`): then one that hangs fails.

    Example:
        >>> error_rate(window="1d").window
        86400.0
    """
    return Metric(
        **{"name": "error_rate", "direction": "lower", "role": "guardrail", "margin": margin, "missing": 1.0, **options}
    )


def fallback_rate(margin: float = 0.02, **options: Any) -> Metric:
    """Share of a unit's calls that a fallback answered; two points more are acceptable by default.

    Which calls count is as of `error_rate`: the first one, or with a window all within it.

    Example:
        >>> fallback_rate(margin=0.01).margin
        0.01
    """
    return Metric(**{"name": "fallback_rate", "direction": "lower", "role": "guardrail", "margin": margin, **options})


def cost(margin: float = 0.10, **options: Any) -> Metric:
    """USD a call at list price: a cached answer counts for what it would have cost, since a new variant's cache is
    cold. Ten per cent more are acceptable by default.

    Which calls count is as of `error_rate`: the first one, or with a window the mean of all within it. Where nothing
    has cost anything in either variant, as of local models, that is no obstacle to a promotion once there are 149 users
    of each.

    Example:
        >>> cost(margin=0.2).relative
        True
    """
    return Metric(
        **{"name": "cost", "direction": "lower", "role": "guardrail", "margin": margin, "relative": True, **options}
    )


def latency(margin: float = 0.02, **options: Any) -> Metric:
    """Seconds a call. Two points more of the units may be slower than control's 95th percentile.

    An answer from a cache tells nothing of how long a program takes, and has no latency: see
    `experiments.neighbours` for how the others are compared. Which calls count is as of `error_rate`.

    Example:
        >>> latency(margin=0.05).tail
        0.95
    """
    return Metric(
        **{
            "name": "latency", "direction": "lower", "role": "guardrail", "margin": margin, "tail": 0.95,
            "missing": "exclude", **options,
        },
    )  # fmt: skip


def guardrails() -> tuple[Metric, ...]:
    """What every experiment watches unless told otherwise."""
    return error_rate(), fallback_rate(), cost(), latency()
