"""The response cache against a simple model: freshness, LRU order, bounds, stale answers and clearing."""

from __future__ import annotations

from math import inf

import pytest
from dspy.lm15 import Message, Response, TextPart, Usage
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dspy_prod.options import Cache
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock
from tests.examples import examples

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])


def answer(text: str) -> Response:
    """An answer with usage, as an upstream gives it."""
    return Response(
        id=None,
        model="m",
        message=Message.assistant([TextPart(text)]),
        finish_reason="stop",
        usage=Usage(input_tokens=3, output_tokens=2),
    )


def cost(key: bytes, text: str) -> int:
    """Bytes an entry counts for: its key, its text, and 512 for the objects around them."""
    return len(key) + len(text) + 512


class CacheMachine(RuleBasedStateMachine):
    """The model is a list of (key, text, expires_at, stale_until), the least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.rows: list[tuple[bytes, str, float, float]] = []
        self.hits = 0
        self.misses = 0

    @initialize(
        ttl=st.sampled_from([None, 1.0, 10.0]),
        entries=st.integers(1, 5),
        most=st.sampled_from([600, 1200, 2000, 10**6]),
        stale=st.sampled_from([0.0, 5.0]),
        luck=st.sampled_from([0.0, 0.5, 0.99]),
    )
    def build(self, ttl: float | None, entries: int, most: int, stale: float, luck: float) -> None:
        self.options = Cache(ttl=ttl, ttl_jitter=0.1, max_entries=entries, max_bytes=most, stale_if_error=stale)
        self.luck = luck
        self.cache = ResponseCache(self.options, MemoryStore(clock=self.clock), rand=lambda: luck)

    @rule(key=KEYS, size=st.integers(1, 700), ttl=st.sampled_from([None, 0.5, 20.0]))
    def put(self, key: bytes, size: int, ttl: float | None) -> None:
        """Keep an answer; what does not fit goes, oldest first, and what can never fit is not kept."""
        text = "x" * size
        self.cache.put(key, answer(text), ttl)
        if cost(key, text) > self.options.max_bytes:
            return
        lifetime = self.options.ttl if ttl is None else ttl
        expires = stale = inf
        if lifetime is not None:
            expires = self.clock.monotonic() + lifetime * (1 - 0.1 * self.luck)
            stale = expires + self.options.stale_if_error
        self.rows = [row for row in self.rows if row[0] != key] + [(key, text, expires, stale)]
        while len(self.rows) > self.options.max_entries or self.bytes() > self.options.max_bytes:
            self.rows.pop(0)

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        """A fresh answer is given with empty usage and becomes the most recently used; anything else is a miss."""
        entry = self.cache.get(key)
        row = self.row(key)
        if row is None or row[2] <= self.clock.monotonic():
            assert entry is None
            self.misses += 1
            return
        assert entry is not None
        assert entry.text == row[1]
        assert entry.response.usage == Usage()
        assert entry.response.message == answer(row[1]).message
        self.hits += 1
        self.rows.remove(row)
        self.rows.append(row)

    @rule(key=KEYS)
    def peek(self, key: bytes) -> None:
        """Looking without using changes neither the order nor the counts."""
        entry, row = self.cache.peek(key), self.row(key)
        assert (entry is not None) == (row is not None and row[2] > self.clock.monotonic())

    @rule(key=KEYS)
    def ask_for_stale(self, key: bytes) -> None:
        """An expired answer is there for `stale_if_error` seconds more."""
        entry, row = self.cache.stale(key), self.row(key)
        assert (entry is not None) == (row is not None and row[3] > self.clock.monotonic())

    @rule(seconds=st.sampled_from([0.1, 0.9, 1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: len(self.rows) > 2)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.rows = []

    @invariant()
    def the_books_agree(self) -> None:
        """Entries, bytes, hits and misses are what the model counts, within the bounds."""
        if not hasattr(self, "cache"):
            return
        stats = self.cache.stats()
        assert (stats.entries, stats.bytes) == (len(self.rows), self.bytes())
        assert (stats.hits, stats.misses) == (self.hits, self.misses)
        assert stats.entries <= stats.max_entries
        assert stats.bytes <= stats.max_bytes

    def row(self, key: bytes) -> tuple[bytes, str, float, float] | None:
        return next((row for row in self.rows if row[0] == key), None)

    def bytes(self) -> int:
        return sum(cost(key, text) for key, text, _, _ in self.rows)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = examples(80, stateful_step_count=40)


def test_a_jittered_lifetime_is_shorter_never_longer() -> None:
    """TTL jitter spreads expiry below the TTL, so nothing outlives what was asked for."""
    clock = FakeClock()
    for luck in (0.0, 0.5, 1.0):
        cache = ResponseCache(Cache(ttl=100, ttl_jitter=0.2), MemoryStore(clock=clock), rand=lambda luck=luck: luck)
        cache.put(b"k", answer("t"), None)
        entry = cache.peek(b"k")
        assert entry is not None
        assert entry.expires_at - clock.monotonic() == pytest.approx(100 * (1 - 0.2 * luck))
