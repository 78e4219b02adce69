"""What the library leaves alone: the import, the disk, other tenants, forks; and what it says when misconfigured."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import (
    Budget,
    Cache,
    CircuitBreaker,
    ConfigError,
    Price,
    RateLimit,
    Retry,
    StoreUnavailableError,
    call_context,
)
from dspy_prod.compat.dspy import import_locks
from dspy_prod.testing import Provider, ScriptedEngine
from tests.e2e.support import MODEL, fresh_memory, make_lm

ROOT = Path(__file__).parent.parent

IMPORTING = """
import json, os, sys, time
began = time.process_time()
import dspy
beside = time.process_time() - began
here = os.getcwd()
opened = []
def watch(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
    writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(mode and set(mode) & set("wax+"))
    if (writes and "__pycache__" not in path) or os.path.abspath(path).startswith(here):
        opened.append(path)
sys.addaudithook(watch)
began = time.process_time()
import dspy_prod
from dspy_prod import LM, Budget, Cache, CircuitBreaker, RateLimit, Retry, call_context
took = time.process_time() - began
names = [name for name in ("mlflow", "litellm", "redis") if name in sys.modules]
print(json.dumps({"took": took, "beside": beside, "opened": opened, "imported": names, "left": os.listdir(here)}))
"""


def run_python(code: str, cwd: Path, **environment: str) -> Any:
    """The JSON that a fresh interpreter prints last."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DSPY_PROD")}
    # Whatever the environment says, sources are compiled once: what is measured is the import.
    env = {**inherited, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- import ----------------------------------------------------------------------------------------------------------
@pytest.mark.alone
def test_the_import_is_light_and_leaves_no_trace(tmp_path: Path) -> None:
    """Importing writes nothing, opens nothing where it runs, brings no heavy package, and computes under 100 ms; where
    the machine is slow, under a fifth of what DSPy does."""
    seen = [run_python(IMPORTING, tmp_path) for _ in range(2)]
    assert [(each["opened"], each["imported"], each["left"]) for each in seen] == [([], [], [])] * 2
    tries = 0
    while (
        not any(each["took"] < max(0.1, each["beside"] / 5) for each in seen) and tries < 8
    ):  # other programs may use the caches and the core
        seen.append(run_python(IMPORTING, tmp_path))
        tries += 1
    assert any(each["took"] < max(0.1, each["beside"] / 5) for each in seen), seen


@pytest.mark.parametrize("package", [dspy_prod, dspy_prod.registry, dspy_prod.tracking])
def test_every_public_name_is_there_and_shown(package: Any) -> None:
    """What `__all__` promises is given, and offered by completion in a shell; a typo is told by its name."""
    assert {name for name in package.__all__ if getattr(package, name) is None} == set()
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'publsh'"):
        _ = package.publsh


# -- tenants ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_tenant_s_answer_is_served_to_that_tenant_only(tmp_path: Path, store: str) -> None:
    """Tenants do not see each other's cached answers, nor does a caller without one; `shared=True` lifts that."""
    answers = ScriptedEngine([f"answer {number}" for number in range(10)])
    url = fresh_memory() if store == "memory" else f"sqlite:///{tmp_path}/state.db"
    private = dspy_prod.LM("any/model", engine=answers, store=url, namespace="private")
    shared = dspy_prod.LM("any/model", engine=answers, store=url, namespace="shared", cache=Cache(shared=True))

    def ask(lm: Any, tenant: str | None) -> str:
        with call_context(tenant=tenant):
            return str(lm("q")[0])

    first = [ask(private, tenant) for tenant in ("a", "b", None, "a", "b", None)]
    assert first == ["answer 0", "answer 1", "answer 2"] * 2
    assert {ask(shared, tenant) for tenant in ("a", "b", None)} == {"answer 3"}
    assert answers.calls == 4


# -- stores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", ["postgres://u:secret@host/db", "sqlite://", "sqlite:///x.db?sync=1", "state.db"])
def test_an_unknown_store_is_refused(url: str) -> None:
    """The error shows what would be understood, and no password."""
    with pytest.raises(ConfigError) as caught:
        dspy_prod.LM(MODEL, store=url)
    assert "use one of" in str(caught.value) or "options are" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_refused_at_construction() -> None:
    """A Redis URL that leads nowhere is an error before the first call, and shows no password."""
    with pytest.raises((ConfigError, StoreUnavailableError)) as caught:
        dspy_prod.LM(MODEL, store="redis://:secret@127.0.0.1:1/0")
    assert "redis" in str(caught.value).lower()
    assert "secret" not in str(caught.value)


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    """A place that cannot be written is named, with what to do about it."""
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreUnavailableError) as caught:
        dspy_prod.LM(MODEL, store=f"sqlite:///{tmp_path}/file/state.db")
    assert f"{tmp_path}/file" in str(caught.value)
    assert "memory://" in str(caught.value)


