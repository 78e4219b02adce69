"""What every store promises of limits, budgets and the ledger. Each test runs against each store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, AccountState, Reservation, Settlement, Store
from tests.stores.support import (
    CENT,
    DAY,
    DOLLAR,
    FakeClock,
    ask,
    check_books,
    decided,
    granted,
    record,
    refused,
    settlement,
    turn,
    until,
)


# -- money -------------------------------------------------------------------------------------------------------------
def test_a_grant_holds_its_bound_and_a_settlement_charges_what_it_cost(store: Store) -> None:
    reservation = granted(store, ask(5 * CENT))
    assert store.account("day") == AccountState(0, 5 * CENT, 0)
    assert store.holds() == 1
    store.settle(reservation, settlement(reservation, 2 * CENT))
    assert store.account("day") == AccountState(2 * CENT, 0, 0)
    assert store.holds() == 0
    assert [row.id for row in store.records()] == [reservation.id]
    check_books(store)


def test_a_ticket_tells_what_its_accounts_have_spent_without_what_is_held(store: Store) -> None:
    first = granted(store, ask(5 * CENT))
    store.settle(first, settlement(first, 2 * CENT))
    assert granted(store, ask(3 * CENT, accounts=("day", "total"))).spent == (2 * CENT, 0)


def test_what_was_never_sent_costs_nothing(store: Store) -> None:
    reservation = granted(store, ask(5 * CENT))
    store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
    assert store.account("day") == AccountState()
    assert store.records() == []


def test_an_unknown_outcome_is_charged_in_full_and_shown_as_unconfirmed(store: Store) -> None:
    reservation = granted(store, ask(5 * CENT))
    store.settle(reservation, settlement(reservation, 5 * CENT, estimated=True))
    assert store.account("day") == AccountState(5 * CENT, 0, 5 * CENT)
    check_books(store)


def test_reserving_twice_under_one_id_holds_once(store: Store) -> None:
    first = granted(store, ask(5 * CENT, id="r"))
    granted(store, ask(5 * CENT, id="r"))
    assert store.account("day").held == 5 * CENT
    store.settle(first, settlement(first, CENT))
    assert store.account("day") == AccountState(CENT, 0, 0)


def test_settling_twice_charges_once(store: Store) -> None:
    reservation = granted(store, ask())
    store.settle(reservation, settlement(reservation, CENT))
    store.settle(reservation, settlement(reservation, CENT))
    assert store.account("day").spent == CENT
    assert len(store.records()) == 1
    check_books(store)


def test_a_call_is_refused_at_once_only_when_spent_and_its_own_bound_pass_the_limit(store: Store) -> None:
    first = granted(store, ask(60 * CENT))
    store.settle(first, settlement(first, 60 * CENT))
    refusal = refused(store, ask(41 * CENT))
    assert refusal.reason == "budget_exceeded"
    assert refusal.dimension == "budget day"
    assert (refusal.limit, refusal.spent, refusal.amount) == (DOLLAR, 60 * CENT, 41 * CENT)
    granted(store, ask(40 * CENT))


def test_money_that_others_hold_is_waited_for(store: Store) -> None:
    first = granted(store, ask(60 * CENT))
    second = store.admit(ask(60 * CENT))
    store.flush(10)
    assert second.state == PENDING
    assert store.waiting() == 1
    store.settle(first, settlement(first, 40 * CENT))
    assert decided(second).state == GRANTED
    assert store.waiting() == 0


def test_a_waiting_call_is_refused_when_the_money_it_waits_for_is_spent(store: Store) -> None:
    first = granted(store, ask(60 * CENT))
    second = store.admit(ask(60 * CENT))
    store.settle(first, settlement(first, 60 * CENT))
    assert decided(second).state == REFUSED
    assert second.refusal is not None
    assert second.refusal.reason == "budget_exceeded"


def test_waiting_for_money_is_first_in_first_out(store: Store) -> None:
    first = granted(store, ask(DOLLAR))
    large, small = store.admit(ask(90 * CENT)), store.admit(ask(CENT))
    store.settle(first, settlement(first, 5 * CENT))
    assert decided(large).state == GRANTED
    assert decided(small).state == GRANTED
    store.settle(large, settlement(large, CENT))
    third = granted(store, ask(90 * CENT))
    behind = [store.admit(ask(50 * CENT)), store.admit(ask(CENT))]
    store.flush(10)
    assert [reservation.state for reservation in behind] == [PENDING, PENDING]  # the small one does not overtake
    store.settle(third, settlement(third, 0))
    assert [decided(reservation).state for reservation in behind] == [GRANTED, GRANTED]


def test_accounts_are_found_by_how_they_begin_and_end(store: Store) -> None:
    """One store found none where any end was meant."""
    for number, key in enumerate(("day|a|1", "day|b|1", "day|b|2", "week|a|1")):
        each = granted(store, ask(DOLLAR, accounts=(key,)))
        store.settle(each, settlement(each, (number + 1) * CENT))
    store.flush(10)

    def found(prefix: str, suffix: str, most: int = 9) -> list[str]:
        return [key for key, _ in store.accounts(prefix, suffix, most)]

    assert found("day|", "") == ["day|b|2", "day|b|1", "day|a|1"]
    assert found("day|", "|1") == ["day|b|1", "day|a|1"]
    assert found("", "", 2) == ["week|a|1", "day|b|2"]
    assert found("day|c", "") == []


def test_all_accounts_are_drawn_on_together_or_none_is(store: Store) -> None:
    spent = granted(store, ask(95 * CENT, accounts=("tenant",)))
    store.settle(spent, settlement(spent, 95 * CENT))
    assert refused(store, ask(10 * CENT, accounts=("day", "tenant"))).dimension == "budget tenant"
    assert store.account("day") == AccountState()
    both = granted(store, ask(5 * CENT, accounts=("day", "tenant")))
    assert store.account("day").held == store.account("tenant").held == 5 * CENT
    store.settle(both, settlement(both, CENT))
    assert (store.account("day").spent, store.account("tenant").spent) == (CENT, 96 * CENT)


def test_withdrawing_while_waiting_leaves_nothing_behind(store: Store) -> None:
    first = granted(store, ask(60 * CENT))
    second, third = store.admit(ask(60 * CENT)), store.admit(ask(10 * CENT))
    store.flush(10)
    assert store.withdraw(second)
    assert decided(third).state == GRANTED  # it stood behind the one that left
    for reservation in (first, third):
        store.settle(reservation, settlement(reservation, CENT))
    assert store.account("day") == AccountState(2 * CENT, 0, 0)
    assert store.holds() == 0


def test_withdrawing_after_the_grant_says_that_it_must_be_settled(store: Store) -> None:
    reservation = granted(store, ask())
    assert not store.withdraw(reservation)
    store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
    assert store.holds() == 0


def test_withdrawing_a_refused_ticket_changes_nothing(store: Store) -> None:
    reservation = decided(store.admit(ask(2 * DOLLAR)))
    assert reservation.state == REFUSED
    assert store.withdraw(reservation)
    assert store.account("day") == AccountState()


def test_an_undecided_ticket_can_be_withdrawn_at_any_moment(store: Store) -> None:
    """A withdrawal and a grant race; whoever wins, nothing stays held."""
    for _ in range(200):
        reservation = store.admit(ask())
        if not store.withdraw(reservation):
            store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
    until(lambda: store.holds() == 0)
    assert store.account("day") == AccountState()


def test_threads_never_exceed_a_hard_budget_and_spend_all_of_it(store: Store) -> None:
    granted_sum: list[int] = []

    def work() -> None:
        while True:
            reservation = decided(store.admit(ask(CENT)))
            if reservation.state != GRANTED:
                return
            granted_sum.append(CENT)
            store.settle(reservation, settlement(reservation, CENT))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert store.account("day") == AccountState(DOLLAR, 0, 0)
    assert sum(granted_sum) == DOLLAR
    check_books(store)


# -- leases ------------------------------------------------------------------------------------------------------------
def test_a_hold_whose_lease_ends_is_charged_in_full_and_a_late_settlement_replaces_that(
    still: Store, clock: FakeClock
) -> None:
    reservation = granted(still, ask(5 * CENT, lease=30.0, user="u"))
    clock.advance(31.0)
    turn(still)
    until(lambda: still.holds() == 0)
    assert still.account("day") == AccountState(5 * CENT, 0, 5 * CENT)
    (row,) = still.records()
    assert (row.outcome, row.estimated, row.cost_nano, row.user) == ("abandoned", True, 5 * CENT, "u")
    check_books(still)
    still.settle(reservation, settlement(reservation, 2 * CENT))
    assert still.account("day") == AccountState(2 * CENT, 0, 0)
    (row,) = still.records()
    assert (row.outcome, row.estimated, row.cost_nano) == ("ok", False, 2 * CENT)
    check_books(still)
    still.settle(reservation, settlement(reservation, 3 * CENT))
    assert still.account("day").spent == 2 * CENT


def test_the_stub_of_a_hold_may_be_made_when_it_is_needed(still: Store, clock: FakeClock) -> None:
    wanted = ask(5 * CENT, lease=30.0)
    stub = wanted.stub
    assert isinstance(stub, CallRecord)
    wanted.stub = lambda: stub
    granted(still, wanted)
    clock.advance(31.0)
    turn(still)
    until(lambda: still.holds() == 0)
    assert still.records() == [stub._replace(outcome="abandoned", estimated=True)]


def test_a_late_settlement_without_a_record_mends_the_abandoned_one(still: Store, clock: FakeClock) -> None:
    reservation = granted(still, ask(5 * CENT, lease=30.0))
    clock.advance(31.0)
    turn(still)
    until(lambda: still.holds() == 0)
    still.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
    assert still.account("day") == AccountState()
    check_books(still)


def test_a_correction_by_hand_is_not_overruled_by_a_late_settlement(still: Store, clock: FakeClock) -> None:
    reservation = granted(still, ask(5 * CENT, lease=30.0))
    clock.advance(31.0)
    turn(still)
    until(lambda: still.holds() == 0)
    assert still.correct(reservation.id, CENT)
    still.settle(reservation, settlement(reservation, 4 * CENT))
    assert still.account("day") == AccountState(CENT, 0, 0)
    check_books(still)


# -- limits ------------------------------------------------------------------------------------------------------------
def test_no_window_of_a_minute_holds_more_requests_than_allowed(still: Store, clock: FakeClock) -> None:
    limit = RateLimit(rpm=5, burst=5)
    sent: list[float] = []
    reservations: list[Reservation] = [still.admit(ask(budget=None, limit=limit)) for _ in range(12)]
    turn(still)
    for _ in range(300):
        for reservation in reservations:
            if reservation.state == GRANTED:
                sent.append(clock.time())
                still.settle(reservation, settlement(reservation, 0))
        reservations = [reservation for reservation in reservations if reservation.state == PENDING]
        if not reservations:
            break
        clock.advance(1.0)
        turn(still)
        until(lambda: still.flush(10))
        still.waiting()
    assert len(sent) == 12
    for start in sent:
        assert sum(1 for at in sent if start <= at < start + 60.0) <= 5


def test_a_wait_that_cannot_end_before_the_horizon_is_refused_at_once(still: Store, clock: FakeClock) -> None:
    limit = RateLimit(rpm=1)
    granted(still, ask(budget=None, limit=limit))
    refusal = refused(still, ask(budget=None, limit=limit, horizon=still.now() + 5.0))
    assert refusal.reason == "rate_limited"
    assert refusal.retry_after is not None
    assert 55.0 < refusal.retry_after < 65.0
    assert still.waiting() == 0


def test_concurrency_waits_for_a_release(store: Store) -> None:
    limit = RateLimit(concurrency=2)
    running = [granted(store, ask(budget=None, limit=limit)) for _ in range(2)]
    waiting = [store.admit(ask(budget=None, limit=limit)) for _ in range(3)]
    store.flush(10)
    assert {reservation.state for reservation in waiting} == {PENDING}
    assert waiting[0].blocked_on == "concurrency"
    store.settle(running[0], settlement(running[0], 0))
    assert decided(waiting[0]).state == GRANTED
    store.flush(10)
    assert [reservation.state for reservation in waiting[1:]] == [PENDING, PENDING]
    snapshot = store.limiter("provider")
    assert snapshot is not None
    assert (snapshot.in_flight, snapshot.concurrency_max, snapshot.waiting) == (2, 2, 2)


def test_a_wait_for_the_limiter_holds_no_money(store: Store) -> None:
    limit = RateLimit(concurrency=1)
    first = granted(store, ask(10 * CENT, limit=limit))
    second = store.admit(ask(10 * CENT, limit=limit))
    store.flush(10)
    assert second.state == PENDING
    assert store.account("day").held == 10 * CENT
    store.settle(first, settlement(first, CENT))
    assert decided(second).state == GRANTED


def test_a_wait_for_money_does_not_stand_in_the_limiters_way(store: Store) -> None:
    limit = RateLimit(concurrency=2)
    granted(store, ask(60 * CENT, limit=limit))
    rich = store.admit(ask(60 * CENT, limit=limit))
    other = granted(store, ask(CENT, accounts=("other",), limit=limit))
    assert other.state == GRANTED
    assert rich.state == PENDING


def test_higher_priority_goes_first(store: Store) -> None:
    limit = RateLimit(concurrency=1)
    first = granted(store, ask(budget=None, limit=limit))
    low = store.admit(ask(budget=None, limit=limit, priority=2))
    high = store.admit(ask(budget=None, limit=limit, priority=0))
    store.settle(first, settlement(first, 0))
    assert decided(high).state == GRANTED
    store.flush(10)
    assert low.state == PENDING


def test_an_admission_wakes_those_whom_it_lets_through(still: Store, clock: FakeClock) -> None:
    """A pause has ended when somebody more urgent comes: those in line were granted with it, but slept on."""
    limit = RateLimit()
    still.throttled("provider", limit, 5.0)
    woken: list[str] = []
    waiting = [still.admit(ask(budget=None, limit=limit, id=name)) for name in ("first", "second")]
    for each in waiting:
        assert each.attach(lambda name=each.id: woken.append(name))  # type: ignore[misc]
    still.flush(10)
    clock.advance(6.0)
    urgent = still.admit(ask(budget=None, limit=limit, priority=0))
    assert [each.state for each in (urgent, *waiting)] == [GRANTED] * 3
    until(lambda: woken == ["first", "second"], 2.0, "waking both")


@pytest.mark.parametrize("budget", [None, DOLLAR], ids=["no budget", "budget"])
def test_a_429_pauses_a_limiter_that_has_no_limits_of_its_own(
    still: Store, clock: FakeClock, budget: int | None
) -> None:
    limit = RateLimit()
    granted(still, ask(budget=budget, limit=limit))
    still.throttled("provider", limit, 7.0)
    waiting = still.admit(ask(budget=budget, limit=limit))
    turn(still)
    assert waiting.state == PENDING
    assert refused(still, ask(budget=budget, limit=limit, horizon=still.now() + 3.0)).reason == "rate_limited"
    snapshot = still.limiter("provider")
    assert snapshot is not None
    assert snapshot.paused_for == pytest.approx(7.0)
    clock.advance(8.0)
    turn(still)
    assert decided(waiting).state == GRANTED


@pytest.mark.parametrize("limit", [RateLimit(), RateLimit(rpm=600, burst=600)], ids=["no limits", "limits"])
def test_an_operator_lifts_a_pause(still: Store, clock: FakeClock, limit: RateLimit) -> None:
    """A pause that one answer of a provider brought about could only be waited for, by everybody."""
    granted(still, ask(limit=limit))
    still.throttled("provider", limit, 200.0)
    still.resync("provider", limit, {"requests": (0.0, 200.0)})
    waiting = still.admit(ask(limit=limit, horizon=still.now() + 1_000.0))
    turn(still)
    assert waiting.state == PENDING

    assert still.lift("provider")

    clock.advance(1.0)  # the lowered rate still paces
    turn(still)
    assert decided(waiting).state == GRANTED
    assert not still.lift("provider")
    assert not still.lift("unknown")


def test_a_pause_is_lifted_also_for_those_whom_their_process_admits_alone(still: Store, clock: FakeClock) -> None:
    """In the next outage the calls of this process waited for the rest of a pause that nobody else saw any more."""
    limit = RateLimit(rpm=600, burst=600)
    still.admit_alone(ask(budget=None, limit=limit))
    still.throttled("provider", limit, 200.0)
    waiting = still.admit_alone(ask(budget=None, limit=limit, horizon=still.now() + 1_000.0))
    assert waiting.state == PENDING

    assert still.lift("provider")

    clock.advance(1.0)  # the lowered rate still paces
    turn(still)
    still.admit_alone(ask(budget=None, limit=limit, horizon=still.now() + 1_000.0))  # whoever comes serves the line
    assert decided(waiting).state == GRANTED
    assert not still.lift("provider")


def test_what_the_provider_says_is_left_counts(still: Store, clock: FakeClock) -> None:
    limit = RateLimit(rpm=600, burst=600)
    granted(still, ask(budget=None, limit=limit))
    still.resync("provider", limit, {"requests": (0.0, 20.0)})
    waiting = still.admit(ask(budget=None, limit=limit))
    turn(still)
    assert waiting.state == PENDING
    clock.advance(21.0)
    turn(still)
    assert decided(waiting).state == GRANTED


def test_a_resync_wakes_who_may_go_now(still: Store) -> None:
    limit = RateLimit(rpm=600, burst=600)
    still.resync("provider", limit, {"requests": (0.0, 20.0)})
    waiting = still.admit(ask(budget=None, limit=limit))
    woken = threading.Event()
    assert waiting.attach(woken.set)
    turn(still)
    assert waiting.state == PENDING
    still.resync("provider", limit, {"requests": (500.0, 20.0)})
    assert woken.wait(30)
    assert waiting.state == GRANTED


def test_a_429_leaves_the_limits_in_the_snapshot_as_they_are(still: Store) -> None:
    limit = RateLimit(rpm=100, adaptive=False)
    granted(still, ask(budget=None, limit=limit))
    still.throttled("provider", limit, 7.0)
    still.resync("provider", limit, {"requests": (50.0, 20.0)})
    snapshot = still.limiter("provider")
    assert snapshot is not None
    assert (snapshot.requests_max, snapshot.requests_available, snapshot.in_flight) == (100, 50, 1)
    assert snapshot.paused_for == pytest.approx(7.0)


def test_a_limiter_that_was_never_used_is_unknown(store: Store) -> None:
    assert store.limiter("nobody") is None


def test_preview_changes_nothing(store: Store) -> None:
    limit = RateLimit(rpm=1)
    assert store.preview(ask(limit=limit)) == (0.0, None)
    assert store.preview(ask(limit=limit)) == (0.0, None)
    assert store.account("day") == AccountState()
    granted(store, ask(limit=limit))
    wait, refusal = store.preview(ask(limit=limit))
    assert refusal is None
    assert 50.0 < wait < 70.0
    wait, refusal = store.preview(ask(2 * DOLLAR))
    assert wait == inf
    assert refusal is not None
    assert refusal.reason == "budget_exceeded"


# -- waking ------------------------------------------------------------------------------------------------------------
def test_attach_after_the_decision_says_so(store: Store) -> None:
    reservation = granted(store, ask())
    assert not reservation.attach(lambda: None)


def test_a_callback_that_fails_harms_nobody(store: Store) -> None:
    first = granted(store, ask(DOLLAR))
    second, third = store.admit(ask()), store.admit(ask())

    def fail() -> None:
        raise RuntimeError("the loop is closed")

    second.attach(fail)
    store.settle(first, settlement(first, 0))
    assert decided(third).state == GRANTED
    assert second.state == GRANTED


# -- the ledger --------------------------------------------------------------------------------------------------------
def test_a_record_survives_the_way_to_the_ledger_and_back(store: Store) -> None:
    full = record(
        started_at=DAY + 0.25, outcome="error", cost_nano=None, estimated=True, error="LMServerError", status=503,
        input_tokens=1, output_tokens=2, cached_tokens=3, reasoning_tokens=4, cached=True, latency=0.5, waited=0.25,
        user="ü", tenant="t", session="s", priority="high", program="p", experiment="e", variant="v",
        prompt_version="p/3", tags=(("feature", "triage"), ("région", "eu")), trace_id="tr", accounts=("day", "total"),
        saved_nano=5,
    )  # fmt: skip
    store.append(full)
    assert store.records() == [full]


def test_a_cached_answer_costs_nothing_and_is_counted_apart(store: Store) -> None:
    store.append(record(cached=True, outcome="cached"))
    ((_, _, sums),) = store.totals()
    assert sums == Totals(cached=1)


def test_cached_answers_of_a_kind_are_records_like_all_others(store: Store) -> None:
    kind = store.kind(record("", call_id="", started_at=0.0, cached=True, outcome="cached", user="u1", model="m"))
    for number in range(70):
        assert kind.served(DAY + number)
    found = store.records(user="u1")
    assert [row.started_at for row in found] == [DAY + number for number in reversed(range(70))]
    assert {row._replace(id="", call_id="", started_at=0.0) for row in found} == {kind.like._replace(id="")}
    assert len({row.id for row in found}) == len({row.call_id for row in found}) == 70
    assert [(value, sums) for _, value, sums in store.totals(dimension="model")] == [("m", Totals(cached=70))]


@pytest.mark.parametrize("count", [5, 70, 300])
def test_cached_answers_of_a_kind_each_keep_what_they_would_have_cost(store: Store, count: int) -> None:
    kind = store.kind(record("", call_id="", started_at=0.0, cached=True, outcome="cached", user="u1"))
    costs = [None if number % 5 == 4 else number % 3 for number in range(count)]
    for number, saved in enumerate(costs):
        assert kind.served(DAY + number, saved)
    assert [row.list_nano for row in store.records(user="u1")] == costs[::-1]
    known = [saved for saved in costs if saved is not None]
    for _ in range(2):
        ((_, _, sums),) = store.totals(dimension="user")
        assert sums == Totals(cached=count, saved_nano=sum(known), saved=len(known))
        assert (sums.list_nano, sums.unknown_list) == (sum(known), count - len(known))
        count, known = count + 1, [*known, 9]
        store.append(record(cached=True, outcome="cached", user="u1", saved_nano=9))


def test_records_are_filtered_and_come_newest_first(store: Store) -> None:
    for number in range(10):
        store.append(record(f"r{number}", started_at=DAY + number, user=f"u{number % 2}", call_id=f"c{number // 5}"))
    ids = [row.id for row in store.records()]
    assert ids == [f"r{number}" for number in reversed(range(10))]
    assert [row.id for row in store.records(limit=2)] == ["r9", "r8"]
    assert [row.id for row in store.records(user="u1", limit=2)] == ["r9", "r7"]
    assert [row.id for row in store.records(since=DAY + 3, until=DAY + 5)] == ["r4", "r3"]
    assert [row.id for row in store.records(call_id="c0", user="u0")] == ["r4", "r2", "r0"]
    assert [row.id for row in store.records(id="r3")] == ["r3"]
    assert store.records(user="nobody") == []


def test_an_unknown_field_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="colour"):
        store.records(colour="red")


def test_the_control_of_each_experiment_is_summed_apart(store: Store) -> None:
    """They were one row, as if both experiments had the same program in it."""
    for experiment, variant, cost in (
        ("e1", "control", 1),
        ("e2", "control", 2),
        ("e1", "new", 4),
        (None, "control", 8),
    ):
        store.append(record(experiment=experiment, variant=variant, cost_nano=cost))
        kind = store.kind(record("", cached=True, outcome="cached", experiment=experiment, variant=variant))
        for _ in range(70):
            kind.served(DAY, cost)
    sums = {value: (sums.cost_nano, sums.list_nano) for value, sums in store.sums(dimension="variant")}
    assert sums == {"e1/control": (1, 71), "e2/control": (2, 142), "e1/new": (4, 284), "control": (8, 568)}
    assert [value for value, _ in store.sums(dimension="experiment")] == ["e1", "e2"]
    [(_, _, of_one)] = store.totals(dimension="experiment", value="e1")
    assert (of_one.cost_nano, of_one.attempts, of_one.cached, of_one.list_nano) == (5, 2, 140, 355)


@pytest.mark.parametrize("hit", [False, True])
def test_records_are_found_by_half_a_character(store: Store, hit: bool) -> None:
    """In a tag's name it ended in `TypeError: str is not valid UTF-8` instead of finding nothing."""
    tags = (("\ud800", "x"), ("team", "\udfff"))
    store.append(record(id="h", tags=tags, cached=hit, user="\ud801"))
    for wanted in ({"tag:\ud800": "x"}, {"tag:team": "\udfff"}, {"user": "\ud801"}):
        assert [found.id for found in store.records(**wanted)] == ["h"]
    for wanted in ({"tag:\ud802": "x"}, {"tag:\ud800": "\ud800"}, {"tag:team": "\udffe"}, {"user": "\ud802"}):
        assert store.records(**wanted) == []


