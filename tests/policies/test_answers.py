"""A run that keeps its answers is asked for nothing twice: the provider's bill says whether it is so."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Budget, Cache, ConfigError, Run, call_context
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import FaultPlan, Provider, ScriptedEngine, Status
from tests.e2e.support import fresh_memory, make_lm

CHEAP = "openai/e2e-cheap"


def numbered() -> Callable[[Any], str]:
    """Answers that are all different: `answer 0`, `answer 1`, ..."""
    count, lock = iter(range(10**6)), threading.Lock()

    def answer(call: Any) -> str:
        with lock:
            return f"answer {next(count)}"

    return answer


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(prices={"e2e": (0.15, 0.60), "e2e-cheap": (0.05, 0.11)}, answer=numbered()) as provider:
        yield provider
        assert provider.errors == []


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


def begun(url: str, **options: Any) -> Run:
    """The run, as another process would begin or resume it."""
    return Run("it", store=url, namespace="e2e", keep_answers=True, **options)


def rows(url: str) -> list[tuple[int, str]]:
    """(ordinal, served model) of every answer in the file."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
        return file.execute("SELECT ordinal, served_model FROM run_answers ORDER BY seq").fetchall()


def asked(lm: Any, texts: list[str], run: Run, **options: Any) -> list[Any]:
    with call_context(run=run):
        return [lm(text, **options)[0] for text in texts]


TEXTS = [f"question {number}" for number in range(5)]


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_that_is_done_again_is_not_paid_again(
    provider: Provider, connect: Callable[..., Any], url: str, cache: bool
) -> None:
    first = asked(connect(cache=cache), TEXTS, begun(url))
    assert len(set(first)) == 5
    bill = provider.bill.nano
    run, lm = begun(url), connect(cache=cache)
    assert asked(lm, TEXTS, run) == first
    assert provider.bill.nano == bill
    assert (run.asked, run.replayed, run.first_new, run.strangers) == (5, 5, None, 0)
    assert asked(lm, ["a new one"], run) == ["answer 5"]
    assert (run.asked, run.replayed, run.first_new, run.strangers) == (6, 5, 6, 0)
    assert len(provider.calls) == 6


