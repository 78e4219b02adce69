"""A call within a `Run`: it takes of the run what each attempt may use, and ends its waits when the run is stopped.

What a run counts may lie in another store than what an LM counts, so the two cannot be had in one step. The run's comes
first: while a call waits in the line of its LM's limiter, the run keeps for it what it may use.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from dspy_prod.errors import StoreUnavailableError, UnpricedModelError
from dspy_prod.options import PRIORITIES
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Decidable, Steps, Wait, replacing
from dspy_prod.pipeline.plan import bound_of, times, wait_until
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.taken import Taken
from dspy_prod.policies.run import Claim, Run, claims_of
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.admission.granting import no_money
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, Refusal, Reservation, Store


def stoppable(steps: Steps, call: Call) -> Steps:
    """The same flow, whose waits end when a run that the call belongs to is stopped."""
    runs: tuple[Run, ...] = call.context.guards
    return replacing(steps, lambda effect: _wait(effect, runs) if isinstance(effect, Wait) and effect.stops else None)


def _wait(effect: Wait, runs: tuple[Run, ...]) -> Generator[Wait, Any, None]:
    while True:
        waiting = _OrToldOtherwise(runs, effect.what)
        try:
            yield Wait(waiting, effect.until)
        finally:
            waiting.leave()
        go_on(runs)
        if effect.what is not None or not waiting.told:  # a pause goes on when only a cap was changed
            return


def go_on(runs: tuple[Run, ...]) -> None:
    """Go on, unless one of the runs was stopped.

    Raises:
        RunStoppedError
    """
    for run in runs:
        run.check()


@dataclass(eq=False)
class _OrToldOtherwise:
    """Decided when `what` is, or when a run is stopped or has other caps."""

    runs: tuple[Run, ...]
    what: Decidable | None
    wake: Callable[[], None] | None = None
    told: bool = False

    def attach(self, wake: Callable[[], None]) -> bool:
        self.wake = wake
        goes_on = True
        for run in self.runs:
            goes_on = run.watch(self) and goes_on
        self.told = self.told or not goes_on
        return (self.what is None or self.what.attach(wake)) and goes_on

    def tell(self) -> None:
        self.told = True
        if self.wake is not None:
            self.wake()

    def leave(self) -> None:
        for run in self.runs:
            run.unwatch(self)


@dataclass(slots=True, eq=False)
class _Asked:
    """A reservation of a run, until it is decided, or the cap is another than it was asked for under."""

    reservation: Reservation
    claim: Claim
    limit: int

    def attach(self, wake: Callable[[], None]) -> bool:
        return self.reservation.attach(wake) and self.claim.account().limit == self.limit


def taking(attempt: Attempt) -> Generator[Wait, Any, None]:
    """Take of the runs what an attempt may use. What is taken stays with the attempt, also when the rest is refused.

    Raises:
        BudgetExceededError: a cap does not cover it. UnpricedModelError: nobody knows what it may use.
        RunStoppedError, DeadlineExceededError, StoreUnavailableError
    """
    runs: tuple[Run, ...] = attempt.call.context.guards
    go_on(runs)
    claims = claims_of(runs)
    amounts = _amounts(attempt, claims)
    attempt.taken = taken = Taken()
    until = wait_until(attempt, attempt.call.pipeline.clock.monotonic())
    for claim in claims:
        yield from _take(attempt, taken, claim, amounts[claim.dimension], until)


def foreseen(attempt: Attempt, count: int) -> str:
    """The cap that so many attempts would wait for because calls in flight keep what is left of it, "" without one.

    Raises:
        BudgetExceededError, UnpricedModelError, RunStoppedError, StoreUnavailableError: as `taking` would.
    """
    runs: tuple[Run, ...] = attempt.call.context.guards
    go_on(runs)
    claims, waits = claims_of(runs), ""
    amounts = _amounts(attempt, claims)
    for claim in claims:
        account, amount = claim.account(), amounts[claim.dimension] * count
        state = claim.store.account(account.key)
        if state.spent + amount > account.limit:
            refusal = no_money(account, account.limit, state, amount)
            raise claim.run.refused(claim.dimension, refusal, attempt.route.model, attempt.route.name)
        if state.spent + state.held + amount > account.limit:
            waits = waits or account.title
    return waits


def _amounts(attempt: Attempt, claims: Sequence[Claim]) -> dict[str, int]:
    amounts = {"calls": 1}
    for claim in claims:
        if claim.dimension == "usd":
            amounts["usd"] = attempt.bound = bound_of(attempt)
        elif claim.dimension == "tokens":
            route = attempt.route
            inputs, outputs = route.bounds(attempt.request)
            if inputs is None or outputs is None:
                raise UnpricedModelError(
                    f"The run {claim.run.name!r} counts tokens, but those of this call cannot be bounded; pass "
                    "max_tokens=... to the LM, or no tokens= to the Run",
                    model=route.model,
                    route=route.name,
                )
            amounts["tokens"] = inputs + outputs
    return amounts


def _take(attempt: Attempt, taken: Taken, claim: Claim, amount: int, until: float) -> Generator[Wait, Any, None]:
    call, route, store = attempt.call, attempt.route, claim.store
    monotonic = call.pipeline.clock.monotonic
    while True:
        account, run = claim.account(), claim.run
        horizon, lease = _times(attempt, store)
        reservation = Reservation(
            IDS.make(), None, None, 0, (account,), amount, PRIORITIES[call.context.priority], "", horizon, lease, None
        )
        taken.held.append((claim, reservation))  # before it is asked for: whatever comes up, it is given back
        began = monotonic()
        try:
            store.admit(reservation)
            while reservation.state == PENDING:
                if claim.account().limit != account.limit:
                    store.withdraw(reservation)  # and ask again; should it be granted meanwhile, so much the better
                elif monotonic() < until:
                    yield Wait(_Asked(reservation, claim, account.limit), until)
                elif store.withdraw(reservation):
                    if call.late():
                        raise too_late(call, f"while waiting for {account.title}")
                    refusal = no_money(account, account.limit, store.account(account.key), amount)
                    raise run.refused(claim.dimension, refusal, route.model, route.name)
        finally:
            call.waited += monotonic() - began
        limit = claim.account().limit
        if reservation.state == GRANTED and limit >= account.limit:
            run.granted(claim.dimension, amount)
            return
        if reservation.state == REFUSED:
            refused = reservation.refusal or Refusal("store_unavailable")
            if refused.reason != "budget_exceeded":
                raise StoreUnavailableError(
                    f"The store {store.url} of the run {run.name!r} cannot record this call ({refused.detail}), so it "
                    "was not sent. Check its disk and permissions, or use Run(store='memory://')",
                    model=route.model,
                    route=route.name,
                    retry_after=refused.retry_after,
                )
            if limit <= account.limit:
                raise run.refused(claim.dimension, refused, route.model, route.name)
        taken.give_back()  # the cap has been changed


def _times(attempt: Attempt, store: Store) -> tuple[float, float]:
    """As `times`; but what a run keeps for a call also outlives its wait in the line of its limiter."""
    horizon, lease = times(attempt, store)
    return horizon, inf if horizon == inf else lease + max(0.0, horizon - store.now())