def test_totals_are_per_day_and_value(store: Store) -> None:
    day = 86_400.0
    for number in range(4):
        at, cost = DAY + number // 2 * day, CENT * (number + 1)
        made = record(started_at=at, user=f"u{number % 2}", cost_nano=cost, tags=(("team", "a"),))
        store.append(made._replace(input_tokens=10, output_tokens=2))
    store.append(record(started_at=DAY + day, cost_nano=None, outcome="error"))
    rows = store.totals()
    assert [(day, value) for day, value, _ in rows] == [("2025-11-23", ""), ("2025-11-24", "")]
    assert rows[0][2] == Totals(3 * CENT, 0, 0, 2, 0, 0, 20, 4)
    assert rows[1][2] == Totals(7 * CENT, 0, 1, 3, 0, 1, 20, 4)
    assert [(day, value, sums.cost_nano) for day, value, sums in store.totals(dimension="user")] == [
        ("2025-11-23", "u0", CENT),
        ("2025-11-23", "u1", 2 * CENT),
        ("2025-11-24", "u0", 3 * CENT),
        ("2025-11-24", "u1", 4 * CENT),
    ]
    assert [sums.attempts for _, _, sums in store.totals(dimension="tag:team")] == [2, 2]
    assert [day for day, _, _ in store.totals(since_day="2025-11-24")] == ["2025-11-24"]
    assert [day for day, _, _ in store.totals(until_day="2025-11-23")] == ["2025-11-23"]
    assert store.totals(since_day="2025-11-25") == []
    assert store.totals(dimension="tenant") == []
    assert [(day, sums.cost_nano) for day, _, sums in store.totals(dimension="user", value="u1")] == [
        ("2025-11-23", 2 * CENT),
        ("2025-11-24", 4 * CENT),
    ]
    assert store.totals(dimension="user", value="u2") == []


