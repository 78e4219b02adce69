"""Capacity drawn ahead: exact whatever processes do, used up, given back, and charged when a process dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dspy_prod.options import Budget, RateLimit
from dspy_prod.stores.admission.slices import LATENESS
from dspy_prod.stores.admission.window import AHEAD
from dspy_prod.stores.base import GRANTED, PENDING, AccountState, Reservation, Settlement
from dspy_prod.stores.durable import inbox
from dspy_prod.stores.durable.filling import LEAST
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.sqlite.asked import read_account
from dspy_prod.stores.sqlite.cells import place
from dspy_prod.stores.sqlite.finding import read_records
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.examples import examples
from tests.stores.sqlite.processes import Process
from tests.stores.support import FakeClock, ask, granted, settlement

AMOUNT = 1_000
PLENTY = 10_000 * AMOUNT
WIDE = RateLimit(rpm=600_000, tpm=6e9, concurrency=1000)
LEASE = 30.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state.db")


@pytest.fixture
def process(path: str, clock: FakeClock) -> Iterator[Process]:
    process = Process(path, clock, LEASE)
    yield process
    process.kill()


def wanted(budget: int = PLENTY, limit: RateLimit | None = WIDE, **options: Any) -> Reservation:
    return ask(AMOUNT, budget=budget, limit=limit, **options)


def warm(process: Process, **options: Any) -> None:
    """Two calls close on each other: a share is begun."""
    for _ in range(2):
        call = process.admit(wanted(**options))
        process.settle(call, settlement(call, AMOUNT))
    process.run()


def account(process: Process) -> AccountState:
    return read_account(process.tables.open(), process.tables.ns, "day")


def test_the_third_call_needs_no_transaction(process: Process) -> None:
    """321 us of a call on this store were transactions of its own."""
    warm(process)
    calls = [wanted() for _ in range(LEAST)]
    assert all(process.drawn.admit(call) for call in calls)
    assert [call.state for call in calls] == [GRANTED] * LEAST
    assert process.drawn.in_flight() == LEAST


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"budget": 350 * AMOUNT}, id="a hundredth of the budget is less than four calls"),
        pytest.param({"limit": RateLimit(rpm=300)}, id="a hundredth of the minute is"),
        pytest.param({"limit": RateLimit(rpm=600_000, burst=8)}, id="a quarter of the burst is"),
        pytest.param({"limit": RateLimit(tpm=3_000)}, id="a hundredth of the tokens is"),
        pytest.param({"limit": RateLimit(concurrency=7)}, id="an eighth of the seats is less than one"),
    ],
)
def test_near_a_limit_each_call_is_decided_by_itself(process: Process, options: dict[str, Any]) -> None:
    warm(process, **options)
    warm(process, **options)
    assert not process.drawn.admit(wanted(**options))


def test_what_nobody_uses_is_given_back(process: Process, clock: FakeClock, path: str) -> None:
    """After a quarter of a second without a call nothing is held, and nothing is left in the file."""
    warm(process)
    assert account(process).held > 0
    clock.advance(AHEAD + 0.01)
    assert not process.drawn.admit(wanted())
    process.run()
    assert account(process) == AccountState(2 * AMOUNT, 0, 0)
    assert process.core.limiter("provider", clock.time()).in_flight == 0
    assert process.core.limiter("provider", clock.time()).requests_available == 600_000 - 2
    assert process.drawn.shares == {}
    process.end()
    assert not place(path, process.tables.owner).exists()


def test_a_budget_made_smaller_holds_at_once(process: Process) -> None:
    """What is drawn under the old settings is not spent under the new ones."""
    small = Budget(usd=1e-6, name="small")

    def call() -> Reservation:
        made = wanted()
        made.accounts = (made.accounts[0]._replace(budget=small.title),)
        return made

    for _ in range(2):
        process.admit(call())
    assert process.drawn.admit(call())
    process.inbox.append((Transactions.declare, small, True))
    process.run()
    assert not process.drawn.admit(call())
    assert process.admit(call()).state == PENDING  # until what is in flight ends


def test_a_dead_process_is_charged_what_it_used(process: Process, path: str, clock: FakeClock) -> None:
    """Of what it had drawn: two calls in flight at their bounds, one that had ended at its cost. The rest is free."""
    warm(process)
    flying = [wanted(), wanted(), wanted()]
    assert all(process.drawn.admit(call) for call in flying)
    process.settle(flying[0], settlement(flying[0], 10))
    process.kill()
    other = Process(path, clock, LEASE)
    clock.advance(LEASE + 1)
    other.transactions._reap_at = 0.0
    other.run()
    used = 2 * AMOUNT + 10
    assert account(other) == AccountState(2 * AMOUNT + used, 0, used)
    lump = read_records(other.tables.open(), other.tables.ns, None, None, 1, {"outcome": "abandoned"})
    assert [(row.cost_nano, row.estimated, row.user) for row in lump] == [(used, True, None)]
    assert other.core.limiter("provider", clock.time()).in_flight == 0
    assert not place(path, process.tables.owner).exists()


def test_where_nothing_tells_what_it_used_all_of_it_is_charged(process: Process, path: str, clock: FakeClock) -> None:
    """The machine went down, or somebody deleted the file: never less than what the provider bills."""
    warm(process)
    held = account(process).held
    process.kill()
    place(path, process.tables.owner).unlink()
    other = Process(path, clock, LEASE)
    clock.advance(LEASE + 1)
    other.transactions._reap_at = 0.0
    other.run()
    assert account(other) == AccountState(2 * AMOUNT + held, 0, held)


def test_a_process_that_was_thought_dead_pays_once(process: Process, path: str, clock: FakeClock) -> None:
    """It slept longer than its lease: what it settles then takes the place of what was charged for it."""
    warm(process)
    flying = [wanted(), wanted()]
    assert all(process.drawn.admit(call) for call in flying)
    clock.advance(LEASE + 1)
    other = Process(path, clock, LEASE)
    other.transactions._reap_at = 0.0
    other.run()
    assert account(other) == AccountState(4 * AMOUNT, 0, 2 * AMOUNT)
    for call in flying:
        process.settle(call, settlement(call, 10))
        process.run()
    assert account(process) == AccountState(2 * AMOUNT + 20, 0, 0)
    rows = read_records(process.tables.open(), process.tables.ns, None, None, None, {})
    assert sum(row.cost_nano or 0 for row in rows) == 2 * AMOUNT + 20
    assert not process.drawn.admit(wanted())
    other.kill()


def test_a_call_that_nobody_settles_is_charged_when_its_lease_ends(process: Process, clock: FakeClock) -> None:
    """And corrected if somebody does after all."""
    warm(process)
    lost = wanted(lease=5.0)
    assert process.drawn.admit(lost)
    clock.advance(6.0)
    process.run()
    assert account(process) == AccountState(3 * AMOUNT, 0, AMOUNT)
    assert process.drawn.in_flight() == 0
    process.settle(lost, settlement(lost, 10))
    process.run()
    assert account(process) == AccountState(2 * AMOUNT + 10, 0, 0)


def test_a_call_that_cost_more_than_its_bound_is_paid_in_full(process: Process) -> None:
    """The overrun is recorded, and the share is as large as before."""
    warm(process)
    dear = wanted()
    assert process.drawn.admit(dear)
    process.settle(dear, settlement(dear, 50 * AMOUNT))
    process.run()
    assert account(process).spent == 52 * AMOUNT
    process.end()
    assert account(process) == AccountState(52 * AMOUNT, 0, 0)


def test_a_batch_that_cannot_be_written_changes_nothing(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is admitted from what was not durable; what was settled is written later, once."""
    warm(process)
    before = account(process)
    flying = [wanted() for _ in range(LEAST)]
    assert all(process.drawn.admit(call) for call in flying)
    for call in flying[:2]:
        process.settle(call, settlement(call, 10))
    with monkeypatch.context() as patch:
        patch.setattr(process.tables, "commit", lambda: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="space"):
            process.run()
    assert not process.drawn.admit(wanted())
    assert account(process) == before
    process.run()
    for call in flying[2:]:
        process.settle(call, settlement(call, 10))
    process.end()
    assert account(process) == AccountState(2 * AMOUNT + 40, 0, 0)


