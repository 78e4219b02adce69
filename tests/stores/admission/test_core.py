"""The admission core: money and holds in any order of events, in memory and as a durable store uses it."""

from __future__ import annotations

from math import inf
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import (
    GRANTED,
    PENDING,
    REFUSED,
    WITHDRAWN,
    AccountState,
    Refusal,
    Reservation,
    Settlement,
    Terms,
)
from tests.examples import examples
from tests.stores.support import ask, settlement

LIMIT = 100
ACCOUNTS = ("a", "b", "c")
LEASE = 50.0


def durable() -> tuple[AdmissionCore, Disk]:
    disk = Disk()
    return AdmissionCore(disk), disk


class Disk:
    """What a durable store has written."""

    owner = "disk"

    def __init__(self) -> None:
        self.accounts: dict[str, AccountState] = {}
        self.limiters: dict[str, tuple[bytes, RateLimit]] = {}
        self.abandoned: dict[str, Hold] = {}
        self.holds: dict[str, Hold] = {}

    def load_account(self, key: str) -> AccountState | None:
        return self.accounts.get(key)

    def load_terms(self, title: str) -> Terms | None:
        return None

    def load_limiter(self, key: str) -> tuple[bytes, RateLimit] | None:
        return self.limiters.get(key)

    def load_abandoned(self, id: str) -> Hold | None:
        return self.abandoned.get(id)

    def load_own(self) -> list[Hold]:
        return []

    def commit(self, core: AdmissionCore, ledger: dict[str, CallRecord]) -> None:
        """Write what changed, then tell."""
        changes = core.changes
        assert changes is not None
        for key in core.accounts.dirty:
            self.accounts[key] = core.accounts.state(key)
        for key in changes.limiters:
            state = core.limiter_state(key)
            assert state is not None
            self.limiters[key] = (state.dump(), state.limit)
        for id in (*changes.removed, *changes.reaped):
            del self.holds[id]  # a hold that never reached the disk must not be removed from it
        self.holds.update(changes.added)
        for id in changes.forgiven:
            del self.abandoned[id]
        self.abandoned.update(changes.abandoned)
        for row in (*core.appended, *core.replaced):
            ledger[row.id] = row
        for reservation, state_, refusal in changes.verdicts:
            if reservation.state == PENDING:
                reservation.refusal, reservation.state = refusal, state_
        core.appended.clear()
        core.replaced.clear()
        core.accounts.dirty.clear()
        changes.clear()