def test_sums_are_those_of_all_days_the_dearest_first(store: Store) -> None:
    for number in range(8):
        at = DAY + number // 4 * 86_400.0
        store.append(record(started_at=at, user=f"u{number % 4}", cost_nano=CENT * (number % 4), cached=number > 6))
    found = store.sums(dimension="user")
    assert [(value, sums.cost_nano, sums.attempts, sums.cached) for value, sums in found] == [
        ("u3", 6 * CENT, 1, 1),
        ("u2", 4 * CENT, 2, 0),
        ("u1", 2 * CENT, 2, 0),
        ("u0", 0, 2, 0),
    ]
    assert store.sums(dimension="user", most=2) == found[:2]
    assert store.sums(dimension="user", most=0) == []
    for many in (2**31, 2**59, 2**63 - 1):
        assert store.sums(dimension="user", most=many) == found
        assert len(store.sums(dimension="user", since_day="2025-11-24", most=many)) == 4
    assert [
        (value, sums.cost_nano) for value, sums in store.sums(dimension="user", since_day="2025-11-24", most=1)
    ] == [("u3", 3 * CENT)]
    assert store.sums(dimension="user", since_day="2025-11-25") == []
    assert store.sums(dimension="tenant") == []


def test_a_correction_mends_record_accounts_and_totals(store: Store) -> None:
    reservation = granted(store, ask(5 * CENT, user="u"))
    store.settle(reservation, settlement(reservation, 5 * CENT, estimated=True))
    assert store.correct(reservation.id, 2 * CENT)
    (row,) = store.records()
    assert (row.cost_nano, row.estimated) == (2 * CENT, False)
    assert store.account("day") == AccountState(2 * CENT, 0, 0)
    ((_, _, sums),) = store.totals(dimension="user")
    assert (sums.cost_nano, sums.unconfirmed_nano, sums.attempts) == (2 * CENT, 0, 1)
    check_books(store)


