"""Between a plan and its admission: waiting in line for limiter and budget, and what is told when a call leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from math import inf
from typing import Any, Final

from dspy_prod.context.scoring import is_raising
from dspy_prod.pipeline.alone import unaided
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.effects import Wait
from dspy_prod.pipeline.plan import note_short, plan, renewed, shrunk, turns_at, wait_until
from dspy_prod.pipeline.refusals import refused, waited_too_long
from dspy_prod.pipeline.taken import returned
from dspy_prod.records import NANO
from dspy_prod.stores.admission.window import LEAD
from dspy_prod.stores.base import GRANTED, PENDING, Refusal, Reservation, Store

STORE_PATIENCE: Final = 2.0
"""Seconds a store gets to look at a reservation, whatever `max_wait` says about the wait after that.

They count while this process runs: a busy machine, on which the writer is late too, has more of them.
"""

SCORING_PATIENCE: Final = 30.0
"""The same for calls that are scored: a score must not depend on how busy a machine was."""

LATE: Final = 0.01
"""Seconds after its admission from which a call's limiter is told when it really left."""

NOTICE: Final = 0.05
"""Seconds after which it is looked whether a store that decides elsewhere has put a call into line."""

_LOOK: Final = 0.01


def admission(attempt: Attempt) -> Generator[Wait, Any, None]:
    """Wait in line for limiter and budget; the attempt is then as it was granted in the end.

    Whoever is cut off, at whatever moment, has in `attempt.reservation` what is to be given back.

    Who waits holds nothing, but for the last moment (`LEAD`) on a store of several processes: there a call is granted
    before it may go, and given back if the provider says meanwhile that nobody may.
    """
    call = attempt.call
    store, monotonic = call.pipeline.store, call.pipeline.clock.monotonic
    since = monotonic()
    longest = wait_until(attempt, since)
    patience = SCORING_PATIENCE if is_raising() else STORE_PATIENCE
    alone = False
    while True:
        reservation = attempt.reservation
        assert reservation is not None
        began = monotonic()
        turn = turns_at(attempt, began)
        again: Attempt | None = None
        paused = False
        told, looked = False, 0.0  # in looks, not by the clock: where these come late, so does the store's writer
        last = time.monotonic()  # the machine's: a clock that is moved by hand gives the writer no time
        try:
            while reservation.state == PENDING:
                now = monotonic()
                if not told and reservation.blocked_on:  # a durable store decides in a moment, which is no wait
                    told = True
                    call.emit("waiting", model=attempt.route.model, blocked_on=reservation.blocked_on)
                until = longest
                if attempt.patience != inf and not _waits_for_money(reservation):
                    until = min(longest, began + attempt.patience)
                step = inf if told else NOTICE if now < until else _LOOK
                if not reservation.blocked_on:  # no max_wait is up before the store has looked
                    until = call.deadline if looked < patience else now
                    last, passed = time.monotonic(), time.monotonic() - last
                    looked += min(step, passed)
                if now < min(until, turn):
                    yield Wait(reservation, min(until, turn, now + step))
                    continue
                turn = inf
                if _waits_for_money(reservation):
                    again = renewed(attempt)
                if again is not None:
                    store.withdraw(reservation)  # should it be granted meanwhile, so much the better
                elif now < until:
                    continue
                elif store.withdraw(reservation) and (reservation.blocked_on or call.late()):
                    if now >= longest:
                        note_short(call, longest, since)
                    raise waited_too_long(attempt)
            early = min(reservation.granted_at - store.now(), LEAD) if reservation.state == GRANTED else 0.0
            if early > 0:  # a clock that was set must not make it long
                if not told:
                    told = True
                    call.emit("waiting", model=attempt.route.model, blocked_on=reservation.blocked_on)
                yield Wait(None, min(monotonic() + early, call.deadline))
                paused = store.throttled_since(reservation.limit_key, reservation.granted_at - LEAD)
        finally:
            seconds = monotonic() - began
            call.waited += seconds
            if told:
                blocked_on = reservation.blocked_on
                call.emit("waited", model=attempt.route.model, blocked_on=blocked_on, seconds=seconds)
        if reservation.state == GRANTED and not paused:
            return
        refusal = reservation.refusal
        if paused:  # the provider said no meanwhile: back into line
            returned(store, reservation)
            attempt.reservation = None
            again = plan(call, attempt.route, attempt.number, attempt.patience)
        if again is None and refusal is None:
            refusal = Refusal("store_unavailable", patience, detail=f"it did not decide within {patience:g} s")
        if again is None and refusal is not None and refusal.reason == "store_unavailable" and not alone:
            alone, lone = True, unaided(attempt)
            if lone is not None:
                attempt.reservation = lone
                store.admit_alone(lone)
                continue
        if again is None and refusal is not None and refusal.reason == "budget_exceeded":
            again = renewed(attempt) or shrunk(attempt, refusal)
        if again is None or again.reservation is None:
            assert refusal is not None
            if refusal.reason == "rate_limited" and refusal.retry_after is not None:
                note_short(call, monotonic() + refusal.retry_after, since)
            raise refused(attempt, refusal)
        attempt.renew(again)
        store.admit(again.reservation)


def _waits_for_money(reservation: Reservation) -> bool:
    return any(account.title == reservation.blocked_on for account in reservation.accounts)


def note_spending(attempt: Attempt) -> None:
    """Notice budgets that pass their soft threshold with this grant."""
    reservation = attempt.reservation
    assert reservation is not None
    for rule, account, spent in zip(attempt.rules, reservation.accounts, reservation.spent, strict=False):
        if rule.soft_passed(account.key, spent):
            attempt.call.emit(
                "budget_soft", budget=account.title, spent_usd=spent / NANO, limit_usd=account.limit / NANO,
                degrade_to=rule.options.degrade_to,
            )  # fmt: skip


def leaves(store: Store, reservation: Reservation) -> Callable[[], None]:
    """To be called when a call leaves: its limiter hears of it when that is well after the grant.

    A busy machine, or connections that take long to open, would else bunch calls up.
    """
    return partial(_left, store, reservation)


def _left(store: Store, reservation: Reservation) -> None:
    now = store.now()
    if now - reservation.granted_at > LATE:
        store.sent_late(reservation, now)
