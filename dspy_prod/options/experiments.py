"""How an experiment on live traffic goes on: the stages of its rollout."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from itertools import pairwise
from math import isfinite
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from dspy_prod.options.base import Options, not_bool

SHADOW: Final = "shadow"
"""The stage in which candidates run beside control, and nobody sees their answers."""

FIRST_USERS: Final = 25
"""Users a candidate has before the first stage with traffic may end, if nothing else is said; then 4 times as many."""


def _stages(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ValueError(f"give the shares in a tuple, such as ({SHADOW!r}, 0.01, 0.25)")
    for index, stage in enumerate(value):
        if stage == SHADOW:
            if index:
                raise ValueError(f"{SHADOW!r} can only come first: who got a candidate would lose it; move it")
        elif isinstance(stage, bool) or not isinstance(stage, int | float) or not 0 < stage < 1:
            whole = stage == 1 and stage is not True
            known = "leaving no control to compare with: promote at the end" if whole else "no share"
            raise ValueError(f"stage {index + 1} is {stage!r}, {known}; a stage is {SHADOW!r} or a share below 1")
    shares = [stage for stage in value if stage != SHADOW]
    for before, after in pairwise(shares):
        if after <= before:
            raise ValueError(f"{after!r} after {before!r}: each share is above the one before it; sort them")
    if not value:
        raise ValueError("an empty rollout has no stage; give one, such as (0.1, 0.5)")
    if not shares:
        raise ValueError(f"nobody gets a candidate after {SHADOW!r}, so that it could never end; add shares, as 0.1")
    return value


def _each(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A check of one value, or of one for each stage."""

    def checked(value: Any) -> Any:
        return tuple(map(check, value)) if isinstance(value, list | tuple) else check(value)

    return checked


