"""List cost: a cached answer carries what it cost when it was asked, so that a warm cache makes no program cheap."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import orjson
import pytest
from dspy.lm15 import Message, Response, TextPart, Usage
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/m"
PRICE = dspy_prod.Price(input=1, output=2)
LISTED = 10 * 1_000 + 5 * 2_000
"""Nano-USD of one answer of the script: 10 tokens in, 5 out."""

Make = Callable[..., tuple[dspy_prod.LM, ScriptedEngine]]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Make LMs on one store, in memory and in a file; all are closed at the end."""
    url = f"memory://list-{tmp_path.name}" if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"
    with contextlib.ExitStack() as stack:

        def make(*answers: Any, **options: Any) -> tuple[dspy_prod.LM, ScriptedEngine]:
            engine = ScriptedEngine(list(answers) or ["an answer"], latency=options.pop("latency", 0.0))
            engine.cache_key = "script"  # type: ignore[attr-defined]  # its answers are those of every process
            fixed = {"store": url, "namespace": "list", "retry": False, "prices": {MODEL: PRICE}, "max_tokens": 10}
            lm = dspy_prod.LM(MODEL, engine=engine, async_engine=engine.asynchronous, **{**fixed, **options})
            stack.callback(lm.pipeline.store.close)
            stack.enter_context(contextlib.closing(lm))
            return lm, engine

        yield make


def answer(tokens: int | None) -> Response:
    """An answer whose provider told so many tokens; None: it told nothing."""
    return Response(
        id=None, model=MODEL, message=Message(role="assistant", parts=(TextPart("yes"),)), finish_reason="stop",
        usage=Usage() if tokens is None else Usage(input_tokens=tokens, output_tokens=tokens),
    )  # fmt: skip


def told(lm: dspy_prod.LM) -> list[tuple[str, int | None, int | None]]:
    """(outcome, cost, list cost) of each record, the oldest first."""
    return [(row.outcome, row.cost_nano, row.list_nano) for row in reversed(lm.ledger.records())]


async def _streamed(lm: dspy_prod.LM, question: str) -> None:
    program = dspy.Predict("question -> answer")
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    with dspy.context(lm=lm):
        async for _ in dspy.streamify(program, stream_listeners=[listener])(question=question):
            pass


FORM = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"
ASK: dict[str, Callable[[dspy_prod.LM, str], Any]] = {
    "sync": lambda lm, question: lm(question),
    "async": lambda lm, question: asyncio.run(lm.acall(question)),
    "stream": lambda lm, question: asyncio.run(_streamed(lm, question)),
}


@pytest.mark.parametrize("how", ASK)
def test_a_hit_costs_nothing_and_is_listed_at_what_its_answer_cost(make: Make, how: str) -> None:
    lm, engine = make(FORM)
    for _ in range(3):
        ASK[how](lm, "q")
    assert engine.calls == 1
    assert told(lm) == [("ok", LISTED, LISTED), *[("cached", 0, LISTED)] * 2]
    [row] = lm.costs(by="model")
    assert (row.usd, row.list_usd, row.unknown_list) == (LISTED / 1e9, 3 * LISTED / 1e9, 0)


@pytest.mark.parametrize("how", ASK)
def test_so_is_one_from_the_file(make: Make, how: str) -> None:
    """What another process asked, or this one before it was started again."""
    lm, engine = make(FORM)
    if not lm.pipeline.store.durable:
        pytest.skip("a memory store keeps no answers for others")
    ASK[how](lm, "q")
    lm.pipeline.store.flush(10)
    for _ in range(2):
        lm.pipeline.cache.clear()
        ASK[how](lm, "q")
    assert engine.calls == 1
    assert told(lm) == [("ok", LISTED, LISTED), *[("cached", 0, LISTED)] * 2]


def test_hits_of_answers_that_cost_unlike_in_turn_keep_their_own_list_cost(make: Make) -> None:
    """They are noted together, whatever each would have cost."""
    lm, _ = make(lambda request: answer(len(request.messages[0].parts[0].text)))
    costs = {}
    for number in (1, 2, 3):
        lm("q" * number)
        costs[number] = lm.ledger.records(limit=1)[0]
    for _ in range(100):
        for number in (1, 2, 3):
            lm("q" * number)
    rows = lm.ledger.records(outcome="cached")
    assert len(rows) == 300
    assert sum(row.list_nano or 0 for row in rows) == 100 * sum(row.cost_nano or 0 for row in costs.values())
    [row] = lm.costs(by="day")
    assert row.list_usd == pytest.approx(101 * sum(row.cost_usd or 0 for row in costs.values()))


