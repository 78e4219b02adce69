"""The effects a flow asks its driver for, and the errors a driver answers with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from dspy.lm15 import Request

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route


class Decidable(Protocol):
    """Something that another thread decides: a reservation in line, a follower of a flight."""

    def attach(self, wake: Callable[[], None]) -> bool:
        """Register an idempotent callback; False when it is decided already."""
        ...


class Send:
    """Send `request` on `route` once. Answered with the `Response`, or by raising the upstream's error.

    `until` bounds the attempt on the monotonic clock (`inf`: not at all). `leaving`, if any, wants to be called when
    the request goes out, as late as the driver can tell.
    """

    __slots__ = ("extras", "leaving", "request", "route", "until")

    def __init__(
        self,
        route: Route,
        request: Request,
        extras: dict[str, Any] | None,
        until: float,
        leaving: Callable[[], None] | None = None,
    ) -> None:
        self.route = route
        self.request = request
        self.extras = extras
        self.until = until
        self.leaving = leaving


class Warm:
    """Build the engine that an attempt on `route` will use, so that nothing delays it once it is admitted.

    Answered with nothing, by `until` at the latest, or by raising why there is no such engine.
    """

    __slots__ = ("extras", "request", "route", "until")

    def __init__(self, route: Route, request: Request, extras: dict[str, Any] | None, until: float) -> None:
        self.route = route
        self.request = request
        self.extras = extras
        self.until = until


class Wait:
    """Wait until `what` is decided or the monotonic clock shows `until`. Answered with nothing."""

    __slots__ = ("until", "what")

    def __init__(self, what: Decidable | None, until: float) -> None:
        self.what = what
        self.until = until