def test_unconfirmed_records_are_found_until_they_are_corrected(store: Store) -> None:
    for number in range(9):  # three a day, the middle one of each known
        at = DAY + number // 3 * 86_400.0 + number % 3 * 3_600.0
        store.append(record(id=f"r{number}", started_at=at, cost_nano=CENT, estimated=number % 3 != 1))
    assert [row.id for row in store.unconfirmed()] == ["r8", "r6", "r5", "r3", "r2", "r0"]
    assert all(row.estimated for row in store.unconfirmed())
    assert [row.id for row in store.unconfirmed(DAY + 86_400.0 + 1.0)] == ["r8", "r6", "r5"]
    assert [row.id for row in store.unconfirmed(DAY + 86_400.0)] == ["r8", "r6", "r5", "r3"]
    assert store.correct("r5", 2 * CENT)
    assert store.correct("r0", 0)
    assert [row.id for row in store.unconfirmed()] == ["r8", "r6", "r3", "r2"]
    assert store.unconfirmed(DAY + 30 * 86_400.0) == []
    store.append(record(id="free", started_at=DAY, cost_nano=0, estimated=True))
    store.append(record(id="unknown", started_at=DAY + 4 * 86_400.0, cost_nano=None, estimated=True))
    assert [row.id for row in store.unconfirmed()] == ["r8", "r6", "r3", "r2"]