def test_identical_questions_each_get_an_answer_of_their_own(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    """Without a cache they are different draws: each answer is given again once, and no more are than there were."""
    first = asked(connect(cache=False), ["the same"] * 4, begun(url))
    assert first == [f"answer {number}" for number in range(4)]
    assert [ordinal for ordinal, _ in rows(url)] == [0, 1, 2, 3]
    run = begun(url)
    assert asked(connect(cache=False), ["the same"] * 5, run) == [*first, "answer 4"]
    assert (run.replayed, run.first_new, len(provider.calls)) == (4, 5, 5)


def test_ordinals_are_given_out_once_to_many_threads(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    lm, run = connect(cache=False), begun(url)

    def one(_: int) -> Any:
        with call_context(run=run):
            return lm("the same")[0]

    with ThreadPoolExecutor(16) as pool:
        first = sorted(pool.map(one, range(48)))
    assert sorted(ordinal for ordinal, _ in rows(url)) == list(range(48))
    run = begun(url)
    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(one, range(48))) == first
    assert (run.asked, run.replayed, len(provider.calls)) == (48, 48, 48)


def test_sixty_four_identical_calls_are_one_call_and_one_answer(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    lm, run = connect(cache=True), begun(url)
    provider.hold()

    def one(_: int) -> Any:
        with call_context(run=run):
            return lm("the same")[0]

    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(one, range(64))
        provider.wait_until(lambda p: p.in_flight == 1)
        provider.release()
        assert set(answers) == {"answer 0"}
    assert len(provider.calls) == 1
    assert rows(url) == [(0, "e2e")]
    run, lm = begun(url), connect(cache=True)
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(one, range(64))) == {"answer 0"}
    assert (run.asked, run.replayed, run.strangers, len(provider.calls)) == (64, 64, 0, 1)


@pytest.mark.filterwarnings("ignore:max_tokens=100 lets one call")
def test_a_replayed_answer_costs_nothing_and_counts_for_no_cap(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    run = begun(url, usd=1.0, calls=5, tokens=10_000)
    asked(connect(), TEXTS, run)
    used = run.used()
    assert (used.calls, used.usd) == (5, provider.bill.usd)
    lm, run = connect(budget=Budget(usd=1e-9)), begun(url, usd=1.0, calls=5, tokens=10_000)
    asked(lm, TEXTS, run)
    assert run.used() == used
    records = lm.ledger.records()
    assert {(record.outcome, record.cost_nano, record.input_tokens) for record in records} == {("replayed", 0, None)}
    assert {record.run for record in records} == {"it"}
    assert {entry["cost_details"]["kind"] for entry in lm.history} == {"replayed"}
    assert {(entry["cost"], entry["cached"]) for entry in lm.history} == {(0.0, True)}
    assert not lm.history[0]["usage"] or not any(lm.history[0]["usage"].values())
    assert sum(row.attempts for row in lm.costs(by="run")) == 0
    with call_context(run=run), pytest.raises(dspy_prod.BudgetExceededError):
        lm("a new one")


def test_a_stopped_run_still_gives_what_it_has(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    first = asked(connect(), TEXTS, begun(url))
    run, lm = begun(url), connect()
    run.stop()
    assert asked(lm, TEXTS, run) == first
    with call_context(run=run), pytest.raises(dspy_prod.RunStoppedError):
        lm("a new one")


def test_an_answer_that_comes_while_the_run_is_stopped_is_kept(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    """It is paid for."""
    lm, run = connect(), begun(url)
    provider.hold()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asked, lm, ["question"], run)
        provider.wait_until(lambda p: p.in_flight == 1)
        run.stop()
        provider.release()
        assert future.result(20) == ["answer 0"]
    assert rows(url) == [(0, "e2e")]


@pytest.mark.parametrize("cache", [True, False])
def test_an_answer_that_was_cut_off_is_kept(url: str, cache: bool) -> None:
    """No cache keeps it, so that it was paid for again with each resume."""
    with Provider(answer="a long answer that does not fit into so few tokens", usage=(20, 500)) as provider:
        first = asked(make_lm(provider.url, cache=cache, max_tokens=3), ["question"] * 2, begun(url))
        run = begun(url)
        assert asked(make_lm(provider.url, cache=cache, max_tokens=3), ["question"] * 2, run) == first
        assert (run.replayed, len(provider.calls), [ordinal for ordinal, _ in rows(url)]) == (2, 2, [0, 1])


def test_an_answer_that_is_shared_and_in_no_cache_is_given_again_to_all(url: str) -> None:
    """Whoever followed got the cut answer of another call, and had to pay for one of its own when resumed."""
    with Provider(answer="a long answer that does not fit into so few tokens", usage=(20, 500)) as provider:
        lm, run = make_lm(provider.url, cache=True, max_tokens=3), begun(url)
        provider.hold()

        def one(_: int) -> Any:
            with call_context(run=run):
                return lm("the same")[0]

        with ThreadPoolExecutor(8) as pool:
            first = pool.map(one, range(8))
            flights = lm.pipeline.flights
            provider.wait_until(lambda p: p.in_flight == 1 and flights.following() == 7)
            provider.release()
            assert len(set(first)) == 1
        assert [ordinal for ordinal, _ in rows(url)] == list(range(8))
        run = begun(url)
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(one, range(8)))) == 1
        assert (run.replayed, len(provider.calls)) == (8, 1)


def test_an_error_is_not_kept(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    provider.faults = FaultPlan.script([None, Status(400), None])
    lm, run = connect(), begun(url)
    with call_context(run=run):
        assert lm("first") == ["answer 0"]
        with pytest.raises(Exception, match="Invalid request"):
            lm("second")
        assert lm("third") == ["answer 1"]
    run = begun(url)
    assert asked(connect(), ["first", "second", "third"], run) == ["answer 0", "answer 2", "answer 1"]
    assert (run.asked, run.replayed, run.first_new, run.strangers) == (3, 2, 2, 1)
    assert run.diverged is None


@pytest.mark.parametrize("cache", [True, False])
def test_the_answer_of_a_fallback_is_kept(
    provider: Provider, connect: Callable[..., Any], url: str, cache: bool
) -> None:
    """The cache has none of it under the primary model's name."""
    provider.faults = lambda view: Status(503) if view.model == "e2e" else None
    first = asked(connect(fallbacks=[CHEAP], cache=cache), TEXTS, begun(url))
    assert {model for _, model in rows(url)} == {"e2e-cheap"}
    bill, sent = provider.bill.nano, len(provider.calls)
    run = begun(url)
    assert asked(connect(fallbacks=[CHEAP], cache=cache), TEXTS, run) == first
    assert (run.replayed, provider.bill.nano, len(provider.calls)) == (5, bill, sent)


def test_an_answer_from_the_cache_is_kept_too(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    """What was cached before the run began may be forgotten until it is resumed."""
    lm = connect(cache=Cache(max_entries=2))
    first = lm("question")
    assert asked(lm, ["question"] * 3, begun(url)) == first * 3
    assert len(rows(url)) == 1
    lm.cache_clear()
    run = begun(url)
    assert asked(lm, ["question"] * 3, run) == first * 3
    assert (run.replayed, len(provider.calls)) == (3, 1)


def test_cache_clear_leaves_the_answers(provider: Provider, url: str) -> None:
    lm = make_lm(provider.url, cache=True, store=url)
    first = asked(lm, TEXTS, begun(url))
    lm.cache_clear()
    assert asked(lm, TEXTS, begun(url)) == first
    assert len(provider.calls) == 5
    lm.close()


@pytest.mark.parametrize("mode", ["bypass", "refresh"])
def test_answers_are_kept_where_the_cache_is_not_to_be_read(
    provider: Provider, connect: Callable[..., Any], url: str, mode: Any
) -> None:
    with call_context(cache=mode):
        first = asked(connect(cache=True), ["the same"] * 3, begun(url))
        assert len(set(first)) == 3
        run = begun(url)
        assert asked(connect(cache=True), ["the same"] * 3, run) == first
    assert (run.replayed, len(provider.calls)) == (3, 3)


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.5}, {"max_tokens": 99}, {"rollout_id": 7, "temperature": 1.0}, {"stop": ["."]}],
    ids=["temperature", "max_tokens", "rollout_id", "stop"],
)
@pytest.mark.parametrize("cache", [True, False])
def test_another_request_is_another_answer(
    provider: Provider, connect: Callable[..., Any], url: str, other: dict[str, Any], cache: bool
) -> None:
    asked(connect(cache=cache), ["question"], begun(url))
    run = begun(url)
    assert asked(connect(cache=cache), ["question"], run, **other) == ["answer 1"]
    assert (run.replayed, run.first_new) == (0, 1)
    assert asked(connect(cache=cache), ["question"], begun(url), **other) == ["answer 1"]


