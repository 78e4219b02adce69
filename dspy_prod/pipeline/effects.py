"""The effects a flow asks its driver for, and the errors a driver answers with."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dspy.lm15 import Request, Response

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route
    from dspy_prod.pipeline.upstream.ends import LateResult
    from dspy_prod.pipeline.upstream.ordinary import Beside


class Decidable(Protocol):
    """Something that another thread decides: a reservation in line, a follower of a flight."""

    def attach(self, wake: Callable[[], None]) -> bool:
        """Register an idempotent callback; False when it is decided already."""
        ...


class Line(Protocol):
    """An engine that knows of its last request whether it went out."""

    @property
    def waits(self) -> bool:
        """Whether it certainly has not, and will not any more: there was no connection for it yet."""
        ...

    @property
    def moved(self) -> bool:
        """Whether it has, and who took it only sent it on, to where it has not gone."""
        ...


@dataclass(slots=True, eq=False)
class Send:
    """Send `request` on `route` once. Answered with the `Response`, or by raising the upstream's error.

    `until` bounds the attempt on the monotonic clock (`inf`: not at all). `leaving`, if any, wants to be called when
    the request goes out, as late as the driver can tell.

    Attributes:
        gone: it may have gone out, as far as the driver or its transport can tell.
        line: the engine, where it knows better.
        late: what the driver has a thread do, set before it begins; None where nothing goes on when who waits is
            interrupted or cancelled.
        partial: a stream's answer as far as it came, left here when the stream broke.
        ended: its end event had come, and with it what the provider told of its usage.
    """

    route: Route
    request: Request
    beside: Beside | None
    until: float
    leaving: Callable[[], None] | None = None
    partial: Response | None = None
    ended: bool = False
    gone: bool = False
    line: Line | None = None
    late: LateResult | None = None

    def goes(self) -> None:
        """Hear that the request goes out now, or may from now on."""
        if not self.gone:
            self.gone = True
            if self.leaving is not None:
                self.leaving()

    @property
    def left(self) -> bool:
        """Whether the provider may have seen it. To be asked when the attempt has ended: until then it may yet."""
        return self.gone and not (self.line is not None and self.line.waits)

    @property
    def moved(self) -> bool:
        """Whether nobody has worked on it, though it went out. To be asked when the attempt has ended."""
        return self.line is not None and self.line.moved


@dataclass(slots=True, eq=False)
class Warm:
    """Build the engine that an attempt on `route` will use, so that nothing delays it once it is admitted.

    Answered with nothing, by `until` at the latest, or by raising why there is no such engine.
    """

    route: Route
    request: Request
    beside: Beside | None
    until: float


@dataclass(slots=True, eq=False)
class Wait:
    """Wait until `what` is decided or the monotonic clock shows `until`. Answered with nothing.

    Attributes:
        stops: it ends when a run that the call belongs to is stopped.
    """

    what: Decidable | None
    until: float
    stops: bool = True


Steps = Generator[Any, Any, Any]
"""A flow, or a part of one: the effects it yields, their results, and what it returns."""


def replacing(steps: Steps, instead: Callable[[Any], Steps | None]) -> Steps:
    """The same flow, in which some effects are done in another way.

    Args:
        instead: the steps that are taken in an effect's place, whose result is its own; None leaves it as it is.
    """
    try:
        effect = next(steps)
        while True:
            result = None
            try:
                others = instead(effect)
                result = (yield effect) if others is None else (yield from others)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as end:
        return end.value
    except BaseException:  # if it came between the two, the flow would stay where it is as long as somebody has this
        steps.close()
        raise