def test_a_correction_lets_a_waiting_call_go(store: Store) -> None:
    first = granted(store, ask(50 * CENT))
    store.settle(first, settlement(first, 50 * CENT, estimated=True))
    held = granted(store, ask(40 * CENT))
    waiting = store.admit(ask(20 * CENT))
    store.flush(10)
    assert waiting.state == PENDING
    assert store.correct(first.id, 10 * CENT)
    assert decided(waiting).state == GRANTED
    assert held.state == GRANTED


def test_an_unknown_record_cannot_be_corrected(store: Store) -> None:
    assert not store.correct("nobody", CENT)


def test_a_sum_beyond_64_bits_stops_nobody_but_who_draws_on_it(store: Store) -> None:
    """A slip in a correction: the next call of another budget was refused, because the file took nothing."""
    first = granted(store, ask(CENT))
    store.settle(first, settlement(first, CENT))
    assert store.correct(first.id, 10**22)
    other = granted(store, ask(CENT, accounts=("other",)))
    store.settle(other, settlement(other, CENT))
    assert refused(store, ask(CENT)).reason == "budget_exceeded"
    assert store.account("other").spent == CENT
    assert store.account("day").spent >= 2**63 - 1


def test_appending_a_known_id_replaces_the_record(store: Store) -> None:
    store.append(record("r", cost_nano=CENT))
    store.append(record("other", cost_nano=CENT))
    store.append(record("r", cost_nano=3 * CENT))
    assert {row.id: row.cost_nano for row in store.records()} == {"r": 3 * CENT, "other": CENT}
    check_books(store, ())


