"""What the response cache keeps, what it gives back, and what it takes from a store that outlives the process."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from math import inf
from typing import Any

import orjson
import pytest
from dspy.lm15 import (
    Adaptation,
    DataPart,
    ImagePart,
    Message,
    RefusalPart,
    Response,
    TextPart,
    TokenLogprob,
    ToolCallPart,
    Usage,
)

from dspy_prod.options import Cache
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.policies.entries import LOCAL, Entry, cacheable
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock

KEY = b"a key"


class Kept(MemoryStore):
    """A store whose answers outlive those who put them; all else is a `MemoryStore`'s."""

    durable = True  # type: ignore[assignment]

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.rows: dict[bytes, CachedAnswer] = {}
        self.bounds: list[tuple[int, int]] = []
        self.read: list[bytes] = []

    def cache_get(self, key: bytes) -> CachedAnswer | None:
        self.read.append(key)
        return self.rows.get(key)

    def cache_put(self, key: bytes, answer: CachedAnswer, *, max_entries: int, max_bytes: int) -> None:
        self.rows[key] = answer
        self.bounds.append((max_entries, max_bytes))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> Kept:
    return Kept(clock)


def kept(store: MemoryStore, **options: Any) -> ResponseCache:
    """A process's cache in front of a store."""
    return ResponseCache(Cache(**{"persist": True, "ttl_jitter": 0.0, **options}), store)


def answer(*parts: Any, **more: Any) -> Response:
    """An answer of these parts, or of one text."""
    given = {"id": "an id", "model": "m", "finish_reason": "stop", "usage": Usage(input_tokens=3, output_tokens=2)}
    return Response(**{**given, "message": Message.assistant(list(parts or (TextPart("the text"),))), **more})


def size(cache: ResponseCache, response: Response) -> int:
    """Bytes that an answer counts for in an empty cache, beside its key and what every entry counts for."""
    cache.clear()
    cache.put(KEY, response, None)
    return cache.stats().bytes - len(KEY) - 512


# -- what is given back ----------------------------------------------------------------------------------------------
def test_an_answer_comes_back_whole_but_for_its_usage(store: Kept) -> None:
    """Serving it used nothing; nor is anything said of the provider's own data, which may hold what it cost."""
    cache = kept(store, persist=False)
    told = answer(
        logprobs=(TokenLogprob("the", -0.5),), provider_data={"cost": 1}, logprobs_complete=False,
        adaptations=(Adaptation("top_k", "dropped", "not known"),),
    )  # fmt: skip
    cache.put(KEY, told, None)
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.response == replace(told, usage=Usage(), provider_data=None)
    assert entry.response is entry.response, "what nobody can change is shared"


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (answer(), "the text"),
        (answer(TextPart("one"), TextPart("two")), None),
        (answer(RefusalPart("no")), None),
        (answer(logprobs=()), None),
    ],
)
def test_an_answer_that_is_text_alone_can_be_had_as_text(response: Response, text: str | None) -> None:
    assert Entry(response, inf, inf, 1).text == text


@pytest.mark.parametrize(
    "response",
    [
        answer(ToolCallPart("id", "look", {"for": ["it"]}), finish_reason="tool_call"),
        answer(DataPart({"for": ["it"]})),
        answer(TextPart("look"), ToolCallPart("id", "look", {"for": ["it"]}), finish_reason="tool_call"),
    ],
    ids=["tool call", "data", "among others"],
)
def test_what_one_caller_changes_in_its_answer_no_other_sees(store: Kept, response: Response) -> None:
    """Neither the one who got it from upstream, nor one who is served it."""
    cache = kept(store, persist=False)
    cache.put(KEY, response, None)

    def held(given: Response) -> list[str]:
        part: Any = given.message.parts[-1]
        found: list[str] = (part.input if part.type == "tool_call" else part.value)["for"]
        return found

    held(response).append("changed by the first")
    entry = cache.get(KEY)
    assert entry is not None
    one, other = entry.response, entry.response
    held(one).append("changed by the second")
    assert held(other) == ["it"]
    assert entry.response.usage == Usage()


# -- what is kept ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("response", "may"),
    [
        (answer(), True),
        (answer(TextPart("one"), TextPart("two")), True),
        (answer(ToolCallPart("id", "look", {}), finish_reason="tool_call"), True),
        (answer(finish_reason="length"), False),
        (answer(finish_reason="content_filter"), False),
        (answer(RefusalPart("no")), False),
        (answer(TextPart("well"), RefusalPart("no")), False),
        (answer(RefusalPart("no"), TextPart("well")), False),
    ],
)
def test_a_complete_answer_may_be_kept(response: Response, may: bool) -> None:
    assert cacheable(response) is may


@pytest.mark.parametrize(
    ("response", "bytes_"),
    [
        (answer(TextPart("12345")), 5),
        (answer(TextPart("12345"), TextPart("678")), 8),
        (answer(ToolCallPart("id", "look", {"a": 1})), len("{'a': 1}")),
        (answer(ToolCallPart("id", "look", {"a": 1}), TextPart("123")), len("{'a': 1}") + 3),
        (answer(ImagePart(data="QUJD")), 4),
        (answer(ImagePart(data="QUJD"), TextPart("12")), 6),
        (answer(DataPart({"a": 1})), 0),
    ],
)
def test_an_answer_counts_for_what_it_holds(store: Kept, response: Response, bytes_: int) -> None:
    assert size(kept(store), response) == bytes_


