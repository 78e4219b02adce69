"""Vectors are kept for each text, exactly; equal texts that are asked about at once are asked once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.utils.exceptions import LMServerError
from hypothesis import given
from hypothesis import strategies as st

import dspy_prod
from dspy_prod import Cache
from dspy_prod.pipeline.batching import batches
from dspy_prod.policies.vectors import shares
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.testing import Provider, Status
from tests.e2e.support import until
from tests.embedding.conftest import MODEL, MakeEmbedder, sent


# -- what is kept ----------------------------------------------------------------------------------------------------
def test_only_new_texts_are_asked_about(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    first = embedder(["a", "b"])
    both = embedder(["b", "new", "a", "new"])
    assert sent(provider) == [["a", "b"], ["new"]]
    assert np.array_equal(both[[2, 0]], first)
    assert np.array_equal(both, make(caching=False)(["b", "new", "a", "new"]))
    assert [(record.outcome, record.saved_nano) for record in embedder.ledger.records()] == [
        ("ok", None), ("cached", 40), ("ok", None),
    ]  # fmt: skip


def test_they_outlive_the_process_to_the_last_bit(provider: Provider, make: MakeEmbedder, tmp_path: Path) -> None:
    """Numbers that no decimal of eight digits says exactly come back as they were, in four bytes each."""
    url = f"sqlite:///{tmp_path}/state.db"
    awkward = np.array([[np.float32(1) / 3, np.nextafter(np.float32(1), np.float32(2)), 1e-42, -0.0]], np.float32)

    def function(texts: list[str]) -> Any:
        return awkward.repeat(len(texts), axis=0)

    function.cache_key = "awkward"  # type: ignore[attr-defined]
    before = make(function, store=url)
    before("a")
    before.pipeline.store.close()
    after = make(function, store=url)
    assert after("a").tobytes() == awkward[0].tobytes()
    [(entries, size)] = [after.pipeline.store.cache_size()]
    assert entries == 1
    assert size < 4 * 4 + 100
    assert [record.outcome for record in after.ledger.records()] == ["cached", "ok"]


def test_a_function_without_a_name_is_kept_in_memory_alone(make: MakeEmbedder, tmp_path: Path) -> None:
    """Another process could not tell whether its function of that name is the same."""
    calls = []

    def function(texts: list[str]) -> Any:
        calls.append(texts)
        return [[1.0] for _ in texts]

    embedder = make(function, store=f"sqlite:///{tmp_path}/state.db")
    embedder("a")
    embedder("a")
    embedder.pipeline.store.flush(5.0)
    assert calls == [["a"]]
    assert embedder.pipeline.store.cache_size()[0] == 0


@pytest.mark.parametrize(
    "other",
    [{"dimensions": 4}, {"api_base": "http://127.0.0.1:9/v1"}, {"input_type": "query"}, {"model": "openai/other"}],
)
def test_what_changes_a_vector_is_in_its_key(make: MakeEmbedder, other: dict[str, Any]) -> None:
    one, two = make(), make(**other)
    assert one.identity != two.identity
    assert make(api_key="another").identity == one.identity  # whoever pays for it, it is the same


def test_a_tenant_s_vector_is_served_to_that_tenant_only(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    for tenant in ("one", "two", "one", None):
        with dspy_prod.call_context(tenant=tenant):
            embedder("a secret")
    assert len(provider.calls) == 3


def test_the_cache_of_a_context(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    for mode, requests in (("use", 1), ("use", 1), ("bypass", 2), ("refresh", 3), ("use", 3)):
        with dspy_prod.call_context(cache=mode):  # type: ignore[arg-type]
            embedder("a")
        assert len(provider.calls) == requests
    embedder.cache_clear()
    embedder("a")
    assert len(provider.calls) == 4


def test_dspy_s_own_cache_is_not_asked(provider: Provider, make: MakeEmbedder) -> None:
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        plain = dspy.Embedder(MODEL, api_key="test", api_base=provider.url)
        plain("only dspy knows this one")
        plain("only dspy knows this one")
        assert len(provider.calls) == 1
        make()("only dspy knows this one")
        assert len(provider.calls) == 2
    finally:
        dspy.cache = before


def test_a_damaged_row_is_a_miss(provider: Provider, make: MakeEmbedder, tmp_path: Path) -> None:
    embedder = make(store=f"sqlite:///{tmp_path}/state.db", caching=Cache(max_entries=100))
    embedder("a")
    cache, store = embedder.pipeline.cache, embedder.pipeline.store
    [key] = cache._entries
    for value in (b"", b"f32\x01", b"no vector at all", b'{"id": 1}' + b" " * 31):
        cache.clear()
        store.cache_put(cache._stored_as(key), CachedAnswer(value, 1e12, 1e12), max_entries=9, max_bytes=10**6)
        store.flush(5.0)
        before = len(provider.calls)
        assert embedder("a").shape == (16,)
        assert len(provider.calls) == before + 1


def test_memory_is_bounded(make: MakeEmbedder) -> None:
    embedder = make(caching=Cache(max_entries=10, persist=False))
    embedder([str(number) for number in range(50)])
    stats = embedder.pipeline.cache.stats()
    assert (stats.entries, stats.misses) == (10, 50)
    assert embedder.health().cache.size == 10


# -- at once ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_equal_texts_are_asked_about_once(provider: Provider, make: MakeEmbedder, crowd: str) -> None:
    """Calls that overlap in some texts share those, and each gets all of its own."""
    embedder = make(caching=Cache(persist=False))
    asked = [[f"t{number}" for number in range(first, first + 6)] for first in range(8)]
    provider.hold()
    if crowd == "threads":
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(embedder, texts) for texts in asked]
            provider.wait_until(lambda it: it.in_flight >= 1)
            provider.wait_until(lambda it: len(embedder.pipeline.flights) == 13)
            provider.release()
            found = [future.result(60) for future in futures]
    else:

        async def together() -> list[Any]:
            tasks = [asyncio.create_task(embedder.acall(texts)) for texts in asked]
            await asyncio.to_thread(provider.wait_until, lambda it: len(embedder.pipeline.flights) == 13)
            provider.release()
            return await asyncio.wait_for(asyncio.gather(*tasks), 30)

        found = asyncio.run(together())
    texts = [text for batch in sent(provider) for text in batch]
    assert sorted(texts) == sorted({text for each in asked for text in each})
    plain = make(caching=False)(["t7"])[0]
    assert all(np.array_equal(rows[texts.index("t7")], plain) for rows, texts in zip(found, asked, strict=True)
               if "t7" in texts)  # fmt: skip
    assert len(embedder.pipeline.flights) == 0


def test_an_upstream_s_error_is_everybody_s(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    provider.faults = [Status(503)]  # type: ignore[assignment]
    provider.latency = 0.3
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(embedder, ["a", str(number)]) for number in range(3)]
        errors = [future.exception(60) for future in futures]
    assert any(isinstance(error, LMServerError) for error in errors)
    assert len(embedder.pipeline.flights) == 0


def test_two_that_are_handed_a_text_each_do_not_wait_for_each_other(provider: Provider, make: MakeEmbedder) -> None:
    """The leader of two texts is cancelled; each passes to another call, which wants the other one too."""
    embedder = make(caching=Cache(persist=False))

    async def scene() -> list[Any]:
        provider.hold()
        leader = asyncio.create_task(embedder.acall(["x", "y"]))
        await asyncio.to_thread(provider.wait_until, lambda it: it.in_flight == 1)
        one = asyncio.create_task(embedder.acall(["x", "y"]))
        two = asyncio.create_task(embedder.acall(["y", "x"]))
        flights = embedder.pipeline.flights
        await asyncio.to_thread(provider.wait_until, lambda it: flights.following() == 4)
        # The second in line for y is first in line for nothing: let it be first.
        for followers in list(flights._flights.values())[1:]:
            followers.rotate(1)
        leader.cancel()
        provider.release()
        return await asyncio.wait_for(asyncio.gather(one, two), 20)

    one, two = asyncio.run(scene())
    assert np.array_equal(one, two[::-1])
    assert len(embedder.pipeline.flights) == 0


def test_a_text_that_is_passed_to_a_call_that_fails_is_passed_on(
    make: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call could not write down that another one had answered it: whoever asked about the rest then hung for ever."""
    gates = {"x": threading.Event(), "y": threading.Event()}
    interrupted: list[str] = []

    def own(texts: list[str]) -> Any:
        [text] = texts
        assert gates[text].wait(60)
        if text == "y" and not interrupted:
            interrupted.append(text)
            raise KeyboardInterrupt
        return [[1.0]]

    embedder = make(own, batch_size=1, caching=Cache(persist=False))
    flights = embedder.pipeline.flights

    def unwritable(*_: Any) -> None:
        raise RuntimeError("not written")

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(embedder, ["x", "y"])
        until(lambda: len(flights) == 2)
        follower = pool.submit(embedder, ["x", "y"])
        until(lambda: sum(map(len, filter(None, flights._flights.values()))) == 2)
        monkeypatch.setattr("dspy_prod.pipeline.embedding.record_served", unwritable)
        for gate in gates.values():
            gate.set()
        assert isinstance(leader.exception(60), KeyboardInterrupt)
        assert str(follower.exception(60)) == "not written"
    assert len(flights) == 0
    monkeypatch.undo()
    assert embedder("y").tolist() == [1.0]