def test_a_call_that_left_late_is_counted_from_then(still: Store, clock: FakeClock) -> None:
    store = still
    limit = RateLimit(rpm=60, burst=1)
    reservation = granted(store, ask(limit=limit, budget=None))
    clock.advance(0.5)
    assert store.preview(ask(limit=limit, budget=None))[0] == pytest.approx(0.54, abs=0.02)
    store.sent_late(reservation, store.now())
    assert store.preview(ask(limit=limit, budget=None))[0] == pytest.approx(1.04, abs=0.02)
    store.settle(reservation, settlement(reservation, None))
    store.sent_late(reservation, store.now())  # it has ended
    assert store.holds() == 0


@pytest.mark.parametrize("namespace", ["caf\udce9", "\ud83d", "a}b%"])
def test_a_namespace_may_be_called_as_a_directory_is(make_store: Callable[..., Store], namespace: str) -> None:
    """The default is the directory's name, which need not be UTF-8; a store on a server could not be opened then."""
    for opened in range(1, 3):
        store = make_store(namespace)
        reservation = granted(store, ask())
        store.settle(reservation, settlement(reservation, CENT))
        assert store.flush(10)
        before = opened if store.durable else 1
        assert (store.account("day").spent, len(store.records())) == (before * CENT, before)
        store.close()


