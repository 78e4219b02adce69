"""Whose answer a cached answer is, what must not be written, and what a call may say for itself."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Message, Request, Response, ToolCallPart, Usage
from dspy.utils.exceptions import LMAuthError, LMError, LMServerError

import dspy_prod
from dspy_prod import Budget, Cache, Price, RateLimit, Retry
from dspy_prod.errors import ConfigError
from dspy_prod.lm.beneath import MAX_VARIANTS
from dspy_prod.pipeline.scope import engine_identity
from dspy_prod.pipeline.upstream.destination import destination
from dspy_prod.pricing.warmup import WARMUP
from dspy_prod.privacy.error_text import scrubbed
from dspy_prod.privacy.names import address, secrets_in
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import Provider, ScriptedEngine

PRICES = {"openai/m": Price(input=1, output=1, max_output_tokens=1000)}
SECRET_URL = "http://user:hunter2222@127.0.0.1:9/v1?api-key=SUPERSECRET99&v=1"


def make(engine: Any, **arguments: Any) -> dspy_prod.LM:
    """An LM on a memory store of its own, unless another one is given."""
    arguments = {"store": MemoryStore(), "prices": PRICES, "max_tokens": 100, **arguments}
    return dspy_prod.LM("openai/m", engine=engine, **arguments)


def request() -> Request:
    return Request(model="openai/m", messages=(Message.user("hi"),))


def tool_call(request: Request) -> Response:
    part = ToolCallPart(id="1", name="t", input={"a": {"b": 1}})
    return Response(
        id=None, model=request.model, message=Message.assistant([part]), finish_reason="tool_call",
        usage=Usage(input_tokens=1, output_tokens=1),
    )  # fmt: skip


class Named(ScriptedEngine):
    """An engine that says what it is."""

    name = "backend-1"


class Dumping(ScriptedEngine):
    """An engine that other processes can rebuild."""

    def __init__(self, url: str, answer: str) -> None:
        super().__init__(answer)
        self.url = url

    def dump_state(self) -> dict[str, Any]:
        return {"url": self.url}


# -- whose answer it is ------------------------------------------------------------------------------------------------
def test_two_engine_objects_do_not_share_answers() -> None:
    """Equal classes may lead to different servers; the same object is the same server."""
    store = MemoryStore()
    first, second = ScriptedEngine("a"), ScriptedEngine("b")
    lms = [make(engine, store=store) for engine in (first, second, first)]
    assert [lm("q") for lm in lms] == [["a"], ["b"], ["a"]]
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize(
    ("one", "other", "shared", "rows"),
    [
        (lambda: Named("a"), lambda: Named("b"), True, 1),
        (lambda: Dumping("u", "a"), lambda: Dumping("u", "b"), True, 1),
        (lambda: Dumping("u", "a"), lambda: Dumping("v", "b"), False, 2),
        (lambda: ScriptedEngine("a"), lambda: ScriptedEngine("b"), False, 0),
    ],
)
def test_answers_outlive_a_run_only_if_the_engine_says_what_it_is(
    tmp_path: Path, one: Any, other: Any, shared: bool, rows: int
) -> None:
    """A file knows an engine by its class and its name or state; without them nothing is written."""
    url = f"sqlite:///{tmp_path}/state.db"
    first = make(one(), store=url, cache=Cache(ttl=60))
    assert first("q") == ["a"]
    first.close()
    later = make(other(), store=url, cache=Cache(ttl=90))  # other options: a memory tier of its own
    assert later("q") == (["a"] if shared else ["b"])
    assert first.pipeline.store.cache_size()[0] == rows


def test_an_engine_whose_state_cannot_be_told_is_known_here_only() -> None:
    """A foreign `dump_state` may raise or give what is no JSON."""

    class Odd(ScriptedEngine):
        def dump_state(self) -> Any:
            return {"lock": threading.Lock()}

    known, everywhere = engine_identity(Odd())
    assert known is not None
    assert not everywhere


@pytest.mark.parametrize("difference", ["engine", "key", "fallback"])
def test_calls_that_would_be_sent_other_ways_do_not_follow_each_other(difference: str) -> None:
    """An error is the error of a key, an engine and the fallbacks that were tried."""
    store, engine = MemoryStore(), ScriptedEngine("x")
    plain = make("auto", store=store, api_key="key-of-a") if difference == "key" else make(engine, store=store)
    other = {
        "engine": lambda: make(ScriptedEngine("x"), store=store),
        "key": lambda: make("auto", store=store, api_key="key-of-b"),
        "fallback": lambda: make(engine, store=store, fallbacks=[make(ScriptedEngine("y"), store=store)]),
    }[difference]()
    assert plain.pipeline.flights is plain.copy(temperature=0.5).pipeline.flights
    assert plain.pipeline.flights is not other.pipeline.flights


def test_a_follower_never_gets_the_error_of_another_engine() -> None:
    """The same prompt, at the same time, to a server that refuses and to one that answers."""
    store, entered, gate = MemoryStore(), threading.Event(), threading.Event()

    def refuse(request: Request) -> Any:
        entered.set()
        gate.wait(20)
        return LMAuthError("revoked", status=401)

    refused = make(ScriptedEngine(refuse), store=store, retry=False)
    failures: list[BaseException] = []

    def lead() -> None:
        with pytest.raises(LMAuthError) as caught:
            refused("q")
        failures.append(caught.value)

    leader = threading.Thread(target=lead)
    leader.start()
    assert entered.wait(30)
    assert make(ScriptedEngine("good"), store=store)("q") == ["good"]
    gate.set()
    leader.join(5)
    assert len(failures) == 1


def test_an_lm_without_cache_has_an_engine_without_cache() -> None:
    """DSPy programs may use the engine without its LM."""
    engine = ScriptedEngine("x")
    for lm in (make(engine, cache=False), make(engine).copy(cache=False)):
        before = engine.calls
        lm._engine_spec.complete(request())
        lm._engine_spec.complete(request())
        assert engine.calls == before + 2
    caching = make(engine, cache=False).copy(cache=True)
    before = engine.calls
    caching._engine_spec.complete(request())
    caching._engine_spec.complete(request())
    assert engine.calls == before + 1


def test_who_changes_an_answer_changes_only_his_own() -> None:
    """Tool arguments are dicts: each caller, the first included, gets dicts of its own."""
    lm = make(ScriptedEngine(tool_call))
    for _ in range(3):
        part = lm(request()).message.parts[0]
        assert part.input == {"a": {"b": 1}}
        part.input["a"]["b"] = 666


def test_clearing_reaches_the_answers_of_all_cache_options() -> None:
    """One store and namespace has one cache to clear, however many copies with options of their own there are."""
    store, engine = MemoryStore(), ScriptedEngine("x")
    lm = make(engine, store=store)
    other = lm.copy(cache=Cache(ttl=100))
    other("q")
    lm.cache_clear()
    other("q")
    assert engine.calls == 2


def test_a_hit_counts_once() -> None:
    """Also when the quick look at the memory leaves the answer to the engine."""
    lm = make(ScriptedEngine("x"), temperature=1.0)
    cache = lm.pipeline.cache
    assert cache is not None
    lm("q", n=2)
    before = cache.hits
    lm("q", n=2)
    assert cache.hits == before + 2
    lm("p")
    before = cache.hits
    lm("p")
    assert cache.hits == before + 1


# -- arguments of one call ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answers", [1, 2])
def test_an_answer_in_the_file_is_found_once_and_counts_once(tmp_path: Path, answers: int) -> None:
    """After a restart it took as long as a call that is sent: DSPy prepared it, and the file was asked after that."""
    url = f"sqlite:///{tmp_path}/state.db"
    asked: list[bytes] = []
    with Provider() as provider:
        where = {"store": url, "api_base": provider.url, "api_key": "none", "namespace": "restarted"}
        with closing(dspy_prod.LM("openai/m", **where)) as first:
            assert len(first("a question", n=answers)) == answers
        again = dspy_prod.LM("openai/m", **where)
        cache, look = again.pipeline.cache, again.pipeline.store.cache_get
        assert cache is not None
        cache.clear()
        cache.hits = cache.misses = 0
        again.pipeline.store.cache_get = lambda key: asked.append(key) or look(key)  # type: ignore[method-assign]
        for _ in range(2):
            assert len(again("a question", n=answers)) == answers
        assert len(asked) == answers
        assert again("another question") == ["ok"]
        again.close()
        assert len(provider.calls) == answers + 1
    assert (cache.hits, cache.misses) == (2 * answers, 1)


def test_cache_options_of_a_call_are_those_of_the_next_such_call() -> None:
    """The answer is found again in memory, with no store to keep it."""
    engine = ScriptedEngine("x")
    lm = make(engine)
    for _ in range(3):
        lm("q", cache=Cache(ttl=60))
        lm("q", cache={"ttl": 60})
    assert engine.calls == 1


@pytest.mark.parametrize("arguments", [{"timeout": 30}, {"retry": Retry(attempts=2)}, {"num_retries": 2}])
def test_a_pipeline_for_one_call_serves_the_next_one_too(arguments: dict[str, Any]) -> None:
    """Connections and breaker are reused; model arguments are those of the LM as it is now."""
    engine = ScriptedEngine("x")
    lm = make(engine, cache=False)
    lm("a", **arguments)
    (kept,) = lm._variants.all()
    lm.kwargs["temperature"] = 0.5
    lm("b", **arguments)
    assert lm._variants.all() == [kept]
    assert engine.requests[-1].config.temperature == 0.5
    assert len(lm.history) == 2


def test_per_call_pipelines_are_bounded() -> None:
    """The oldest one goes."""
    lm = make(ScriptedEngine("x"), cache=False)
    for seconds in range(1, MAX_VARIANTS + 5):
        lm("q", timeout=seconds)
    assert len(lm._variants.all()) == MAX_VARIANTS


def test_retries_of_a_call_are_its_own() -> None:
    """The LM keeps its own policy."""
    engine = ScriptedEngine([LMServerError("down", status=503), LMServerError("down", status=503), "late"])
    lm = make(engine, cache=False, retry=False)
    assert lm("q", retry=Retry(attempts=3, backoff=0.001)) == ["late"]
    assert lm.settings.retry.attempts == 1


def test_a_policy_for_one_call_is_refused_with_the_remedy() -> None:
    """What only an LM can have names `copy`."""
    with pytest.raises(ConfigError, match=r"lm\.copy\(budget=\.\.\.\)"):
        make(ScriptedEngine("x"))("q", budget=Budget(usd=1))


# -- secrets -----------------------------------------------------------------------------------------------------------
def test_an_address_names_no_secret_but_tells_users_apart() -> None:
    """The identity of a limiter is written to the store."""
    found = address(SECRET_URL)
    assert found.startswith("127.0.0.1:9/v1?v=1#")
    assert not any(word in found for word in ("hunter2222", "SUPERSECRET99", "user"))
    assert found == destination({"api_base": SECRET_URL}, "openai/m")
    assert found != address(SECRET_URL.replace("hunter", "hunted"))
    assert address("https://host/v1/") == "host/v1"
    assert address("openai") == "openai"
    assert "pw" not in address("u:pw@host/v1")


def test_secrets_of_urls_are_found() -> None:
    """As they stand and unquoted, wherever a setting holds a URL."""
    found = secrets_in({"api_base": SECRET_URL, "extra": {"proxy": "http://u:p%40ssw0rd!@h"}, "timeout": 3})
    assert {"user:hunter2222", "hunter2222", "SUPERSECRET99", "p%40ssw0rd!", "p@ssw0rd!"} <= found
    assert "127.0.0.1:9" not in found
    assert secrets_in({"api_base": "https://host/v1?v=1"}) == set()


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_the_password_in_an_api_base_is_nowhere(tmp_path: Path, engine: str) -> None:
    """Neither in the file nor in the error, its causes and its traceback."""
    lm = make(
        engine, api_base=SECRET_URL, api_key="k" * 10, store=f"sqlite:///{tmp_path}/s.db", limit=RateLimit(rpm=60),
        retry=False,
    )  # fmt: skip
    with pytest.raises(LMError) as caught:
        lm("x")
    lm.close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    shown = "".join(traceback.format_exception(caught.value))
    for secret in ("SUPERSECRET99", "hunter2222"):
        assert secret.encode() not in written
        assert secret not in shown
        assert secret not in scrubbed(f"no route to {SECRET_URL}")


# -- reading after an abandoned stream ---------------------------------------------------------------------------------
@pytest.mark.parametrize("read", ["records", "total", "costs", "costs_by", "health", "preview"])
def test_who_reads_sees_what_a_finaliser_left_to_the_reaper(read: str) -> None:
    """The work is done before the answer is given."""
    lm = make(ScriptedEngine("x"), cache=False)
    done: list[int] = []
    entered, gate = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        gate.wait(30)
        done.append(1)

    REAPER.post(work)
    entered.wait(30)
    threading.Timer(0.02, gate.set).start()
    reads: dict[str, Any] = {
        "records": lambda: lm.ledger.records(), "total": lambda: lm.ledger.total(), "costs": lm.costs,
        "costs_by": lambda: lm.costs(by="model"), "health": lm.health, "preview": lambda: lm.preview("q"),
    }  # fmt: skip
    reads[read]()
    assert done == [1]


AT_EXIT = """
import sys, threading
import dspy_prod
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import ScriptedEngine

