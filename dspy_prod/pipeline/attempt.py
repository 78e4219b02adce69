"""One attempt of a call on one route: `plan.py` makes it, the flow carries it out, `settling.py` settles it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, TypeAlias

from dspy.lm15 import Request, Response

from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Send
from dspy_prod.pipeline.taken import Taken
from dspy_prod.policies.breaker.breaker import Permit
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, PENDING, Reservation

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route
    from dspy_prod.pipeline.upstream.ends import LateResult

CameTo: TypeAlias = "tuple[CallRecord | None, int | None, int | None, bool, bool]"
"""What an attempt came to: its record, its cost, its tokens, whether it was sent, whether the cost is an estimate."""


@dataclass(slots=True, eq=False)
class Attempt:
    """What an attempt needs, and then how far it has come.

    Attributes:
        request: the call's request, as this route sends it.
        number: 1 for the first attempt on its route.
        reservation: None when nothing has to be reserved, or what was has been given back. Set before the store is
            asked: whatever comes up, it is given back.
        bound: the most the attempt can cost in nano-USD, None when no budget needed to know.
        rules: the budgets behind `reservation.accounts`, in the same order.
        permit: the breaker's, once it was taken.
        started: monotonic time at which it was planned, and then at which it was sent.
        until: monotonic time at which the driver has to end it.
        send: what was handed to the driver, None before that.
        paid: its place in the call's purse, once its cost was noted there.
        patience: seconds it may wait for its limiter, because another route is left.
        taken: what it has taken of its runs, where the context has any.
        answer: what came, also where it failed: an answer nobody can use, or one that broke after its end.
        came_to: what settling has decided, once and for all; None before that.
        booked: that is in the place of what was held.
        throttles: its 429 was told to the limiter.
    """

    call: Call
    route: Route
    request: Request
    number: int
    bound: int | None
    rules: tuple[BudgetRule, ...]
    started: float
    reservation: Reservation | None = None
    permit: Permit | None = None
    until: float = inf
    send: Send | None = None
    paid: int | None = None
    patience: float = inf
    answer: Response | None = None
    taken: Taken | None = None
    came_to: CameTo | None = None
    booked: bool = False
    throttles: bool = False

    def renew(self, again: Attempt) -> None:
        """Go on as `again`, which was planned in its place; nothing is held for it any more as it was.

        In place: who settles it has only this one, whenever it is interrupted.
        """
        self.request, self.bound, self.rules, self.started = again.request, again.bound, again.rules, again.started
        self.reservation = again.reservation

    @property
    def stayed(self) -> bool:
        """Whether the driver had it, and nothing of it has reached the provider. To be asked when it has ended."""
        return self.send is not None and not self.send.left

    @property
    def late(self) -> LateResult | None:
        """What goes on, or may, in a worker though nobody waits for it: it holds what it has until it ends."""
        late = None if self.send is None else self.send.late
        return None if late is None or late.heard else late

    @property
    def held(self) -> Reservation | None:
        """The reservation, if the store has granted it."""
        reservation = self.reservation
        return None if reservation is None or reservation.state != GRANTED else reservation

    @property
    def open(self) -> bool:
        """Whether something is to be given back: of the store, which may not have decided yet, of runs or a breaker."""
        reservation = self.reservation
        asked = reservation is not None and reservation.state in (PENDING, GRANTED)
        return asked or self.taken is not None or self.permit is not None