def _users(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{value!r} is no number of users; give a whole number, 0 or more, for all stages or for each")
    return value


def _duration(value: Any) -> Any:
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is no duration; give seconds or a timedelta, for all stages or for each")
    return float(value)


Stage = float | Literal["shadow"]
_Users = BeforeValidator(_each(_users))
_Durations = BeforeValidator(_each(_duration))


class Rollout(Options):
    """The stages of an experiment: which share of the users gets candidates, and when the next share may follow.

    A user who has a candidate keeps it when the share grows. The share is that of all candidates together; each gets
    a part of it by its weight. A stage ends when every candidate has had `min_users` in it, `min_time` is over, and
    nothing speaks against the candidates; harm ends the experiment at any moment (EXPERIMENTS 2.4).

    A user is had with the exposure, and not only when its window is over: what first calls tell (`error_rate` and the
    other guardrails) is known then, what a metric with a window tells is not. Where the success metric is to be seen
    before more users get a candidate, say a `min_time` above its window.

    What is said of stages is one value for all of them, or one for each.

    Attributes:
        stages: shares of the users, each above 0, below 1 and above the one before; `"shadow"` may come first. Then
            candidates run unseen on some of the live inputs: for programs without side effects.
        shadow_share: share of the calls that candidates answer once more in a shadow stage. shadow_calls: how many each
            must have answered before the next stage begins; what a limit, a budget or a deadline refuses is none.
            shadow_usd: what all of these may cost together; None: no cap. They count for no budget of a user or tenant,
            and have two minutes each, whatever the caller's deadline is. shadow_tools: `"refuse"` a shadow stage of
            programs that use tools, which would do everything twice; `"allow"` it where they only read.
        max_users: users who may get a candidate in a stage, for each candidate; None: any number. Whoever comes after
            them gets control.
        min_users: users a candidate must have had in a stage before the next one begins, whether their windows are
            over or not. Default: 25 in the first stage with traffic, then 4 times as many from stage to stage.
        min_time: seconds that a stage lasts at least.
        max_time: seconds after which a stage that could not end is inconclusive; None: never.
        on_inconclusive: what happens then: `"pause"` (nobody new gets a candidate until somebody resumes, and who has
            one keeps it; `stop` gives control to everybody), or `"hold"` (it goes on as it is, and somebody is told).

    Raises:
        ConfigError: stages that fall, a shadow stage that is not first, or lengths that do not agree.

    Example:
        >>> rollout = Rollout(stages=("shadow", 0.01, 0.25, 0.5), max_users=(0, 50, 250, None))
        >>> rollout.shares
        (0.0, 0.01, 0.25, 0.5)
        >>> rollout.least_users(2), rollout.most_users(1), rollout.most_users(3)
        (100, 50, None)
    """

    stages: Annotated[tuple[Stage, ...], BeforeValidator(_stages)] = (0.01, 0.05, 0.25, 0.5)
    max_users: Annotated[tuple[int | None, ...] | int | None, _Users] = None
    min_users: Annotated[tuple[int, ...] | int | None, _Users] = None
    min_time: Annotated[tuple[float, ...] | float, _Durations] = 300.0
    max_time: Annotated[tuple[float | None, ...] | float | None, _Durations] = None
    on_inconclusive: Literal["pause", "hold"] = "pause"
    shadow_share: Annotated[float, BeforeValidator(not_bool), Field(gt=0, le=1)] = 0.1
    shadow_calls: Annotated[int, BeforeValidator(not_bool), Field(ge=1)] = 100
    shadow_usd: Annotated[float, BeforeValidator(not_bool), Field(gt=0, allow_inf_nan=False)] | None = None
    shadow_tools: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="after")
    def _possible(self) -> Rollout:
        for name in ("max_users", "min_users", "min_time", "max_time"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.stages):
                raise ValueError(
                    f"{name} has {len(given)} values for {len(self.stages)} stages; give one for each, or a single one"
                )
        if self.shadow and isinstance(self.max_users, tuple) and self.max_users[0]:
            raise ValueError(
                f"max_users begins with {self.max_users[0]}, but nobody gets a candidate in a shadow stage; say 0"
            )
        for stage, share in enumerate(self.stages):
            most, least = self.most_users(stage), self.least_users(stage)
            last = stage == len(self.stages) - 1
            if share != SHADOW and not last and most is not None and most < least:
                raise ValueError(
                    f"max_users={most} of the stage {share!r} is below its min_users={least}, so that it could never "
                    "end; raise max_users or lower min_users"
                )
            longest, shortest = self.most_time(stage), self.least_time(stage)
            if longest is not None and longest < shortest:
                raise ValueError(
                    f"max_time={longest:g} of the stage {share!r} is below its min_time={shortest:g}; raise max_time"
                )
        return self

    @property
    def shadow(self) -> bool:
        """Whether it begins with a shadow stage."""
        return self.stages[0] == SHADOW

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each stage, 0 of a shadow stage."""
        return tuple(0.0 if stage == SHADOW else float(stage) for stage in self.stages)

    def most_users(self, stage: int) -> int | None:
        """How many users may get a candidate in a stage, counted from 0; None: any number."""
        if self.stages[stage] == SHADOW:
            return 0
        return self.max_users[stage] if isinstance(self.max_users, tuple) else self.max_users

    def least_users(self, stage: int) -> int:
        """How many users a candidate must have had in a stage before the next one; 0 in a shadow stage."""
        if self.stages[stage] == SHADOW:
            return 0
        if isinstance(self.min_users, tuple):
            return self.min_users[stage]
        if self.min_users is not None:
            return self.min_users
        number: int = FIRST_USERS * 4 ** (stage - self.shadow)
        return number

    def least_time(self, stage: int) -> float:
        """Seconds that a stage lasts at least."""
        return self.min_time[stage] if isinstance(self.min_time, tuple) else self.min_time

    def most_time(self, stage: int) -> float | None:
        """Seconds after which a stage that could not end is inconclusive; None: never."""
        return self.max_time[stage] if isinstance(self.max_time, tuple) else self.max_time