# -- a machine ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sent:
    """A call that left: what it may cost and use, then what it did."""

    process: Process
    reservation: Reservation
    at: float
    cost: int
    tokens: int
    flying: bool = True
    killed_at: float | None = None


LIMITS = st.sampled_from(
    [
        None,
        WIDE,
        RateLimit(rpm=6_000, tpm=600_000, concurrency=64),
        RateLimit(rpm=1_200),
        RateLimit(rpm=1_200, burst=100),
        RateLimit(tpm=200_000, concurrency=40),
    ]
)


class SharesMachine(RuleBasedStateMachine):
    """Three processes call, settle, die and come back: no budget or limit is passed, each nano is accounted for."""

    @initialize(limit=LIMITS, budget=st.sampled_from([2_000, 5_000, 100_000]))
    def begin(self, limit: RateLimit | None, budget: int) -> None:
        self.directory = TemporaryDirectory()
        self.path = f"{self.directory.name}/state.db"
        self.clock = FakeClock()
        self.limit, self.budget = limit, budget * AMOUNT
        self.processes = [Process(self.path, self.clock, LEASE) for _ in range(3)]
        self.sent: list[Sent] = []
        self.waiting: list[tuple[Process, Reservation]] = []
        self.fast = 0

    def note(self) -> None:
        """Whoever was granted leaves at once."""
        still = []
        for process, reservation in self.waiting:
            if reservation.state == GRANTED:
                self.leaves(process, reservation)
            elif reservation.state == PENDING and process in self.processes:
                still.append((process, reservation))
        self.waiting = still

    def leaves(self, process: Process, reservation: Reservation) -> None:
        self.sent.append(Sent(process, reservation, self.clock.time(), reservation.amount, reservation.tokens))
        self.within_the_minute()
        self.within_the_slice()

    @rule(index=st.integers(0, 2), calls=st.integers(1, 25), tokens=st.sampled_from([10, 100]))
    def calls_are_made(self, index: int, calls: int, tokens: int) -> None:
        process = self.processes[index]
        for _ in range(calls):
            reservation = ask(AMOUNT, budget=self.budget, limit=self.limit, tokens=tokens)
            if process.drawn.admit(reservation):
                self.fast += 1
                self.leaves(process, reservation)
            else:
                self.waiting.append((process, process.admit(reservation)))
                self.note()

    @rule(calls=st.integers(1, 40), share=st.sampled_from([0.0, 0.3, 1.0]), sent=st.booleans(), write=st.booleans())
    def calls_end(self, calls: int, share: float, sent: bool, write: bool) -> None:
        for call in [each for each in self.sent if each.flying and each.process in self.processes][:calls]:
            call.flying = False
            call.cost = int(call.cost * share) if sent else 0
            call.tokens = int(call.tokens * share) if sent else 0
            if not sent:
                call.at = -1.0
            done = Settlement(call.reservation.id, call.cost, call.tokens, sent, False, None)
            call.process.settle(call.reservation, done)
        if write:
            self.everybody_writes()

    @rule()
    def everybody_writes(self) -> None:
        for process in self.processes:
            process.run()
        self.note()

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.2, 0.5, 3.0, 20.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        """A process that lives renews its lease."""
        while seconds > 0:
            self.clock.advance(min(seconds, LEASE / 3))
            seconds -= LEASE / 3
            if seconds > 0:
                self.everybody_writes()

    @precondition(lambda self: any(process.drawn.shares for process in self.processes))
    @rule(index=st.integers(0, 2))
    def one_is_killed(self, index: int) -> None:
        process = self.processes[index]
        process.kill()
        untold = {operation[1].id for operation in process.inbox if operation[0] is Transactions.settle}
        for call in self.sent:
            if call.flying and call.process is process:
                call.killed_at = self.clock.time()
            if call.reservation.id in untold:  # decided by itself, so that nothing but a transaction tells its end
                call.cost = call.reservation.amount
        self.processes[index] = Process(self.path, self.clock, LEASE)
        self.note()

    # -- what always holds -------------------------------------------------------------------------------------------
    def within_the_minute(self) -> None:
        if self.limit is not None:
            window = [call for call in self.sent if call.at > self.clock.time() - 60]
            assert len(window) <= (self.limit.rpm or len(window))
            assert sum(call.tokens for call in window) <= (self.limit.tpm or float("inf"))

    def within_the_slice(self) -> None:
        if self.limit is not None and self.limit.rpm is not None:
            burst = self.limit.burst or int(self.limit.rpm // 60)
            times = sorted(call.at for call in self.sent if call.at > 0)
            if len(times) > burst:
                assert times[-1] - times[-1 - burst] >= burst * 60 / self.limit.rpm - LATENESS - 1e-6

    @invariant()
    def no_budget_is_passed(self) -> None:
        if hasattr(self, "sent"):
            assert sum(call.cost for call in self.sent) <= self.budget

    @invariant()
    def no_more_are_in_flight_than_may_be(self) -> None:
        if hasattr(self, "sent") and self.limit is not None and self.limit.concurrency is not None:
            flying = [call for call in self.sent if call.flying and call.killed_at is None]
            assert len(flying) <= self.limit.concurrency

    def teardown(self) -> None:
        if not hasattr(self, "sent"):
            return
        for _ in range(200):
            for call in self.sent:
                if call.flying and call.process in self.processes:
                    call.flying = False
                    call.process.settle(call.reservation, settlement(call.reservation, call.cost))
            self.time_passes(LEASE + 1)
            for process in self.processes:
                process.transactions._reap_at = 0.0
            self.everybody_writes()
            if not self.waiting and not any(call.flying and call.process in self.processes for call in self.sent):
                break
        assert self.waiting == []
        for process in self.processes:
            process.end()
        last = Process(self.path, self.clock, LEASE)
        state = account(last)
        assert (state.spent, state.held) == (sum(call.cost for call in self.sent), 0)
        snapshot = last.core.limiter("provider", self.clock.time())
        assert snapshot is None or snapshot.in_flight == 0
        last.tables.sweep(self.clock.time(), 100)
        assert not list(Path(self.directory.name).glob("*.drawn"))
        last.kill()
        self.directory.cleanup()


SharesMachine.TestCase.settings = examples(20, stateful_step_count=25)
TestSharesMachine = SharesMachine.TestCase


def test_seats_are_renewed_before_anybody_is_served_who_waits_for_one(tmp_path: Path) -> None:
    """A writer that was held up for most of a lease renews what its calls in flight hold; their seats are not free."""
    clock = FakeClock()
    process = Process(str(tmp_path / "state.db"), clock, LEASE)
    calls = [ask(AMOUNT, limit=RateLimit(tpm=200_000, concurrency=40)) for _ in range(41)]
    for call in calls:
        if not process.drawn.admit(call):
            process.admit(call)
    assert process.drawn.shares
    assert [call.state for call in calls] == [GRANTED] * 40 + [PENDING]
    for held_up in (LEASE / 3, LEASE * 2 / 3, LEASE * 2 / 3):
        clock.advance(held_up)
        process.run()
    assert calls[-1].state == PENDING
    process.kill()


def test_what_is_drawn_and_not_used_counts_as_free(path: str) -> None:
    """For who reads: nothing is held, and nobody is in flight."""
    with contextlib.closing(SqliteStore(path)) as store:
        for _ in range(20):
            call = granted(store, wanted())
            store.settle(call, settlement(call, AMOUNT))
        assert store._drawn.shares
        assert store.holds() == 0
        assert store.account("day") == AccountState(20 * AMOUNT, 0, 0)
        limiter = store.limiter("provider")
        assert limiter is not None
        assert (limiter.in_flight, limiter.requests_available) == (0, 600_000 - 20)


def test_what_the_provider_says_ends_a_share(process: Process, path: str, clock: FakeClock) -> None:
    """A 429 that came while a share was being filled up was not heard for a quarter of a second."""
    warm(process)
    assert process.drawn.admit(wanted())
    other = Process(path, clock, LEASE)
    other.inbox.append((Transactions.throttled, ("provider", WIDE), 5.0))
    other.run()
    process.run()
    assert not process.drawn.admit(wanted())
    assert process.admit(wanted()).state == PENDING
    other.kill()


def test_a_call_that_ends_after_its_store_was_closed_raises_nothing(path: str, clock: FakeClock) -> None:
    """An AssertionError came out of it; and what it cost is still charged, by what stands in its cell."""
    process = Process(path, clock, LEASE)
    warm(process)
    late = wanted()
    assert process.drawn.admit(late)
    process.end()
    process.settle(late, settlement(late, 10))
    other = Process(path, clock, LEASE)
    clock.advance(LEASE + 1)
    other.transactions._reap_at = 0.0
    other.run()
    assert account(other) == AccountState(2 * AMOUNT + 10, 0, 10)
    other.kill()


def test_a_child_settles_nothing_of_its_parent_s_shares(process: Process, path: str, clock: FakeClock) -> None:
    """Forked in the middle of a call, it has a copy of it, and of the share; the parent's cell is the same memory."""
    warm(process)
    call = wanted()
    assert process.drawn.admit(call)
    child = Process(path, clock, LEASE)
    assert not child.drawn.settle(call, settlement(call, AMOUNT))
    assert process.drawn.in_flight() == 1
    child.kill()


def test_a_caller_is_slowed_down_without_a_lock_in_hand(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slept with the lock that every call of the process needs, an event loop's too."""
    with contextlib.closing(SqliteStore(path)) as store:
        calls = [granted(store, ask(budget=None)) for _ in range(3)]
        free: list[bool] = []
        monkeypatch.setattr(inbox, "FULL", -1)
        monkeypatch.setattr(inbox.Inbox, "_slow_down", lambda _: free.append(not store._local._lock.locked()))
        for call in calls:
            store.settle(call, settlement(call, None))
        assert free == [True] * 3