# -- ending ------------------------------------------------------------------------------------------------------------
def test_closing_twice_is_harmless_and_reading_goes_on(store: Store) -> None:
    reservation = granted(store, ask())
    store.settle(reservation, settlement(reservation, CENT))
    store.close()
    store.close()
    assert store.account("day").spent == CENT
    assert len(store.records()) == 1


def test_namespaces_do_not_mix(make_store: Callable[..., Store]) -> None:
    one, other = make_store("one"), make_store("other")
    limit = RateLimit(rpm=1)
    reservation = granted(one, ask(limit=limit, id="same"))
    granted(other, ask(limit=limit, id="same"))
    one.settle(reservation, settlement(reservation, CENT))
    assert one.account("day") == AccountState(CENT, 0, 0)
    assert other.account("day") == AccountState(0, CENT, 0)
    assert (len(one.records()), len(other.records())) == (1, 0)
    assert other.totals() == []
    assert (one.holds(), other.holds()) == (0, 1)
    assert not other.correct(reservation.id, 0)


# -- runs --------------------------------------------------------------------------------------------------------------
def test_answers_of_a_run_are_numbered_by_key_and_told_in_order(store: Store) -> None:
    runs = store.runs
    kept = [
        runs.keep("it", key, b"answer %d" % number, "m", True) for number, key in enumerate([b"a", b"b", b"a", b"a"])
    ]
    assert [future.result(10) for future in kept] == [0, 0, 1, 2]
    assert runs.answers("it") == [(b"a", 0), (b"b", 0), (b"a", 1), (b"a", 2)]
    assert [runs.answer("it", b"a", ordinal) for ordinal in range(4)] == [b"answer 0", b"answer 2", b"answer 3", None]
    assert runs.answer("another", b"a", 0) is None
    assert runs.sizes() == {"it": (4, 32)}
    runs.keep("its", b"a", b"x", "m", True).result(10)
    assert (runs.answered(), runs.count("it"), runs.count("another")) == (["it", "its"], 4, 0)
    assert (runs.sizes("its"), runs.sizes("another")) == ({"its": (1, 1)}, {})