def test_the_default_store_may_be_missing_unless_money_is_at_stake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the default file cannot be written: memory and a warning; with a budget, an error."""
    (tmp_path / ".dspy_prod").write_text("not a directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSPY_PROD_STORE", raising=False)
    with caplog.at_level(logging.WARNING, logger="dspy_prod"):
        lm = dspy_prod.LM(MODEL, engine=ScriptedEngine())
    assert lm("q") == ["ok"]
    assert lm.pipeline.store.url.startswith("memory://")
    assert "this process only" in caplog.text
    with pytest.raises(StoreUnavailableError, match="memory://"):
        dspy_prod.LM(MODEL, engine=ScriptedEngine(), budget=Budget(usd=1))


# -- switches and forks ----------------------------------------------------------------------------------------------
def test_one_variable_switches_everything_off_but_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `DSPY_PROD_DISABLED=1` every call goes through once, unlimited, uncached, and is recorded."""
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    spare = dspy_prod.LM("any/spare", engine=ScriptedEngine("spare"), store=fresh_memory())
    failures = [RuntimeError("first"), RuntimeError("second"), "ok"]
    engine = ScriptedEngine(failures, output_tokens=1000)
    lm = dspy_prod.LM(
        MODEL, engine=engine, store=fresh_memory(), retry=Retry(attempts=3), limit=RateLimit(rpm=1, max_wait=0),
        breaker=CircuitBreaker(failure_threshold=1), budget=Budget(usd=1e-6), fallbacks=[spare],
        prices={MODEL: Price(input=1, output=1)},
    )  # fmt: skip
    for text in ("first", "second"):
        with pytest.raises(Exception, match=text):
            lm("q")
    assert [lm("q") for _ in range(3)] == [["ok"]] * 3
    assert engine.calls == 5
    assert [record.outcome for record in lm.ledger.records()] == ["ok"] * 3 + ["error"] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("engine", "store"),
    [("lm15", "memory"), pytest.param("lm15", "sqlite", marks=pytest.mark.slow), ("litellm", "memory")],
)  # fmt: skip
def test_a_forked_child_can_call(tmp_path: Path, engine: str, store: str) -> None:
    """A child forked while threads are calling has connections and locks of its own, and so has its parent.

    Through LiteLLM it read its parent's answers, spoilt its requests, or waited for a lock for ever.
    """
    url = fresh_memory() if store == "memory" else f"sqlite:///{tmp_path}/state.db"
    with Provider(answer=lambda call: call.last_message, latency=0.005) as provider:
        lm = make_lm(
            provider.url, store=url, cache=True, breaker=CircuitBreaker(), retry=Retry(),
            limit=RateLimit(concurrency=9), engine=engine,
        )  # fmt: skip
        lm("first")  # what takes seconds to import is there
        stop = threading.Event()
        wrong: list[Any] = []

        def work(name: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                question = f"parent {name} {number}"
                if lm(question) != [question]:
                    wrong.append(question)

        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in range(4)]
        for thread in threads:
            thread.start()
        for generation in range(4):
            assert child_calls(lm, generation) == 0
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert wrong == []
        lm.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("whose", ["DSPy's", "LiteLLM's"])
def test_forked_while_a_thread_holds_a_lock_of_litellm(whose: str) -> None:
    """DSPy looks LiteLLM up under a lock in each call, and LiteLLM its callbacks: a child forked just then hung."""
    with Provider(answer=lambda call: call.last_message) as provider:
        lm = make_lm(provider.url, store=fresh_memory(), engine="litellm")
        lm("first")
        manager = sys.modules["litellm"].logging_callback_manager
        locks = import_locks() if whose == "DSPy's" else [manager.callback_lists_lock]
        holding = threading.Event()

        def hold() -> None:
            for lock in locks:
                lock.acquire()
            holding.set()
            time.sleep(0.3)
            for lock in locks:
                lock.release()

        thread = threading.Thread(target=hold)
        thread.start()
        assert holding.wait(20)
        assert child_calls(lm, 0) == 0
        thread.join()
        assert lm("parent") == ["parent"]
        lm.close()


def child_calls(lm: Any, generation: int) -> int:
    """The exit code of a forked child that makes a few calls."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(120)  # a child that hangs is to fail the test, and to end, and to say where
        faulthandler.dump_traceback_later(50, file=sys.__stderr__)
        try:
            questions = [f"child {generation} {number}" for number in range(5)]
            code = 0 if [lm(question)[0] for question in questions] == questions else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.01)
