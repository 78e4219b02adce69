"""A call within a `Run`: it takes of the run what each attempt may use, and ends its waits when the run is stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspy.lm15 import Response

from dspy_prod.errors import StoreUnavailableError, UnpricedModelError
from dspy_prod.options import PRIORITIES
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.effects import Decidable, Wait
from dspy_prod.pipeline.plan import bound_of, times, wait_until
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.taken import Taken, returned
from dspy_prod.policies.run import Run
from dspy_prod.runtime.ids import IDS
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import GRANTED, PENDING, Account, Refusal, Reservation

Steps = Generator[Any, Any, Response]
"""A flow: the effects it yields, their results, and the answer."""


def stoppable(steps: Steps, run: Run) -> Steps:
    """The same flow, whose waits end when the run is stopped."""
    try:
        effect = next(steps)
        while True:
            waiting = _OrStopped(run, effect.what) if isinstance(effect, Wait) else None
            try:
                result = yield effect if waiting is None else Wait(waiting, effect.until)
                if waiting is not None:
                    run.check()
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
            finally:
                if waiting is not None:
                    waiting.leave()
    except StopIteration as end:
        return end.value


@dataclass(slots=True, eq=False)
class _OrStopped:
    """Decided when `what` is, or when the run is stopped."""

    run: Run
    what: Decidable | None
    wake: Callable[[], None] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        self.wake = wake
        goes_on = self.run.watch(wake)
        return (self.what is None or self.what.attach(wake)) and goes_on

    def leave(self) -> None:
        if self.wake is not None:
            self.run.unwatch(self.wake)


def taking(attempt: Attempt) -> Generator[Wait, Any, None]:
    """Take of the run what an attempt may use. What is taken stays with the attempt, also when the rest is refused.

    Raises:
        BudgetExceededError: a cap does not cover it. UnpricedModelError: nobody knows what it may use.
        DeadlineExceededError, StoreUnavailableError
    """
    run: Run = attempt.call.context.guard
    attempt.taken = taken = Taken(run)
    amounts = _amounts(attempt, run)
    for name, account in run.accounts():
        taken.held[name] = yield from _take(attempt, run, name, account, amounts[name])


def _amounts(attempt: Attempt, run: Run) -> dict[str, int]:
    amounts = {"calls": 1}
    if run.caps.usd is not None:
        amounts["usd"] = attempt.bound = bound_of(attempt)
    if run.caps.tokens is not None:
        route, request = attempt.route, attempt.request
        inputs, outputs = route.bounds(request)
        if inputs is None or outputs is None:
            raise UnpricedModelError(
                f"The run {run.name!r} caps tokens, but those of this call cannot be bounded; pass max_tokens=... to "
                "the LM, or tokens=None to the Run",
                model=route.model,
                route=route.name,
            )
        amounts["tokens"] = inputs + outputs
    return amounts


def _take(attempt: Attempt, run: Run, name: str, account: Account, amount: int) -> Generator[Wait, Any, Reservation]:
    call, route, store = attempt.call, attempt.route, run.store
    monotonic = call.pipeline.clock.monotonic
    until = wait_until(attempt, monotonic())
    while True:
        horizon, lease = times(attempt, store)
        reservation = Reservation(
            IDS.make(), None, None, 0, (account,), amount, PRIORITIES[call.context.priority], "", horizon, lease, None
        )
        began = monotonic()
        store.admit(reservation)
        try:
            while reservation.state == PENDING:
                if monotonic() < until:
                    yield Wait(reservation, until)
                elif store.withdraw(reservation):
                    if call.late():
                        raise too_late(call, f"while waiting for {account.title}")
                    state = store.account(account.key)
                    refusal = Refusal("budget_exceeded", None, "", account.limit, state.spent, state.held, amount)
                    raise run.refused(name, refusal, route.model, route.name)
        except GeneratorExit:  # perhaps inside the garbage collector
            REAPER.post(partial(returned, store, reservation))
            raise
        except BaseException:
            returned(store, reservation)
            raise
        finally:
            call.waited += monotonic() - began
        if reservation.state == GRANTED:
            return reservation
        refusal = reservation.refusal or Refusal("store_unavailable")
        if refusal.reason != "budget_exceeded":
            raise StoreUnavailableError(
                f"The store {store.url} of the run {run.name!r} cannot record this call ({refusal.detail}), so it was "
                "not sent. Check its disk and permissions, or use Run(store='memory://')",
                model=route.model,
                route=route.name,
            )
        now = next(each for dimension, each in run.accounts() if dimension == name)
        if now.limit <= account.limit:
            raise run.refused(name, refusal, route.model, route.name)
        account = now  # the cap was raised meanwhile