def test_followers_of_an_identical_call_are_listed_at_what_it_cost(make: Make) -> None:
    lm, engine = make(latency=0.3)
    threads = [threading.Thread(target=lm, args=("q",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.calls == 1
    assert sorted(told(lm)) == [*[("cached", 0, LISTED)] * 3, ("ok", LISTED, LISTED)]


def test_a_replayed_answer_is_listed_at_what_it_cost(make: Make) -> None:
    lm, engine = make(cache=False)
    if not lm.pipeline.store.durable:
        pytest.skip("a memory store keeps no answers for others")
    for _ in range(2):
        run = dspy_prod.Run("it", store=lm.pipeline.store, keep_answers=True)
        with dspy_prod.call_context(run=run):
            lm("q")
    assert engine.calls == 1
    assert told(lm) == [("ok", LISTED, LISTED), ("replayed", 0, LISTED)]


def test_so_is_one_that_is_served_stale(make: Make) -> None:
    cache = dspy_prod.Cache(ttl=0.01, ttl_jitter=0.0, stale_if_error=600.0)
    down = LMServerError("down", model=MODEL, status=500)
    lm, _ = make("an answer", down, cache=cache)
    lm("q")
    threading.Event().wait(0.02)
    assert lm("q") == ["an answer"]
    assert told(lm) == [("ok", LISTED, LISTED), ("error", 0, 0), ("stale", 0, LISTED)]


def test_an_unknown_price_stays_unknown(make: Make) -> None:
    """Never 0: nobody may think that the answer was free."""
    lm, _ = make(prices={})
    lm("q")
    for _ in range(100):
        lm("q")
    assert told(lm) == [("ok", None, None), *[("cached", 0, None)] * 100]
    [row] = lm.costs(by="model")
    assert (row.list_usd, row.unknown_cost, row.unknown_list) == (0.0, 1, 101)


def test_usage_that_nobody_told_is_listed_at_the_bound_it_counted_for(make: Make) -> None:
    """As its first answer: else a variant whose cache is warm would seem cheaper than the other."""
    lm, _ = make(answer(None))
    lm("q")
    lm("q")
    first, second = reversed(lm.ledger.records())
    assert first.estimated
    assert first.cost_nano
    assert second.list_nano == first.cost_nano


def test_a_file_of_an_earlier_release_is_opened_and_its_cached_answers_are_unlisted(tmp_path: Path) -> None:
    """Its rows stay; what its cached answers would have cost is not known, and counted so."""
    path = tmp_path / "state.db"
    engine = ScriptedEngine("an answer")
    engine.cache_key = "script"  # type: ignore[attr-defined]
    options: dict[str, Any] = {"engine": engine, "store": f"sqlite:///{path}", "prices": {MODEL: PRICE}}
    lm = dspy_prod.LM(MODEL, **options)
    for _ in range(2):
        lm("q")
    lm.close()
    lm.pipeline.store.close()
    del lm
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE records DROP COLUMN saved_nano")
        for name in ("new", "changed", "moved", "gone"):
            connection.execute(f"DROP TRIGGER rollups_{name}")
        connection.execute("DROP TABLE rollups_ever")
        connection.execute("DROP TABLE rollups_before")
        for name in ("saved_nano", "saved"):
            connection.execute(f"ALTER TABLE rollups DROP COLUMN {name}")
        for id, body in connection.execute("SELECT seq, body FROM hits").fetchall():
            page = orjson.loads(body)
            page["same"].pop("saved_nano")
            connection.execute("UPDATE hits SET body = ? WHERE seq = ?", (orjson.dumps(page), id))
        [(value,)] = connection.execute("SELECT value FROM cache").fetchall()
        kept = orjson.loads(value)
        assert kept.pop("dspy_prod_list_nano") == LISTED
        text = orjson.dumps(kept)
        connection.execute("UPDATE cache SET value = ?, size = ?", (text, len(text)))
    lm = dspy_prod.LM(MODEL, **options)
    lm("q")
    assert told(lm) == [("ok", LISTED, LISTED), *[("cached", 0, None)] * 2]
    [row] = lm.costs(by="model")
    assert (row.usd, row.list_usd, row.cached, row.unknown_list) == (LISTED / 1e9, LISTED / 1e9, 2, 2)
    lm("another")
    lm("another")
    [row] = lm.costs(by="model")
    assert (row.list_usd, row.unknown_list) == (pytest.approx(3 * LISTED / 1e9), 2)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:  # an earlier release goes on
        assert dict(connection.execute("SELECT key, value FROM meta"))["schema"] == 1
        connection.execute(
            "INSERT INTO rollups (ns, day, dimension, value, cost_nano, unconfirmed_nano, unknown_cost, attempts, "
            "cached, failed, input_tokens, output_tokens) VALUES (1, '2020-01-01', 'all', '', 7, 0, 0, 1, 1, 0, 0, 0)"
        )
    [old, *_] = lm.costs(by="day")
    assert (old.value, old.usd, old.list_usd, old.unknown_list) == ("2020-01-01", 7e-9, 7e-9, 1)
    lm.close()
    lm.pipeline.store.close()