def test_an_answer_that_is_there_is_not_kept_again(store: Store) -> None:
    runs = store.runs
    assert runs.keep("it", b"a", b"first", "m", False).result(10) == 0
    assert runs.keep("it", b"a", b"second", "m", False).result(10) == 0
    assert runs.answer("it", b"a", 0) == b"first"
    assert runs.keep("it", b"a", b"third", "m", True).result(10) == 1
    assert runs.keep("it", b"a", b"fourth", "m", False).result(10) == 1


def test_ordinals_are_given_out_once(store: Store) -> None:
    runs = store.runs
    ordinals: list[int] = []

    def keeps() -> None:
        ordinals.extend([runs.keep("it", b"a", b"x", "m", True).result(10) for _ in range(25)])

    threads = [threading.Thread(target=keeps) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ordinals) == list(range(200))


def test_namespaces_keep_answers_and_notes_apart(make_store: Callable[..., Store]) -> None:
    one, other = make_store("one"), make_store("other")
    one.runs.keep("it", b"a", b"x", "m", True).result(10)
    one.runs.put_note("it", "header", "h")
    assert other.runs.answers("it") == []
    assert other.runs.note("it", "header") is None
    other.runs.remove("it", "|run|it|")
    assert one.runs.answers("it") == [(b"a", 0)]


def test_notes_of_runs_are_written_over_and_removed(store: Store) -> None:
    runs = store.runs
    runs.put_note("it", "header", "1")
    runs.put_note("it", "stop", "now")
    runs.put_note("other", "header", "2")
    runs.put_note("it", "header", "3")
    assert runs.note("it", "header") == "3"
    assert runs.noted("header") == {"it": "3", "other": "2"}
    runs.put_note("it", "stop", None)
    assert runs.note("it", "stop") is None


def test_a_removed_run_leaves_nothing_but_what_is_held(store: Store) -> None:
    """An account that holds something is the matter of calls that are under way."""
    runs = store.runs
    spent = granted(store, ask(5 * CENT, accounts=("|run|it|usd",)))
    store.settle(spent, settlement(spent, 2 * CENT))
    other = granted(store, ask(5 * CENT, accounts=("|run|its|usd",)))
    store.settle(other, settlement(other, 2 * CENT))
    granted(store, ask(5 * CENT, accounts=("|run|it|calls",)))
    runs.keep("it", b"a", b"x", "m", True).result(10)
    runs.keep("its", b"a", b"x", "m", True).result(10)
    runs.put_note("it", "header", "1")
    runs.remove("it", "|run|it|")
    assert store.account("|run|it|usd") == AccountState()
    assert store.account("|run|it|calls").held == 5 * CENT
    assert store.account("|run|its|usd").spent == 2 * CENT
    assert (runs.answers("it"), runs.note("it", "header"), runs.sizes()) == ([], None, {"its": (1, 1)})
    assert runs.keep("it", b"a", b"x", "m", True).result(10) == 0


def test_of_many_who_write_a_note_in_the_place_of_the_same_one_is_told_that_it_may(store: Store) -> None:
    runs, won = store.runs, []
    start = threading.Barrier(8)

    def begins(number: int) -> None:
        start.wait(10)
        won.extend([number] if runs.swap_note("it", "header", None, str(number)) else [])

    threads = [threading.Thread(target=begins, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert runs.note("it", "header") == str(won[0])
    assert not runs.swap_note("it", "header", "another", "new")
    assert runs.swap_note("it", "header", str(won[0]), "new")
    assert runs.note("it", "header") == "new"


def test_the_accounts_of_a_removed_run_may_stay(store: Store) -> None:
    spent = granted(store, ask(5 * CENT, accounts=("|run|it|usd",)))
    store.settle(spent, settlement(spent, 2 * CENT))
    store.runs.keep("it", b"a", b"x", "m", True).result(10)
    store.runs.remove("it", None)
    assert store.runs.answers("it") == []
    assert store.account("|run|it|usd").spent == 2 * CENT
