"""A wall clock that is set back does not make a store forget what was spent in the window that goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest

from dspy_prod.context.current import EMPTY
from dspy_prod.options import Budget
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.stores.admission.accounts import AccountBook
from dspy_prod.stores.base import GRANTED, Account, AccountState, Reservation, Store
from dspy_prod.stores.durable import transactions
from dspy_prod.stores.redis.accounts import window_of
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, DOLLAR, FakeClock, ask, decided, granted, settlement, turn, until

HOUR = 3600.0
LATE = 23 * HOUR + 50 * 60
MIDNIGHT = 1_763_856_000.0
"""The beginning of 2025-11-23, UTC."""


class Clock(FakeClock):
    """It says ten to midnight; `set_back` sets its wall clock, and lets no time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.wall = MIDNIGHT + LATE

    def time(self) -> float:
        return self.wall + self._passed

    def set_back(self, seconds: float) -> None:
        self.wall -= seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def wanted(rule: BudgetRule, clock: Clock, amount: int = CENT) -> Reservation:
    account = rule.account(EMPTY, "m", clock.time())
    reservation = ask(amount, lease=10.0)
    reservation.accounts = (account,)
    return reservation


def spend(store: Store, rule: BudgetRule, clock: Clock, amount: int) -> int:
    """Nano-USD that could be spent."""
    reservation = decided(store.admit(asked := wanted(rule, clock, amount)))
    if reservation.state != GRANTED:
        return 0
    store.settle(asked, settlement(asked, amount))
    assert store.flush(10)
    return amount


def pass_time(store: Store, clock: Clock, seconds: float) -> None:
    """Have the store look what is over."""
    clock.advance(seconds)
    if isinstance(store, SqliteStore):
        with store._writer.io:
            tables = store._writer.tables
            tables.begin()
            tables.sweep(store.now(), transactions.SWEEP_BATCH)
            tables.commit()
    other = ask(1, accounts=("other|-|total",), lease=1.0)
    granted(store, other)
    clock.advance(2.0)
    turn(store)


def day() -> BudgetRule:
    return BudgetRule(Budget(usd=1, per="day"))


@pytest.mark.parametrize("asked_every", [0.5, 10.0])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_day_s_budget_is_spent_once_also_where_the_clock_is_set_back(
    make_store: Callable[..., Store], clock: Clock, asked_every: float, restarted: bool
) -> None:
    """It was ten to midnight when the account was first used: two hours and ten minutes later it was forgotten."""
    store, rule = make_store(clock=clock), day()
    spent = spend(store, rule, clock, DOLLAR)
    clock.set_back(10 * HOUR)
    if restarted and store.durable:
        store.close()
        store, rule = make_store(clock=clock), day()
    for _ in range(int(10 / asked_every)):
        spent += spend(store, rule, clock, CENT)
        pass_time(store, clock, asked_every * HOUR)
        spent += spend(store, rule, clock, CENT)
    assert spent == DOLLAR
    clock.advance(HOUR)
    assert spend(store, rule, clock, CENT) == CENT  # it is tomorrow


def test_a_refusal_keeps_what_is_spent(make_store: Callable[..., Store], clock: Clock) -> None:
    """Spent early in a day, refused until its evening, and then the clock is set back to the morning."""
    clock.set_back(LATE)
    store, rule = make_store(clock=clock), day()
    spent = spend(store, rule, clock, DOLLAR)
    for _ in range(23):
        pass_time(store, clock, HOUR)
        spent += spend(store, rule, clock, CENT)
    clock.set_back(15 * HOUR)
    for _ in range(15):
        pass_time(store, clock, HOUR)
        spent += spend(store, rule, clock, CENT)
    assert spent == DOLLAR


def test_a_use_is_written_back_once_an_hour() -> None:
    """A budget that is spent is asked of again and again, by processes that all hear of what others write."""
    book = AccountBook(lambda key: AccountState(spent=DOLLAR))
    account, written = Account("day|-|x", DOLLAR, "day", 24 * HOUR, "day"), []
    for now in (0.0, 1.0, 3599.0, 3601.0, 3602.0):
        book.forget()
        book.use(account, now)
        written.append(account.key in book.dirty)
        assert book.get(account.key).ends_at >= 24 * HOUR
        book.written()
    assert written == [True, False, False, True, False]


def test_a_use_that_could_not_be_written_back_is_with_the_next() -> None:
    book = AccountBook(lambda key: AccountState(spent=DOLLAR))
    account = Account("day|-|x", DOLLAR, "day", 24 * HOUR, "day")
    book.use(account, 0.0)
    book.undo()
    book.forget()
    book.use(account, 1.0)
    assert book.dirty == {account.key}


def test_calls_that_are_admitted_ahead_keep_what_they_spend(path: str, clock: Clock) -> None:
    """They do not go through the core, which has to hear all the same that their account is used."""
    with closing(SqliteStore(path, clock=clock)) as store:
        rule = day()
        for _ in range(100):
            assert spend(store, rule, clock, CENT // 1000)
        assert store._drawn.shares
        entry = store._writer._transactions.core.accounts.get(rule.account(EMPTY, "m", clock.time()).key)
        entry.note_at, entry.ends_at = 0.0, 1.0  # as when the first of them was long ago
        until(lambda: spend(store, rule, clock, CENT // 1000) > 0 and entry.ends_at > store.now() + 23 * HOUR)


def test_on_a_server_an_account_is_never_kept_shorter_than_before(valkey: str, clock: Clock) -> None:
    """A process that was told of an earlier end settles last."""
    with closing(RedisStore(valkey, "set back", clock=clock)) as one, closing(Connection(valkey, "set back")) as server:
        asked = wanted(day(), clock)
        key = asked.accounts[0].key
        asked.accounts = (asked.accounts[0]._replace(ends_in=600.0),)
        granted(one, asked)
        with closing(RedisStore(valkey, "set back", clock=clock)) as other:
            spend(other, day(), clock, CENT)
        one.settle(asked, settlement(asked, CENT))
        assert one.flush(10)
        kept = server.read([("TTL", server.key("account", key)), ("TTL", window_of(server, key))])
        assert min(kept) > 24 * HOUR
        (end,) = server.read([("ZSCORE", server.key("ends"), key)])
        assert float(end) >= one.now() + 23 * HOUR