lm = dspy_prod.LM("openai/m", engine=ScriptedEngine("x"), store=sys.argv[1], namespace="end", cache=False)
lm("a")
record = lm.ledger.records()[0]

def work():
    threading.main_thread().join()
    lm.pipeline.store.append(record._replace(id="late"))

REAPER.post(work)
"""


def test_what_the_reaper_has_to_do_is_written_when_the_process_ends(tmp_path: Path) -> None:
    """The stores end after it."""
    url = f"sqlite:///{tmp_path}/s.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", AT_EXIT, url], check=True, timeout=60, env=environment)
    records = make(ScriptedEngine("x"), store=url, namespace="end").ledger.records()
    assert "late" in [record.id for record in records]


# -- the rest ----------------------------------------------------------------------------------------------------------
def test_a_record_that_comes_after_the_end_is_missed_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The call still gets its answer."""
    lm = make(ScriptedEngine("x"), store=f"sqlite:///{tmp_path}/s.db", cache=False)
    lm("a")
    lm.pipeline.store.close()
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        assert lm("b") == ["x"]
    assert "is closed: the record of a call to openai/m is lost" in caplog.text


def test_prices_are_loaded_beside_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and only for engines whose models DSPy has prices for."""
    started: list[int] = []
    monkeypatch.setattr(WARMUP, "start", lambda: started.append(1))
    make(ScriptedEngine("x"))
    assert started == []
    make("auto", api_key="k")
    assert started == [1]


def test_a_warmup_that_fails_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call tries again and tells."""

    def fail() -> None:
        raise OSError("no network")

    monkeypatch.setattr("dspy_prod.pricing.warmup.preload", fail)
    monkeypatch.setattr(WARMUP, "_thread", None)
    WARMUP.start()
    thread = WARMUP._thread
    assert thread is not None
    thread.join(5)
    WARMUP.start()
    assert WARMUP._thread is thread


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_not_held_up_by_its_parents_calls() -> None:
    """Their seats and money are the parent's; the child's copy of the store has them back."""
    entered, gate = threading.Event(), threading.Event()

    def held(request: Request) -> str:
        entered.set()
        gate.wait(20)
        return "x"

    lm = make(ScriptedEngine(held), cache=False, limit=RateLimit(concurrency=1, max_wait=1), budget=Budget(usd=1))
    caller = threading.Thread(target=lambda: lm("a"))
    caller.start()
    assert entered.wait(30)
    store = lm.pipeline.store
    key = lm.pipeline.primary.limit_key
    child = os.fork()
    if child == 0:
        limiter = store.limiter(key)
        budget = lm.costs().budgets[0]
        free = store.holds() == 0 and budget.held_usd == 0 and limiter is not None and limiter.in_flight == 0
        os._exit(0 if free else 1)
    _, status = os.waitpid(child, 0)
    held_here = store.holds()
    gate.set()
    caller.join(5)
    assert os.waitstatus_to_exitcode(status) == 0
    assert held_here == 1
    assert store.holds() == 0