class Books(RuleBasedStateMachine):
    """Reserve, settle, release, withdraw, die, come back late, correct: the books always balance."""

    reservations: Bundle[Reservation] = Bundle("reservations")

    @initialize(is_durable=st.booleans())
    def begin(self, is_durable: bool) -> None:
        self.now = 0.0
        self.ledger: dict[str, CallRecord] = {}
        self.all: list[Reservation] = []
        self.disk: Disk | None = None
        if is_durable:
            self.core, self.disk = durable()
        else:
            self.core = AdmissionCore()
        self.finished: set[str] = set()

    def write(self) -> None:
        """What a store does after each batch."""
        if self.disk is not None:
            self.disk.commit(self.core, self.ledger)
            return
        for row in (*self.core.appended, *self.core.replaced):
            self.ledger[row.id] = row
        self.core.appended.clear()
        self.core.replaced.clear()
        self.core.take_decided()

    @rule(
        target=reservations,
        amount=st.integers(0, 120),
        accounts=st.sets(st.sampled_from(ACCOUNTS)),
        seats=st.sampled_from([None, 1, 2]),
        priority=st.integers(0, 2),
    )
    def admit(self, amount: int, accounts: set[str], seats: int | None, priority: int) -> Reservation:
        limit = None if seats is None else RateLimit(concurrency=seats)
        wanted = ask(
            amount, budget=LIMIT, accounts=tuple(sorted(accounts)), limit=limit, key=f"seats-{seats}",
            priority=priority, lease=LEASE,
        )  # fmt: skip
        reservation = self.core.admit(wanted, self.now)
        self.all.append(reservation)
        self.write()
        return reservation

    @rule(reservation=reservations, share=st.integers(0, 100), estimated=st.booleans(), told=st.booleans())
    def settle(self, reservation: Reservation, share: int, estimated: bool, told: bool) -> None:
        """Also of reservations that are not granted, already settled, or abandoned meanwhile."""
        if reservation.state != GRANTED:
            return
        cost = reservation.amount * share // 100
        done = settlement(reservation, cost, estimated=estimated)
        first = reservation.id not in self.finished
        self.finished.add(reservation.id)
        self.core.settle(done if told or cost or not first else done._replace(record=None), self.now)
        self.write()

    @rule(reservation=reservations)
    def release(self, reservation: Reservation) -> None:
        if reservation.state == GRANTED:
            self.finished.add(reservation.id)
            self.core.settle(Settlement(reservation.id, 0, 0, False, False, None), self.now)
            self.write()

    @rule(reservation=reservations)
    def withdraw(self, reservation: Reservation) -> None:
        if reservation.state == PENDING:
            assert self.core.withdraw(reservation, self.now)
            assert reservation.state == WITHDRAWN
            self.write()

    @rule(reservation=reservations, cost=st.integers(0, 100))
    def correct(self, reservation: Reservation, cost: int) -> None:
        row = self.ledger.get(reservation.id)
        if row is not None and row.estimated:
            assert row.cost_nano is not None
            self.core.replaced.append(self.core.correct(row, min(cost, row.cost_nano), self.now))
            self.write()

    @rule(seconds=st.sampled_from([1.0, 20.0, LEASE + 1.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.core.next_due() <= self.now:
            self.core.tick(self.now)
            self.write()

    @rule()
    def another_process_writes(self) -> None:
        """A commit by somebody else: memory is stale, and nothing else changes."""
        if self.disk is not None:
            self.core.forget()
            self.core.serve(self.now)
            self.write()

    @rule(reservation=reservations, amount=st.integers(1, 50))
    def a_batch_fails(self, reservation: Reservation, amount: int) -> None:
        """The disk refuses a batch: nothing of it has happened."""
        if self.disk is None:
            return
        new = self.core.admit(ask(amount, budget=LIMIT, accounts=ACCOUNTS, lease=LEASE), self.now)
        if reservation.state == GRANTED:
            self.core.settle(settlement(reservation, reservation.amount), self.now)
        undone = self.core.undo()
        self.core.remove(new, self.now)
        self.core.fail_waiting(Refusal("store_unavailable"))  # as the store does; and so with what was undone:
        for lost in undone:
            if lost.state == PENDING:
                lost.state = REFUSED
        self.write()

    # -- what is always true -------------------------------------------------------------------------------------------
    @invariant()
    def a_hard_budget_is_never_exceeded(self) -> None:
        for key in ACCOUNTS:
            state = self.core.account(key)
            assert 0 <= state.unconfirmed <= state.spent
            assert state.held >= 0
            assert state.spent + state.held <= LIMIT

    @invariant()
    def accounts_are_the_sum_of_records_and_holds(self) -> None:
        for key in ACCOUNTS:
            state = self.core.account(key)
            rows = [row for row in self.ledger.values() if key in row.accounts]
            assert state.spent == sum(row.cost_nano or 0 for row in rows)
            assert state.unconfirmed == sum(row.cost_nano or 0 for row in rows if row.estimated)
            assert state.held == sum(hold.amount for hold in self.core.holds.values() if key in hold.accounts)

    @invariant()
    def every_ticket_is_in_exactly_one_state(self) -> None:
        pending = [reservation for reservation in self.all if reservation.state == PENDING]
        assert self.core.waiting() == len(pending)
        for reservation in self.all:
            if reservation.id in self.core.holds:
                assert reservation.state == GRANTED

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """When nothing is held, nothing blocks: every wait ends by a settlement or the clock."""
        if not self.core.holds:
            assert self.core.waiting() == 0

    @invariant()
    def the_disk_has_exactly_the_open_holds(self) -> None:
        if self.disk is not None:
            assert self.disk.holds.keys() == self.core.holds.keys()

    @invariant()
    def concurrency_is_kept(self) -> None:
        for seats in (1, 2):
            assert sum(1 for hold in self.core.holds.values() if hold.limit_key == f"seats-{seats}") <= seats


Books.TestCase.settings = examples(100, stateful_step_count=40)
TestBooks = Books.TestCase


# -- the durable core, step by step ------------------------------------------------------------------------------------
def test_a_verdict_is_not_told_before_the_commit() -> None:
    core, disk = durable()
    reservation = core.admit(ask(10, budget=LIMIT), 0.0)
    assert reservation.state == PENDING
    disk.commit(core, {})
    assert reservation.state == GRANTED


def test_a_hold_that_ends_in_the_batch_in_which_it_began_never_touches_the_disk() -> None:
    core, _ = durable()
    reservation = core.admit(ask(10, budget=LIMIT), 0.0)
    core.settle(settlement(reservation, 5), 0.0)
    changes = core.changes
    assert changes is not None
    assert (changes.added, changes.removed) == ({}, {})
    assert core.account("day") == AccountState(5, 0, 0)


def test_an_undone_settlement_leaves_the_hold_as_it_was() -> None:
    core, disk = durable()
    ledger: dict[str, CallRecord] = {}
    reservation = core.admit(ask(10, budget=LIMIT), 0.0)
    disk.commit(core, ledger)
    core.settle(settlement(reservation, 5), 1.0)
    core.undo()
    assert core.account("day") == AccountState(0, 10, 0)
    core.settle(settlement(reservation, 5), 2.0)
    disk.commit(core, ledger)
    assert core.account("day") == AccountState(5, 0, 0)
    assert disk.holds == {}


def test_a_hold_of_another_process_is_abandoned_once() -> None:
    core, disk = durable()
    ledger: dict[str, CallRecord] = {}
    reservation = core.admit(ask(10, budget=LIMIT), 0.0)
    disk.commit(core, ledger)
    other = AdmissionCore(disk)
    (hold,) = disk.holds.values()
    other.abandon(hold, 100.0)
    disk.commit(other, ledger)
    assert disk.accounts["day"] == AccountState(10, 0, 10)
    assert disk.holds == {}
    assert other.holds == {}
    core.forget()
    core.holds.clear()  # as a store does when its lease is gone
    core.settle(settlement(reservation, 4), 101.0)
    disk.commit(core, ledger)
    assert disk.accounts["day"] == AccountState(4, 0, 0)
    assert disk.abandoned == {}
    assert sum(row.cost_nano or 0 for row in ledger.values()) == 4


def test_a_limiter_loaded_only_to_give_something_back_keeps_its_limits() -> None:
    """A settlement after another process wrote must not leave a limiter without its limits behind."""
    core, disk = durable()
    limit = RateLimit(rpm=2, burst=2)
    first = core.admit(ask(budget=None, limit=limit), 0.0)
    core.admit(ask(budget=None, limit=limit), 0.0)
    disk.commit(core, {})
    core.forget()
    core.settle(settlement(first, 0), 1.0)
    third = core.admit(ask(budget=None, limit=limit), 1.0)
    disk.commit(core, {})
    assert third.state == PENDING


def test_a_reaper_that_knows_no_settings_uses_the_stored_ones() -> None:
    core, disk = durable()
    limit = RateLimit(rpm=2, burst=2, concurrency=1)
    core.admit(ask(budget=None, limit=limit), 0.0)
    disk.commit(core, {})
    reaper = AdmissionCore(disk)
    (hold,) = disk.holds.values()
    reaper.abandon(hold, 5.0)
    disk.commit(reaper, {})
    snapshot = reaper.limiter("provider", 5.0)
    assert snapshot is not None
    assert (snapshot.requests_max, snapshot.requests_available, snapshot.in_flight) == (2, 1, 0)
    reservation = reaper.admit(ask(budget=None, limit=limit), 6.0)
    disk.commit(reaper, {})
    assert reservation.state == GRANTED


def test_a_limiter_written_by_another_version_starts_afresh() -> None:
    core, disk = durable()
    limit = RateLimit(rpm=2)
    disk.limiters["provider"] = (b'{"version": 99}', limit)
    reservation = core.admit(ask(budget=None, limit=limit), 0.0)
    disk.commit(core, {})
    assert reservation.state == GRANTED


def test_a_limit_that_only_reacts_is_not_written_and_not_forgotten() -> None:
    core, disk = durable()
    limit = RateLimit()
    core.throttled("provider", limit, 30.0, 0.0)
    disk.commit(core, {})
    core.forget()
    reservation = core.admit(ask(budget=LIMIT, amount=1, limit=limit), 1.0)
    disk.commit(core, {})
    assert disk.limiters == {}
    assert (reservation.state, reservation.blocked_on) == (PENDING, "paused")


def test_accounts_of_past_windows_are_forgotten_but_not_before_they_are_written() -> None:
    core = AdmissionCore()
    wanted = ask(10, budget=LIMIT, lease=10.0)
    wanted.accounts = (wanted.accounts[0]._replace(ends_in=5.0),)
    reservation = core.admit(wanted, 0.0)
    core.settle(settlement(reservation, 10), 1.0)
    core.admit(ask(1, budget=LIMIT, accounts=("other",), lease=10_000.0), 2.0)
    core.tick(10_002.0)
    assert core.accounts.entries.keys() == {"other"}
    assert core.correct(wanted.stub._replace(estimated=True), 3, 10_003.0).cost_nano == 3  # type: ignore[union-attr]
    assert core.account("day") == AccountState()


def test_a_carried_over_state_meets_what_another_process_carried_over_before() -> None:
    """The file was deleted: two processes write what they know, in any order."""
    core, disk = durable()
    other = AdmissionCore(disk)
    mine = core.admit(ask(10, budget=LIMIT), 0.0)
    disk.commit(core, {})
    theirs = other.admit(ask(20, budget=LIMIT), 0.0)
    done = other.admit(ask(30, budget=LIMIT), 0.0)
    other.settle(settlement(done, 30), 0.0)
    disk.commit(other, {})
    assert disk.accounts["day"] == AccountState(30, 30, 0)
    disk.accounts.clear()
    disk.holds.clear()
    for each in (core, other):
        each.carry_over()
        disk.commit(each, {})
        for rest in (core, other):
            if rest is not each:
                rest.accounts.dirty.clear()
    assert disk.accounts["day"] == AccountState(30, 30, 0)
    assert disk.holds.keys() == {mine.id, theirs.id}


def test_money_waits_do_not_end_up_in_two_lines() -> None:
    """A reservation that moves between limiter line and account is never lost or doubled."""
    core = AdmissionCore()
    seat = RateLimit(concurrency=1)
    holder = core.admit(ask(90, budget=LIMIT), 0.0)
    sitting = core.admit(ask(0, budget=LIMIT, limit=seat), 0.0)
    parked = core.admit(ask(50, budget=LIMIT, limit=seat), 0.0)
    lined = core.admit(ask(5, budget=LIMIT, accounts=("b",), limit=seat), 0.0)
    assert core.waiting() == 2
    core.settle(settlement(holder, 10), 1.0)
    assert core.waiting() == 2
    core.settle(settlement(sitting, 0), 2.0)
    assert (parked.state, lined.state) == (GRANTED, PENDING)
    core.settle(settlement(parked, 0), 3.0)
    assert lined.state == GRANTED
    assert core.waiting() == 0


def test_a_ticket_that_waited_for_money_takes_its_old_place_at_the_limiter() -> None:
    core = AdmissionCore()
    seat = RateLimit(concurrency=1)
    holder = core.admit(ask(90, budget=LIMIT), 0.0)
    sitting = core.admit(ask(0, budget=LIMIT, limit=seat), 0.0)
    early = core.admit(ask(50, budget=LIMIT, limit=seat), 0.0)
    late = core.admit(ask(0, budget=None, limit=seat), 0.0)
    core.settle(settlement(holder, 0), 1.0)
    core.settle(settlement(sitting, 0), 2.0)
    assert (early.state, late.state) == (GRANTED, PENDING)


def test_the_next_due_moment_is_a_lease_or_a_lines_turn() -> None:
    core = AdmissionCore()
    assert core.next_due() == inf
    reservation = core.admit(ask(10, budget=LIMIT, lease=30.0), 0.0)
    assert core.next_due() == 30.0
    limit = RateLimit(rpm=60, burst=1)
    core.admit(ask(budget=None, limit=limit, lease=600.0), 0.0)
    core.admit(ask(budget=None, limit=limit, lease=600.0), 0.0)
    assert 0.0 < core.next_due() < 2.0
    assert reservation.state == GRANTED


def test_everybody_in_line_is_refused_when_the_store_breaks() -> None:
    core = AdmissionCore()
    seat = RateLimit(concurrency=1)
    core.admit(ask(LIMIT, budget=LIMIT, limit=seat), 0.0)
    waiting = [core.admit(ask(5, budget=LIMIT), 0.0), core.admit(ask(5, budget=None, limit=seat), 0.0)]
    refusal: Any = settlement  # any object: the core only passes it on
    core.fail_waiting(refusal)
    assert [reservation.state for reservation in waiting] == [REFUSED, REFUSED]
    assert core.waiting() == 0
    assert {reservation.refusal for reservation in waiting} == {refusal}


def test_who_stood_behind_a_withdrawn_head_may_go() -> None:
    core = AdmissionCore()
    limit = RateLimit(tpm=100)
    core.admit(ask(budget=None, limit=limit, tokens=60), 0.0)
    large = core.admit(ask(budget=None, limit=limit, tokens=60), 40.0)
    small = core.admit(ask(budget=None, limit=limit, tokens=10), 40.0)
    assert (large.state, small.state) == (PENDING, PENDING)
    core.withdraw(large, 40.0)
    assert small.state == GRANTED


def test_who_comes_back_from_waiting_for_money_may_go_at_once() -> None:
    core = AdmissionCore()
    limit = RateLimit(tpm=100)
    core.admit(ask(budget=None, limit=limit, tokens=60), 0.0)
    holder = core.admit(ask(LIMIT, budget=LIMIT), 0.0)
    small = core.admit(ask(10, budget=LIMIT, limit=limit, tokens=10), 40.0)
    large = core.admit(ask(budget=None, limit=limit, tokens=60), 40.0)
    assert (small.state, large.state) == (PENDING, PENDING)
    core.settle(settlement(holder, 0), 40.0)
    assert (small.state, large.state) == (GRANTED, PENDING)


# -- looking ahead -----------------------------------------------------------------------------------------------------


def test_a_preview_is_what_admission_would_say_and_changes_nothing() -> None:
    """Money first, then the limiter, then the line: seconds until a grant, or why there will be none."""
    core, now = AdmissionCore(), 1_000.0
    seats = RateLimit(concurrency=1)
    assert core.preview(ask(60, budget=LIMIT), now) == (0.0, None)
    core.settle(settlement(core.admit(ask(60, budget=LIMIT), now), 60), now)
    wait, refusal = core.preview(ask(60, budget=LIMIT), now)
    assert wait == inf
    assert refusal is not None
    assert (refusal.reason, refusal.limit, refusal.spent, refusal.amount) == ("budget_exceeded", LIMIT, 60, 60)
    assert core.preview(ask(40, budget=LIMIT), now) == (0.0, None)
    one = ask(0, limit=seats, key="k", lease=LEASE)
    assert core.preview(one, now) == (0.0, None)
    core.admit(one, now)
    wait, refusal = core.preview(ask(0, limit=seats, key="k"), now)
    assert (wait, refusal) == (LEASE, None)
    assert (len(core.holds), core.waiting()) == (1, 0)


def test_a_preview_behind_a_line_counts_those_ahead() -> None:
    """Three a minute: whoever comes when two of them wait goes a minute after them."""
    core, now = AdmissionCore(), 1_000.0
    slow = RateLimit(rpm=1, burst=1, max_wait=1_000)
    for _ in range(3):
        core.admit(ask(0, limit=slow, key="k", horizon=inf), now)
    assert core.waiting() == 2
    wait, refusal = core.preview(ask(0, limit=slow, key="k"), now)
    assert refusal is None
    assert 120 <= wait <= 200


def test_a_grant_that_leaves_late_moves_what_it_counts_for() -> None:
    """And only that of a call that is still out, under a limit."""
    core, now = AdmissionCore(), 1_000.0
    paced = RateLimit(rpm=60, burst=1)
    reservation = core.admit(ask(0, limit=paced, key="k"), now)
    core.sent_late(reservation, now + 10)
    follower = ask(0, limit=paced, key="k", horizon=inf)
    core.admit(follower, now + 10)
    assert follower.state == PENDING  # the second of the first call has only begun
    free = core.admit(ask(5, budget=LIMIT), now)
    core.sent_late(free, now + 10)
    core.settle(settlement(reservation, 0), now + 11)
    core.sent_late(reservation, now + 50)
    core.tick(now + 12)
    assert follower.state == GRANTED
