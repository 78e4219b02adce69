"""What a breaker gives out: permits to send, and snapshots of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

StateName = Literal["closed", "open", "half_open", "forced_open", "disabled"]


class Asked:
    """What the store is asked for; decided once its answer is there."""

    __slots__ = ("answer",)

    def __init__(self, answer: Future[Any]) -> None:
        self.answer = answer

    def attach(self, wake: Callable[[], None]) -> bool:
        """Have `wake` called once it is decided; False when it is."""
        if self.answer.done():
            return False
        self.answer.add_done_callback(lambda _: wake())
        return True


@dataclass(slots=True, eq=False)
class Permit:
    """Leave to send one call. Settle it exactly once: `success`, `failure` or `release` of the breaker.

    Attributes:
        generation: the breaker's generation in which it was granted; -1 once it is settled.
        probe: whether it is a probe of a half-open circuit.
        id: unique within the breaker.
        started: when it was granted, on the breaker's monotonic clock.
        asked: the store is asked for a probe of a circuit that all workers share: wait for it, and then let the
            breaker decide (`SharedBreaker.decided`), before anything is sent.
    """

    generation: int
    probe: bool
    id: int
    started: float
    asked: Asked | None = None

    def __repr__(self) -> str:
        return f"Permit(generation={self.generation}, probe={self.probe}, id={self.id}, started={self.started:.3f})"


class BreakerSnapshot(NamedTuple):
    """A breaker at one moment. Durations are seconds.

    Attributes:
        name: the route.
        state: an open circuit stays "open" until a call comes after its interval, and then is "half_open".
        failures, successes, slow: calls in the window; while not closed, the window that led there.
        consecutive_failures: failures in a row; while not closed, as it was left.
        failure_rate: share of failures in the window; None when it is empty.
        opened_count: how often it opened, re-opening and `force_open` included.
        open_for: time since it last opened; None when closed or disabled.
        retry_after: time until a call may get a permit; 0 if it would now, None if unknown (forced open).
        cause: what opened it; empty when closed or disabled.
        probes_in_flight: probes sent and not yet settled.
        total_failures, total_successes: results that counted, since the start; probes written off are failures.
    """

    name: str
    state: StateName
    failures: int
    successes: int
    slow: int
    consecutive_failures: int
    failure_rate: float | None
    opened_count: int
    open_for: float | None
    retry_after: float | None
    cause: str
    probes_in_flight: int
    total_failures: int
    total_successes: int