def test_a_refused_leader_s_texts_are_others_to_ask(provider: Provider, make: MakeEmbedder) -> None:
    """Our own refusal is the leader's alone."""
    embedder = make(caching=Cache(persist=False))
    provider.hold()
    started = threading.Event()

    def hurried() -> Any:
        with dspy_prod.call_context(deadline=0.3):
            started.set()
            return embedder("a")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(hurried)
        provider.wait_until(lambda it: it.in_flight == 1)
        second = pool.submit(embedder, "a")
        assert isinstance(first.exception(60), dspy_prod.DeadlineExceededError)
        provider.release()
        assert second.result(60).shape == (16,)


# -- arithmetic ------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 20), st.integers(1, 1500))
def test_batches_hold_every_text_once_and_no_more_than_they_may(sizes: list[int], count: int, tokens: int) -> None:
    found = list(batches(sizes, count, tokens))
    assert [place for places in found for place in places] == list(range(len(sizes)))
    for places in found:
        assert 1 <= len(places) <= count
        assert len(places) == 1 or sum(sizes[place] for place in places) <= tokens
    for one, other in pairwise(found):  # none is cut short for nothing
        assert len(one) == count or sum(sizes[place] for place in (*one, other[0])) > tokens


@given(st.one_of(st.none(), st.integers(0, 10**12)), st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_shares_add_up(total: int | None, weights: list[int]) -> None:
    found = shares(total, weights)
    if total is None:
        assert found == [None] * len(weights)
        return
    assert all(share is not None and share >= 0 for share in found)
    assert sum(share or 0 for share in found) == (total if sum(weights) else 0)
