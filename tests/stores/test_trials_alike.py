"""The stores say the same of any course of events."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.trials import Call, Exposure, Outcome, Underway
from tests.examples import examples
from tests.stores.support import FakeClock

Stores = tuple[Any, ...]

WINDOWS: dict[str | None, float] = {None: 0.0, "now": 0.0, "later": 20.0}
METRICS = (None, "now", "later")

unit = st.sampled_from(["u1", "u2", "u3", "u4"])
ago = st.sampled_from([0.0, 5.0, 25.0])
step = st.one_of(
    st.tuples(
        st.just("expose"), unit, st.integers(0, 2), st.sampled_from("abc"), st.sampled_from([0.5, 1.0]),
        st.integers(0, 1),
    ),
    st.tuples(
        st.just("call"), unit, ago, st.booleans(), st.sampled_from([None, 0.5, 2.0]), st.sampled_from([None, 3]),
        st.sampled_from([None, "a", "b"]), st.booleans(),
    ),
    st.tuples(
        st.just("outcome"), unit, ago, st.sampled_from(["now", "later", "none"]), st.sampled_from([1.0, 2.5]),
        st.sampled_from([None, "x", "y"]),
    ),
    st.tuples(st.just("underway"), unit, ago, st.sampled_from([0.0, 6.0, 40.0])),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 10.0, 30.0])),
    st.tuples(st.just("read"), st.sampled_from(METRICS), st.integers(1, 5)),
    st.tuples(st.just("flush")),
)  # fmt: skip
names = map("e{}".format, itertools.count())


@pytest.fixture(scope="module")
def all_stores(tmp_path_factory: pytest.TempPathFactory, valkey: str) -> Iterator[tuple[FakeClock, Stores]]:
    clock = FakeClock()
    path = Path(tmp_path_factory.mktemp("alike")) / "state.db"
    redis = RedisStore(valkey, uuid.uuid4().hex, clock=clock)
    stores = MemoryStore(clock=clock), SqliteStore(str(path), clock=clock), redis
    yield clock, stores
    for store in stores:
        store.close()


@given(st.lists(step, max_size=40))
@examples(60, deadline=None)
def test_the_stores_say_the_same(all_stores: tuple[FakeClock, Stores], steps: list[Any]) -> None:
    clock, stores = all_stores
    name = next(names)
    for store in stores:
        store.trials.create(name, "{}", WINDOWS, 10.0)
    told: dict[str | None, list[Any]] = {metric: [] for metric in METRICS}
    for kind, *rest in steps:
        if kind == "wait":
            for store in stores:
                store.flush(10)  # what is posted is written at the moment when it is posted
            clock.advance(rest[0])
            continue
        found = _alike([_do(store, name, kind, rest) for store in stores])
        if kind == "read":
            known = told[rest[0]]
            assert found[: len(known)] == known[: len(found)], "what was told is final"
            told[rest[0]] = max(known, found, key=len)
    for store in stores:
        store.flush(10)  # likewise
    clock.advance(1_000.0)
    for look in ("counts", "ended", "tally", "exposed", "waiting"):
        _alike([getattr(store.trials, look)(name) for store in stores])
    _alike([_progress(store, name) for store in stores])
    for metric in METRICS:
        one = _alike([store.trials.matured(name, metric) for store in stores])
        assert one[: len(told[metric])] == told[metric]
        assert len(one) == stores[0].trials.tally(name).units
    for each in ("u1", "u2"):
        _alike([store.trials.seen(name, each) for store in stores])
    for store in stores:
        store.trials.remove(name)


def _alike(found: list[Any]) -> Any:
    """What all of them say."""
    assert found == found[:1] * len(found)
    return found[0]


def _progress(store: Store, name: str) -> Any:
    """What who looks sees first, which is what there is."""
    lease, found = store.trials.look(name, "me", 60.0)
    assert found is not None
    assert (found.trial, found.tally) == (store.trials.trial(name), store.trials.tally(name))
    return lease, found.tally, found.saved


def _do(store: Store, name: str, kind: str, rest: list[Any]) -> Any:
    trials = store.trials
    now = trials.now()
    if kind == "expose":
        who, stage, arm, propensity, full = rest
        return trials.expose(Exposure(name, who, stage, arm, propensity, now, full))
    if kind == "call":
        who, before, failed, latency, nano, arm, left = rest
        more = {"failed": failed, "fell_back": latency is None, "arm": arm, "abandoned": left}
        return trials.call(Call(name, who, now - before, latency=latency, list_nano=nano, **more))
    if kind == "underway":
        who, before, seconds = rest
        return trials.underway(Underway(name, who, now - before, seconds))
    if kind == "outcome":
        who, before, metric, value, id = rest
        return trials.outcome(Outcome(name, who, metric, value, now - before, id))
    if kind == "read":
        return trials.matured(name, rest[0], 0, rest[1])
    return store.flush(10)