def test_other_models_tenants_and_runs_have_answers_of_their_own(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    asked(connect(), ["question"], begun(url))
    assert asked(connect(model=CHEAP), ["question"], begun(url)) == ["answer 1"]
    with call_context(tenant="acme"):
        assert asked(connect(), ["question"], begun(url)) == ["answer 2"]
        assert asked(connect(), ["question"], begun(url)) == ["answer 2"]
    other = Run("another", store=url, namespace="e2e", keep_answers=True)
    assert asked(connect(), ["question"], other) == ["answer 3"]
    elsewhere = Run("it", store=url, namespace="elsewhere", keep_answers=True)
    assert asked(connect(), ["question"], elsewhere) == ["answer 4"]


def test_each_of_n_answers_is_kept(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    with call_context(run=begun(url)):
        first = connect()("question", n=3, temperature=1.0)
    assert len(set(first)) == 3
    run = begun(url)
    with call_context(run=run):
        assert connect()("question", n=3, temperature=1.0) == first
    assert (run.asked, run.replayed, len(provider.calls)) == (3, 3, 3)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_async_calls_and_the_other_engine_are_kept_alike(
    provider: Provider, url: str, engine: str, cache: bool
) -> None:
    """What one way was answered is given the other way."""
    lm = make_lm(provider.url, cache=cache, engine=engine)

    async def all_of_them(run: Run) -> list[str]:
        with call_context(run=run):
            return [outputs[0] for outputs in await asyncio.gather(*[lm.acall(text) for text in TEXTS])]

    first = asyncio.run(all_of_them(begun(url)))
    assert sorted(first) == [f"answer {number}" for number in range(5)]
    assert asked(lm, TEXTS, begun(url)) == first
    run = begun(url)
    lm = make_lm(provider.url, cache=cache, engine=engine)
    assert asyncio.run(all_of_them(run)) == first
    assert (run.replayed, len(provider.calls)) == (5, 5)
    lm.close()


@pytest.mark.parametrize("cache", [True, False])
def test_streams_are_kept_and_given_again_as_streams(url: str, cache: bool) -> None:
    """In pieces, as from the provider; and plain calls of the same program get the same answer."""
    with Provider(chunks=8) as provider:

        async def streamed(run: Run) -> tuple[list[str], str]:
            lm = make_lm(provider.url, cache=cache, max_tokens=1_000)
            listener = dspy.streaming.StreamListener(signature_field_name="answer")
            program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
            pieces, answer = [], ""
            with dspy.context(lm=lm), call_context(run=run):
                async for value in program(question="which?"):
                    if isinstance(value, dspy.Prediction):
                        answer = value.answer
                    elif isinstance(value, dspy.streaming.StreamResponse):
                        pieces.append(value.chunk)
            await lm.aclose()
            return pieces, answer

        pieces, answer = asyncio.run(streamed(begun(url)))
        assert answer
        assert "".join(pieces).strip() == answer
        run = begun(url)
        again, same = asyncio.run(streamed(run))
        assert same == answer
        assert "".join(again).strip() == answer
        assert (run.asked, run.replayed, len(provider.calls)) == (1, 1, 1)


def test_the_innermost_run_that_keeps_answers_is_asked(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    outer, inner = begun(url), Run("inner", store=url, namespace="e2e", keep_answers=True)
    plain = Run("plain", store=url, namespace="e2e", calls=10)
    lm = connect()
    with call_context(run=outer):
        asked(lm, ["question"], inner)
        asked(lm, ["question"], plain)
    assert (outer.asked, inner.asked, plain.asked) == (1, 1, 0)
    assert (outer.replayed, inner.replayed) == (0, 0)
    with call_context(run=begun(url)), call_context(run=Run("it", store=url, namespace="e2e", calls=9)):
        assert lm("question") == ["answer 1"], "another object of the same run goes on with its answers"
    assert len(provider.calls) == 2


def test_two_processes_of_a_run_keep_the_answers_of_both(
    provider: Provider, connect: Callable[..., Any], url: str
) -> None:
    """Each has an own connection to the file; neither overwrites what the other was given."""
    place = url.removeprefix("sqlite:///")
    stores = [SqliteStore(place, "e2e") for _ in range(2)]
    runs = [Run("it", store=store, keep_answers=True) for store in stores]
    lm = connect(cache=False)
    with ThreadPoolExecutor(2) as pool:
        first = [each for answers in pool.map(lambda run: asked(lm, ["the same"] * 20, run), runs) for each in answers]
    assert sorted(ordinal for ordinal, _ in rows(url)) == list(range(40))
    run = begun(url)
    assert sorted(asked(lm, ["the same"] * 40, run)) == sorted(first)
    assert (run.replayed, len(provider.calls)) == (40, 40)
    for store in stores:
        store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_keeps_its_answers(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    lm, run = connect(), begun(url)
    asked(lm, ["before"], run)
    pid = os.fork()
    if not pid:
        answered = asked(lm, ["before", "in the child"], run)
        os._exit(len(set(answered)) if run.unkept == 0 else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    asked(lm, ["after"], run)
    assert [ordinal for ordinal, _ in rows(url)] == [0, 1, 0, 0]
    run = begun(url)
    asked(lm, ["before", "in the child", "after"], run)
    assert (run.replayed, len(provider.calls)) == (3, 4)


def test_a_cancelled_task_loses_no_answer_that_has_come(
    provider: Provider, connect: Callable[..., Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paid for: the store writes it although nobody waits any more."""
    lm, run = connect(), begun(url)
    keep, kept = run.store.runs.keep, []

    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None

        def keeps(*arguments: Any) -> Any:
            kept.append(keep(*arguments))
            task.cancel()
            return kept[0]

        monkeypatch.setattr(run.store.runs, "keep", keeps)
        with call_context(run=run):
            await lm.acall("question")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert kept[0].result(10) == 0
    again = begun(url)
    assert asked(lm, ["question"], again) == ["answer 0"]
    assert (again.replayed, len(provider.calls)) == (1, 1)


def test_memory_keeps_no_answers_and_says_what_does() -> None:
    with pytest.raises(ConfigError, match=r"keep_answers: memory://.*store='sqlite:///"):
        Run("it", store=fresh_memory(), keep_answers=True)


def test_a_program_that_asks_otherwise_is_noticed(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    """With the first prompt that nobody had asked; until then nothing is said."""
    lm = connect()
    asked(lm, [f"question {number}" for number in range(40)], begun(url))
    run = begun(url)
    asked(lm, [f"question {number}" for number in range(20)], run)
    asked(lm, [f"at 12:{number}, what?" for number in range(16)], run)
    assert (run.replayed, run.first_new, run.strangers, run.diverged) == (20, 21, 16, None)
    asked(lm, ["at 12:59, what?"], run)
    assert run.diverged is not None
    for words in ("17 calls", "'it'", "40", "at 12:0, what?"):
        assert words in run.diverged
    asked(lm, [f"later {number}" for number in range(50)], run)
    assert run.strangers == 40, "no more are counted than there were answers"


def test_a_run_that_goes_on_has_no_strangers(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    lm = connect()
    asked(lm, TEXTS, begun(url))
    run = begun(url)
    asked(lm, [*TEXTS, *[f"more {number}" for number in range(40)]], run)
    assert (run.replayed, run.first_new, run.strangers, run.diverged) == (5, 6, 0, None)


def test_an_engine_that_only_this_process_knows_is_not_kept(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Another process would take another engine's answers for its own."""
    lm = dspy_prod.LM("any/model", engine=ScriptedEngine(["a", "b"]), store=fresh_memory(), cache=False)
    run = begun(url)
    assert asked(lm, ["question"] * 2, run) == ["a", "b"]
    assert (run.unkept, run.asked, rows(url)) == (2, 0, [])
    assert "give it a cache_key" in caplog.text
    engine = ScriptedEngine(["a", "b"])
    engine.cache_key = "mine"  # type: ignore[attr-defined]
    lm = dspy_prod.LM("any/model", engine=engine, store=fresh_memory(), cache=False)
    assert asked(lm, ["question"], begun(url)) == ["a"]
    assert asked(lm, ["question"], begun(url)) == ["a"]


def test_an_answer_that_cannot_be_written_is_still_given(
    provider: Provider, connect: Callable[..., Any], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is paid for."""
    lm, run = connect(), begun(url)
    run.store.close()
    assert asked(lm, ["question"], run) == ["answer 0"]
    assert run.unkept == 1
    assert "have to be paid again" in caplog.text


def test_a_damaged_answer_is_asked_again(
    provider: Provider, connect: Callable[..., Any], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked(connect(), TEXTS, begun(url))
    with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
        file.execute("UPDATE run_answers SET response = ? WHERE seq = 2", (b"{",))
    run = begun(url)
    assert asked(connect(), TEXTS, run) == ["answer 0", "answer 5", "answer 2", "answer 3", "answer 4"]
    assert (run.replayed, run.first_new) == (4, 2)
    assert "damaged" in caplog.text


def test_the_file_is_its_owners_alone(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    asked(connect(), TEXTS, begun(url))
    place = Path(url.removeprefix("sqlite:///"))
    assert {file.stat().st_mode & 0o077 for file in place.parent.glob("runs.db*")} == {0}


def test_a_file_of_before_is_given_the_tables(provider: Provider, connect: Callable[..., Any], url: str) -> None:
    open_store(url, "e2e").close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
        file.execute("DROP TABLE run_answers")
        file.execute("DROP TABLE run_notes")
    first = asked(connect(), TEXTS, begun(url))
    assert asked(connect(), TEXTS, begun(url)) == first


KILLED = """
import os, sys, threading
import dspy
from dspy_prod import Run, call_context
from tests.e2e.support import make_lm

url, store, cache, most = sys.argv[1], sys.argv[2], sys.argv[3] == "cached", int(sys.argv[4])
lm = make_lm(url, cache=cache)
run = Run("it", store=store, namespace="e2e", keep_answers=True)
answered = 0

def metric(example, prediction, trace=None):
    global answered
    answered += 1
    if answered == most:
        os.kill(os.getpid(), 9)
    return float(prediction.answer == example.answer)

devset = [dspy.Example(question=f"question {n % 90}", answer="?").with_inputs("question") for n in range(120)]
with dspy.context(lm=lm), call_context(run=run):
    evaluate = dspy.Evaluate(devset=devset, metric=metric, num_threads=6, display_progress=False)
    evaluate(dspy.Predict("question -> answer"))
print(run.asked, run.replayed, run.strangers, run.first_new, run.diverged)
run.store.close()
"""


def evaluated(provider: Provider, store: str, cache: str, kill_after: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", KILLED, provider.url, store, cache, str(kill_after)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("cache", ["cached", pytest.param("uncached", marks=pytest.mark.slow)])
def test_a_killed_program_goes_on_where_it_was(url: str, cache: str) -> None:
    """Both parts together are billed for what one part would have been, and for what was in flight."""
    with Provider(latency=(0.0, 0.02)) as whole:
        assert evaluated(whole, f"{url}.other", cache).returncode == 0
    assert len(whole.calls) == (90 if cache == "cached" else 120)
    with Provider(latency=(0.0, 0.02)) as provider:
        half = evaluated(provider, url, cache, 60)
        assert half.returncode == -9, half.stderr
        before = len(provider.calls)
        assert 45 <= before <= 75
        kept = len(rows(url))
        assert kept >= before - 6
        resumed = evaluated(provider, url, cache)
        assert resumed.returncode == 0, resumed.stderr
        asked, replayed, strangers, _, diverged = resumed.stdout.split()[-5:]
        assert (int(asked), diverged) == (120, "None")
        assert int(replayed) >= kept
        assert int(strangers) <= 6
        assert len(whole.calls) <= len(provider.calls) <= len(whole.calls) + 6
        assert provider.bill.nano <= whole.bill.nano * (len(whole.calls) + 6.5) / len(whole.calls)
