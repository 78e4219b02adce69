"""The response cache in Redis: its bounds, what is used last, what ends, what is damaged."""

from __future__ import annotations

import random
import time
from math import inf, nan
from typing import Any

import pytest

from dspy_prod.stores.redis.answers import RedisAnswers
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.vocabulary import CachedAnswer
from tests.stores.redis.committing import commit


class Kept(RedisAnswers):
    """Answers that are committed at once, at a time that the test says."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.server = connection
        self.now = time.time()

    def keep(self, key: bytes, answer: CachedAnswer, entries: int = 100, size: int = 10_000) -> None:
        self._do("put", key, answer, entries, size, self.now)

    def _do(self, name: str, *arguments: Any) -> Any:
        batch = Batch()
        result = getattr(self, name)(batch, *arguments)
        if len(batch):
            commit(self.server, batch)
        return result

    def names(self) -> list[bytes]:
        """Every key there is of them."""
        return sorted(self.server.client().scan_iter(f"{self._base}*"))


@pytest.fixture
def kept(connection: Connection) -> Kept:
    return Kept(connection)


def answer(text: str = "hello", expires_at: float = inf) -> CachedAnswer:
    return CachedAnswer(text.encode(), expires_at, expires_at)


def test_an_answer_is_found_as_it_was_kept(kept: Kept) -> None:
    """Under any key, with its times to the last bit."""
    other = CachedAnswer(b"\x00{}", kept.now + 100 / 3, kept.now + 7)
    kept.keep(b"k", answer())
    kept.keep(b"\xff:\x00 ", other)
    assert (kept.get(b"k"), kept.get(b"\xff:\x00 "), kept.get(b"other")) == (answer(), other, None)
    assert kept.find(b"k") == (answer(), kept.now)
    assert kept.size() == (2, 8)


def test_the_bounds_hold_exactly_whatever_is_put_touched_and_cleared(kept: Kept) -> None:
    """As in a plain model of them."""
    chance = random.Random(1)
    model: dict[bytes, int] = {}
    for step in range(300):
        key, size = b"%d" % chance.randrange(20), chance.randrange(1, 30)
        kept.now += chance.choice([0.0, 1.0])
        if step % 60 == 59:
            kept._do("clear")
            model.clear()
        elif chance.random() < 0.7:
            kept.keep(key, answer("x" * size), 8, 100)
            model.pop(key, None)
            model[key] = size
            while len(model) > 8 or sum(model.values()) > 100:
                model.pop(next(iter(model)))
        else:
            kept._do("touch", key, kept.now)
            if key in model:
                model[key] = model.pop(key)
        assert kept.size() == (len(model), sum(model.values()))
    assert {key for key in (b"%d" % number for number in range(20)) if kept.get(key)} == set(model)
    kept._do("purge", kept.now, 100)
    held = [key for key in kept.names() if b":of:" in key]
    assert {key.rpartition(b":")[2] for key in held} == set(model)


def test_what_is_too_large_pushes_nothing_out(kept: Kept) -> None:
    """It only takes the place of the one before."""
    kept.keep(b"small", answer(), size=30)
    kept.keep(b"k", answer(), size=30)
    kept.keep(b"k", answer("x" * 31), size=30)
    assert (kept.get(b"k"), kept.get(b"small")) == (None, answer())
    assert kept.size() == (1, 5)


def test_a_bound_that_is_lowered_is_reached_by_the_next_answer(kept: Kept) -> None:
    for number in range(50):
        kept.keep(b"%d" % number, answer())
    kept.keep(b"new", answer(), entries=3)
    assert kept.size() == (3, 15)
    assert kept.get(b"new") == kept.get(b"49") == answer()


def test_the_server_ends_what_can_be_served_no_more(kept: Kept) -> None:
    """Not before it is stale; and nothing is kept that had ended before."""
    kept.keep(b"stale", CachedAnswer(b"x", kept.now - 5, kept.now + 60))
    kept.keep(b"ever", answer())
    kept.keep(b"k", answer())
    for ends in (kept.now - 1, 0.0, nan, -inf):
        kept.keep(b"k", answer(expires_at=ends))
        assert kept.get(b"k") is None
    assert kept.size() == (2, 6)
    stale, ever = kept.server.read([("PTTL", f"{kept._base}:of:{name}") for name in ("stale", "ever")])
    assert 50_000 < stale <= 60_000
    assert 89 * 86_400_000 < ever <= 90 * 86_400_000
    kept.server.read([("PEXPIRE", f"{kept._base}:of:stale", 1)])
    deadline = time.monotonic() + 5
    while kept.get(b"stale") is not None and time.monotonic() < deadline:
        pass
    assert kept.get(b"stale") is None
    kept.now += 61
    kept._do("purge", kept.now, 10)
    assert kept.size() == (1, 5)
    kept.now += 91 * 86_400
    kept._do("purge", kept.now, 10)
    assert kept.size() == (0, 0)


def test_what_is_used_stays_longer(kept: Kept) -> None:
    """But not beyond its end."""
    kept.keep(b"ever", answer())
    kept.keep(b"ends", answer(expires_at=kept.now + 30))
    names = [f"{kept._base}:of:{name}" for name in ("ever", "ends")]
    kept.server.read([("PEXPIRE", name, 5_000) for name in names])
    for key in (b"ever", b"ends", b"absent"):
        kept._do("touch", key, kept.now + 10)
    ever, ends = kept.server.read([("PTTL", name) for name in names])
    assert ever > 80 * 86_400_000
    assert 5_000 < ends <= 20_000
    assert kept.size() == (2, 10)


@pytest.mark.parametrize("damage", [b"", b"x", b"hello", None])
def test_a_corrupt_value_is_a_miss(kept: Kept, damage: bytes | None) -> None:
    """One bit of it, or all."""
    kept.keep(b"k", answer())
    name = f"{kept._base}:of:k"
    (value,) = kept.server.read([("GET", name)])
    for place in range(len(value)) if damage is None else ():
        changed = bytearray(value)
        changed[place] ^= 1
        kept.server.read([("SET", name, bytes(changed))])
        assert kept.get(b"k") is None
    if damage is not None:
        kept.server.read([("SET", name, damage)])
    assert kept.get(b"k") is None
    kept.keep(b"k", answer("new"))
    assert kept.get(b"k") == answer("new")


def test_what_was_cleared_is_missed_at_once_and_deleted_in_time(kept: Kept) -> None:
    """Also where it was put again meanwhile, and cleared again."""
    for number in range(30):
        kept.keep(b"%d" % number, answer())
    kept._do("clear")
    assert (kept.size(), kept.get(b"3")) == ((0, 0), None)
    kept.keep(b"3", answer("again"))
    kept._do("clear")
    kept.keep(b"29", answer("again"))
    told = [kept._do("purge", kept.now, 5) for _ in range(10)]
    assert told[0] is True
    assert told[-1] is False, "it would be looked again at once"
    assert kept.size() == (1, 5)
    assert kept.get(b"29") == answer("again")
    assert [key for key in kept.names() if b":of:" in key] == [f"{kept._base}:of:29".encode()]
    kept._do("clear")
    kept._do("clear")
    kept._do("purge", kept.now, 5)
    assert kept.names() == []


def test_every_key_ends_some_day_and_namespaces_do_not_mix(kept: Kept, valkey: str) -> None:
    other = Kept(Connection(valkey, "another"))
    other.keep(b"k", answer("other"))
    kept.keep(b"k", answer(expires_at=kept.now + 60))
    for number in range(3):
        kept.keep(b"%d" % number, answer())
    kept._do("clear")
    kept.keep(b"k", answer(expires_at=kept.now + 60))
    keys = kept.names()
    assert len(keys) >= 5
    assert min(kept.server.read([("PTTL", key) for key in keys])) > 0
    assert other.get(b"k") == answer("other")
    other._do("clear")
    assert kept.get(b"k") is not None
    other.server.close()
