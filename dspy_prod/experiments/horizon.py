"""How long an experiment may stay undecided before a person is asked: `Experiment(horizon=)`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.options.metrics import duration
from dspy_prod.stores.trials import Decision

DAY: Final = 86_400.0
LONGEST: Final = 36_500 * DAY
REASON: Final = "inconclusive: the horizon is reached"
"""Begins the reason of the pause, by which the audit tells that there was one."""


@dataclass(frozen=True)
class Horizon:
    """One of the two.

    Attributes:
        units: so many are exposed. seconds: so long after the start.
    """

    units: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, where: str, given: Any) -> Horizon | None:
        """What was given: a whole number of units; or a duration, as `"30d"`, a timedelta, or seconds as a float.

        Raises:
            ConfigError: it is neither; the message begins with `where`.
        """
        if given is None:
            return None
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return cls(units=given)
        try:
            seconds = duration(given) if isinstance(given, str | dt.timedelta) else given
        except ValueError:
            seconds = None
        if isinstance(seconds, float) and 0 < seconds <= LONGEST:
            return cls(seconds=seconds)
        raise ConfigError(
            f"{where}: horizon={given!r} must be a whole number of units over 0, such as 20_000, or a duration up to "
            f"{LONGEST / DAY:,.0f} days: text such as '30d', a timedelta, or seconds as a float"
        )

    @classmethod
    def read(cls, declared: Mapping[str, Any] | None) -> Horizon | None:
        """As a declaration has it."""
        return None if declared is None else cls(**declared)

    def declared(self) -> dict[str, Any]:
        """For a declaration."""
        return {"units": self.units} if self.units is not None else {"seconds": self.seconds}

    def may_be_reached(self, units: int, created: float, now: float) -> bool:
        """Whether it is worth a look into the audit, which tells when the experiment began; arguments as of `reached`.

        Args:
            created: when it was made.
        """
        return units >= self.units if self.units is not None else now - created >= (self.seconds or 0.0)

    def reached(self, units: int, audit: Iterable[Decision], now: float) -> bool:
        """Whether it is.

        Args:
            units: exposed so far. audit: what was done. now: seconds since the epoch, as the store has them.
        """
        if self.units is not None:
            return units >= self.units
        start = started(audit)
        return start is not None and now - start >= (self.seconds or 0.0)

    def words(self, unit: str) -> str:
        """As people read it."""
        if self.units is not None:
            return f"{self.units:,} {unit}s"
        seconds = self.seconds or 0.0
        return f"{seconds / DAY:,.4g} days" if seconds >= DAY else f"{seconds / 3_600:.3g} hours"


def started(audit: Iterable[Decision]) -> float | None:
    """When an experiment began, in seconds since the epoch; None before that."""
    return next((each.at for each in audit if each.what == "start"), None)


def has_asked(audit: Iterable[Decision]) -> bool:
    """Whether it was paused for its horizon: it is once, and goes on when somebody resumes it."""
    return any(each.what == "pause" and each.by == "controller" and REASON in each.evidence for each in audit)


def shown(horizon: Horizon | None, unit: str, units: int, audit: list[Decision]) -> str | None:
    """How far it is from there, for a card; None without one."""
    if horizon is None:
        return None
    words = f"pauses if undecided after {horizon.words(unit)}"
    if has_asked(audit):
        return f"{words}: reached, and told"
    if horizon.units is not None:
        return f"{words}: {units:,} so far"
    start = started(audit)
    if start is None or horizon.seconds is None:
        return words
    at = dt.datetime.fromtimestamp(start + horizon.seconds, dt.timezone.utc)
    return f"{words}, on {at:%Y-%m-%d %H:%M} UTC"
