"""The Redis store by itself: its URL, its time, a fork, and what others do to its server."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import redis

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED, REFUSED, AccountState, CachedAnswer
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.redis.timing import RedisTime
from tests.stores.redis.servers import started_valkey
from tests.stores.support import CENT, FakeClock, ask, check_books, decided, granted, settlement, until


# -- how it is opened --------------------------------------------------------------------------------------------------
def test_one_url_and_namespace_are_one_store(valkey: str, namespace: str) -> None:
    """Valkey's scheme means the same, and our options are not told to redis-py."""
    store = open_store(f"{valkey}?lease=7&max_records=5", namespace)
    assert isinstance(store, RedisStore)
    assert open_store(valkey, namespace) is store
    assert open_store(valkey.replace("redis://", "valkey://"), namespace) is store
    assert open_store(valkey, namespace + "2") is not store
    assert (store._lease, store._max_records, store.url, store.durable) == (7.0, 5, valkey, True)
    store.close()
    assert open_store(valkey, namespace) is not store


def test_a_store_that_nobody_uses_is_let_go(valkey: str, namespace: str) -> None:
    """And what it had posted is written."""
    store = open_store(valkey, namespace)
    each = granted(store, ask(CENT))
    store.settle(each, settlement(each, CENT))
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None
    with closing(RedisStore(valkey, namespace)) as again:
        until(lambda: again.account("day") == AccountState(CENT, 0, 0))


def test_a_socket_of_this_machine_will_do(tmp_path: Path) -> None:
    server = started_valkey(unix_socket_path=tmp_path / "s")
    try:
        with closing(open_store(f"unix://{tmp_path}/s?db=3", "n")) as store:
            granted(store, ask(CENT))
            assert store.account("day").held == CENT
    finally:
        server.stop()


def test_a_password_that_is_missing_or_wrong_is_told_and_never_shown() -> None:
    server = started_valkey()
    place = f"127.0.0.1:{server.port}/0"
    with closing(redis.Redis(port=server.port)) as client:
        client.config_set("requirepass", "hunter2")
    try:
        for url in (f"redis://{place}", f"redis://:hunter3@{place}"):
            with pytest.raises(StoreUnavailableError, match="password") as told:
                open_store(url, "n")
            assert "hunter" not in str(told.value)
        with closing(open_store(f"redis://:hunter2@{place}", "n")) as store:
            granted(store, ask(CENT))
            assert "hunter" not in f"{store!r} {store.url}"
    finally:
        server.stop()


def test_what_is_no_url_of_a_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_records"):
        open_store("redis://localhost/0?max_records=none", "n")