def test_what_is_larger_than_the_cache_is_not_kept(store: Kept) -> None:
    """At its bound it is; one byte more, and neither memory nor store has it."""
    bound = len(KEY) + 512 + 1000
    cache = kept(store, max_bytes=bound)
    cache.put(KEY, answer(TextPart("x" * 1001)), None)
    assert (cache.stats().entries, store.rows) == (0, {})
    cache.put(KEY, answer(TextPart("x" * 1000)), None)
    assert (cache.stats().entries, cache.stats().bytes, len(store.rows)) == (1, bound, 1)


def test_the_books_tell_what_is_there_and_how_it_is_used(store: Kept) -> None:
    cache = kept(store, persist=False, max_entries=7, max_bytes=9000)
    assert cache.get(KEY) is None
    cache.put(KEY, answer(), None)
    assert cache.get(KEY) is not None
    assert cache.fresh(KEY) is not None
    assert cache.fresh(b"other") is None
    assert cache.load(b"other") is None
    assert cache.stats() == (1, 7, len(KEY) + 512 + 8, 9000, 2, 2)
    cache.used(b"gone meanwhile")
    assert cache.stats().hits == 3
    cache.clear()
    assert cache.stats() == (0, 7, 0, 9000, 3, 2)


# -- what outlives the process ---------------------------------------------------------------------------------------
def test_a_new_process_finds_what_an_earlier_one_kept(store: Kept, clock: FakeClock) -> None:
    """With the lifetime it had, and then in memory."""
    kept(store, ttl=100, stale_if_error=50, max_entries=7, max_bytes=9000).put(KEY, answer(), None)
    assert store.bounds == [(7, 9000)]
    cache = kept(store, ttl=1)
    assert cache.peek(KEY) is None
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.response == replace(answer(), usage=Usage())
    assert (entry.expires_at, entry.stale_until) == (store.now() + 100, store.now() + 150)
    assert cache.peek(KEY) is entry
    assert (cache.stats().hits, cache.stats().misses, cache.stats().bytes) == (1, 0, len(KEY) + 512 + 8)
    clock.advance(100)
    assert cache.get(KEY) is None
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)
    assert cache.stale(KEY) is entry
    clock.advance(50)
    assert cache.stale(KEY) is None


def test_an_answer_that_has_expired_in_the_store_may_be_served_when_all_else_fails(
    store: Kept, clock: FakeClock
) -> None:
    """It is no fresh one, and takes no room in memory."""
    kept(store, ttl=10, stale_if_error=50).put(KEY, answer(), None)
    clock.advance(10)
    cache = kept(store)
    assert cache.load(KEY) is None
    assert (cache.stats().entries, cache.stats().misses) == (0, 1)
    stale = cache.stale(KEY)
    assert stale is not None
    assert stale.text == "the text"
    assert cache.stats().entries == 0
    clock.advance(50)
    assert cache.stale(KEY) is None
    assert cache.stale(b"other") is None


def test_a_key_in_the_store_is_of_this_version() -> None:
    """A release that means something else by a key or a value finds none of these; these are found by this one."""
    store = Kept(FakeClock())
    kept(store).put(KEY, answer(), None)
    assert list(store.rows) == [hashlib.sha256(b"dspy_prod:1:a key").digest()]
    (row,) = store.rows.values()
    assert (row.expires_at, row.stale_until) == (inf, inf)
    assert orjson.loads(row.value)["message"]["parts"][0]["text"] == "the text"


def test_what_means_something_in_this_process_only_stays_in_it(store: Kept) -> None:
    cache = kept(store)
    cache.put(LOCAL + KEY, answer(), None)
    assert cache.get(LOCAL + KEY) is not None
    cache.clear()
    assert cache.get(LOCAL + KEY) is None
    assert cache.stale(LOCAL + KEY) is None
    assert (store.rows, store.read) == ({}, [])


def test_without_persist_the_store_is_left_alone(store: Kept) -> None:
    cache = kept(store, persist=False)
    cache.put(KEY, answer(), None)
    cache.clear()
    assert cache.get(KEY) is None
    assert (store.rows, store.read) == ({}, [])


def test_a_store_that_does_not_outlive_the_process_is_not_written(clock: FakeClock, caplog: Any) -> None:
    store = MemoryStore(clock=clock)
    store.cache_put = store.cache_get = None  # type: ignore[method-assign,assignment]
    cache = kept(store)
    cache.put(KEY, answer(), None)
    cache.clear()
    assert cache.get(KEY) is None


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"message": 5}', b"\xff"])
def test_a_row_that_cannot_be_read_is_a_miss(store: Kept, value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache = kept(store)
    cache.put(KEY, answer(), None)
    (key,) = store.rows
    store.rows[key] = CachedAnswer(value, inf, inf)
    cache.clear()
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        assert cache.get(KEY) is None
        assert cache.stale(KEY) is None
    assert "treated as a miss" in caplog.text
    assert (cache.stats().entries, cache.stats().misses) == (0, 1)


def test_an_answer_that_is_no_json_is_kept_in_memory_alone(store: Kept, caplog: pytest.LogCaptureFixture) -> None:
    cache = kept(store)
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        cache.put(KEY, answer(TextPart("lone \ud800 surrogate")), None)
    assert cache.peek(KEY) is not None
    assert store.rows == {}
    assert "cached in memory only" in caplog.text


def test_a_forked_child_has_a_lock_that_nobody_holds(store: Kept) -> None:
    cache = kept(store)
    cache.put(KEY, answer(), None)
    with cache._lock:
        cache._after_fork()
        assert cache.get(KEY) is not None