# -- time --------------------------------------------------------------------------------------------------------------
def test_a_wrong_wall_clock_does_not_matter(valkey: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's time is the server's, before the first commit and after it is set."""
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + 36_000.0)
    with closing(RedisStore(valkey, namespace)) as store:
        assert abs(store.now() - true()) < 1.0
        granted(store, ask(CENT))
        monkeypatch.setattr(time, "time", lambda: true() - 36_000.0)
        assert abs(store.now() - true()) < 1.0


def test_time_does_not_go_back_where_an_answer_corrects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that took long told less well what time it is: the next one mends that without a step back."""
    clock = FakeClock()
    monkeypatch.setattr("dspy_prod.stores.redis.timing.SYSTEM_CLOCK", clock)
    store_time = RedisTime(clock)
    sent = clock.monotonic()
    clock.advance(0.4)
    store_time.heard(b"1000", b"400000", sent)  # it was told at the end of these 0.4 s: 1000.6 is too much
    assert store_time.time() == pytest.approx(1000.6)
    sent = clock.monotonic()
    clock.advance(0.01)
    store_time.heard(b"1000", b"405000", sent)
    assert store_time.time() == pytest.approx(1000.61)
    clock.advance(0.3)
    assert store_time.time() == pytest.approx(1000.71)


# -- forks -------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_of_a_fork_has_a_store_of_its_own(valkey: str, namespace: str) -> None:
    """Connections of its own, and the parent's holds are not its to settle."""
    store = RedisStore(valkey, namespace)
    mine = granted(store, ask(30 * CENT))
    waiting = store.admit(ask(90 * CENT))
    store.cache_put(b"k", CachedAnswer(b"{}", 1e18, 1e18), max_entries=10, max_bytes=1000)
    store.flush(10)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert waiting.state == REFUSED  # nobody would ever decide it here
            assert store.account("day") == AccountState(0, 30 * CENT, 0)
            assert store.cache_get(b"k") is not None
            reservation = granted(store, ask(20 * CENT))
            store.settle(reservation, settlement(reservation, 20 * CENT))
            store.settle(mine, settlement(mine, 30 * CENT))  # the parent's: not ours to settle
            assert store.account("day") == AccountState(20 * CENT, 30 * CENT, 0)
            store.close()
            code = 0
        except BaseException:
            logging.getLogger("dspy_prod").exception("in the child")
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.account("day") == AccountState(20 * CENT, 30 * CENT, 0)
    store.settle(mine, settlement(mine, 0))
    assert store.account("day") == AccountState(20 * CENT, 0, 0)
    assert decided(waiting).state == REFUSED  # 20 + 90 cents are more than a dollar
    check_books(store)
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_asks_for_no_lock_of_its_parents_writer(
    valkey: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung where that was telling a verdict just then, a commit was in doubt and another call had just come."""
    with closing(RedisStore(valkey, namespace)) as store:
        store.flush(10)
        writer = store._writer
        with writer.publishing:
            decided_on = store.admit(ask(CENT))
            until(lambda: bool(writer._core.changes and writer._core.changes.verdicts), 10)
            until(lambda: not writer.io.locked(), 10)  # it is written, and not told
            posted = store.admit(ask(CENT))
            monkeypatch.setattr(writer._transactions, "_then", lambda: None)
            pid = os.fork()
            if pid == 0:
                os._exit(0 if decided_on.state == posted.state == REFUSED else 1)
            monkeypatch.setattr(writer._transactions, "_then", None)
        ended = []
        try:
            until(lambda: bool(ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0]), 10)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        assert ended[-1] == (pid, 0)
        assert decided(decided_on).state == decided(posted).state == GRANTED


# -- others ------------------------------------------------------------------------------------------------------------
def test_money_that_others_spend_meanwhile_is_noticed_by_whoever_decides(valkey: str, namespace: str) -> None:
    """What one knows of an account is old: the server lets nobody pass the limit, and nobody is refused for nothing."""
    one, other = RedisStore(valkey, namespace), RedisStore(valkey, namespace)
    first = granted(one, ask(CENT))
    granted(other, ask(60 * CENT))
    assert one.admit(ask(60 * CENT)).state != GRANTED
    one.flush(10)
    assert one.account("day").held == 61 * CENT
    other.settle(first, settlement(first, 0))  # not its hold: nothing happens
    assert other.account("day").held == 61 * CENT
    spent = granted(one, ask(30 * CENT, accounts=("more",)))
    one.settle(spent, settlement(spent, 30 * CENT, estimated=True))
    assert one.flush(10)
    assert decided(other.admit(ask(80 * CENT, accounts=("more",)))).state == REFUSED
    assert one.correct(spent.id, CENT)
    granted(other, ask(80 * CENT, accounts=("more",)))  # what it knew would have been too little
    one.close()
    other.close()


def test_who_asks_is_told_what_is_now(valkey: str, namespace: str) -> None:
    """What another process did since the last commit of this one was in no snapshot, and in no preview."""
    limit = RateLimit(concurrency=1)
    one, other = RedisStore(valkey, namespace), RedisStore(valkey, namespace)
    held = granted(one, ask(CENT, limit=limit))
    assert other.preview(ask(CENT, limit=limit))[0] > 0
    one.settle(held, settlement(held, CENT))
    assert one.flush(10)
    assert other.preview(ask(CENT, limit=limit)) == (0.0, None)
    for store in (one, other):
        snapshot = store.limiter("provider")
        assert snapshot is not None
        assert snapshot.in_flight == 0
        store.close()
