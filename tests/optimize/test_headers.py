"""What a run leaves behind for other processes: how it goes, what it depends on, and a way to end it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_prod import ConfigError, Run, call_context
from dspy_prod.optimize import alive, headers
from dspy_prod.optimize.comparing import goes_further
from dspy_prod.optimize.fingerprints import described, digests
from dspy_prod.optimize.headers import Header, differences
from dspy_prod.runtime import processes
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Any = MemoryStore("it") if request.param == "memory" else SqliteStore(str(tmp_path / "state.db"), "it")
    yield made
    made.close()


def test_a_header_is_read_as_it_was_written(store: Store) -> None:
    header = Header(
        "triage", "MIPROv2", {"student": "abc"}, {"datasets": {"trainset": ["a", "b"]}}, {"usd": 5.0, "calls": None},
        {"seed": 0}, "budget", 4.99, 10.0, 20.0, {"score": 0.7, "prompts": {"self": "ü"}}, ("careful",), 12, 3, 0.7,
    )  # fmt: skip
    headers.save(store, header)
    assert headers.load(store, "triage") == header
    assert headers.load(store, "another") is None
    headers.save(store, replace(header, state="completed", spent_usd=5.5))
    again = headers.load(store, "triage")
    assert again is not None
    assert (again.state, again.spent_usd) == ("completed", 5.5)


def test_the_list_begins_with_the_latest(store: Store) -> None:
    for name, at in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        headers.save(store, Header(name, "GEPA", state="completed", started_at=at))
    assert [header.run for header in headers.headers(store)] == ["b", "c", "a"]
    assert headers.names(store) == ["a", "b", "c"]


def test_a_run_is_asked_to_stop_once(store: Store) -> None:
    """The next part of it begins without the request."""
    assert not headers.asked_to_stop(store, "it")
    header = Header("it", "GEPA")
    headers.ask_to_stop(store, "it")
    assert headers.asked_to_stop(store, "it")
    assert headers.asked_to_stop(store, "it", since=header.started_at)
    assert not headers.asked_to_stop(store, "it", since=Header("it", "GEPA").started_at)
    assert not headers.asked_to_stop(store, "another")


CHILD = """
import sys
from dspy_prod.optimize import headers
from dspy_prod.stores.opening import open_store
store = open_store(sys.argv[1], "it")
if sys.argv[2] == "stop":
    headers.ask_to_stop(store, "it")
else:
    headers.save(store, headers.Header("it", "GEPA"))
    print(headers.load(store, "it").shown_state, flush=True)
    sys.stdin.readline()
"""


def test_another_process_stops_it_and_sees_whether_it_lives(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db"
    store = SqliteStore(str(tmp_path / "state.db"), "it")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "running"
    header = headers.load(store, "it")
    assert header is not None
    assert header.running
    subprocess.run([sys.executable, "-c", CHILD, url, "stop"], check=True, timeout=60)
    assert headers.asked_to_stop(store, "it", since=header.started_at)
    child.kill()
    child.wait(20)
    assert not header.running
    assert header.shown_state == "killed"
    store.close()


def test_a_number_that_another_process_has_now_is_not_taken_for_the_run() -> None:
    host, booted, pid, begun = alive.this_process().split(" ")
    assert int(pid) == os.getpid()
    if begun == "-":
        pytest.skip("this system does not tell when a process began")
    for other in (
        f"{host} {booted} {pid} 1",
        f"{host} 7.000 {pid} {begun}",
        f"{host} {booted} {2**22 + 1} {begun}",
        "",
    ):
        assert not Header("it", "GEPA", process=other).running, other
    assert Header("it", "GEPA", process=f"elsewhere {booted} {pid} {begun}").running, "nobody can tell from here"


def test_what_is_removed_is_gone_with_its_answers_and_its_account(tmp_path: Path) -> None:
    """A run of the same name begins anew; others stay as they are."""
    url = f"sqlite:///{tmp_path}/state.db"
    with Provider() as provider:
        lm = make_lm(provider.url)
        for name in ("it", "it|too", "itself"):
            with call_context(run=Run(name, usd=1.0, calls=5, store=url, namespace="it", keep_answers=True)):
                lm("question")
        run = Run("it", usd=1.0, store=url, namespace="it")
        assert run.used().calls == 1
        store = run.store
        headers.save(store, Header("it", "GEPA", state="completed"))
        headers.remove(store, "it")
        assert headers.load(store, "it") is None
        assert store.runs.answers("it") == []
        assert headers.names(store) == ["itself", "it|too"]
        again = Run("it", usd=1.0, tokens=100, store=url, namespace="it")
        assert (again.used().usd, again.used().calls, again.used().tokens) == (0.0, None, 0)
        for other in ("it|too", "itself"):
            assert Run(other, usd=1.0, store=url, namespace="it").used().calls == 1
            assert len(store.runs.answers(other)) == 1
        lm.close()
    with sqlite3.connect(tmp_path / "state.db") as file:
        keys = [key for (key,) in file.execute("SELECT key FROM accounts ORDER BY key")]
    assert keys == [f"|run|{name}|{of}" for name in ("it%7Ctoo", "itself") for of in ("calls", "usd")]


def test_one_that_ends_without_a_word_goes_on_no_longer(store: Store) -> None:
    """Its process, a notebook's, lives on; its last state could not be written, because the disk was full."""
    headers.save(store, Header("it", "GEPA", state="budget"))
    mine = headers.claim(store, Header("it", "GEPA"), headers.load(store, "it"))
    stands = headers.load(store, "it")
    assert stands is not None
    assert (stands.running, stands.dead_pid) == (True, None)
    headers.release(mine)
    assert (stands.running, stands.shown_state) == (False, "killed")


def test_of_two_that_go_on_at_once_one_is_told_that_the_other_does(store: Store) -> None:
    headers.save(store, Header("it", "GEPA", state="killed"))
    both = [headers.load(store, "it") for _ in range(2)]
    mine = headers.claim(store, Header("it", "GEPA"), both[0])
    with pytest.raises(ConfigError, match="'it' was just begun elsewhere"):
        headers.claim(store, Header("it", "GEPA"), both[1])
    with pytest.raises(ConfigError, match="'it' was just begun elsewhere"):
        headers.claim(store, Header("it", "GEPA"), None)
    stands = headers.load(store, "it")
    assert stands is not None
    assert stands.running
    headers.release(mine)


def test_one_of_another_machine_is_dead_once_it_writes_no_more() -> None:
    """As a container that was killed, and has another name when it is started again."""
    elsewhere = "elsewhere " + alive.this_process().partition(" ")[2]
    now = time.time()
    assert Header("it", "GEPA", process=elsewhere, seen_at=now - 10).running
    assert not Header("it", "GEPA", process=elsewhere, seen_at=now - alive.SILENT - 1).running
    assert Header("it", "GEPA", process=elsewhere, seen_at=now - alive.SILENT - 1).dead_pid is None
    assert Header("it", "GEPA", process=alive.this_process(), seen_at=0.0).running, "it is known to live"


def test_the_latest_of_a_name_is_told_from_a_name_with_a_number(store: Store) -> None:
    for name, asked, at in (("a", "a", 1.0), ("a-2", "a-2", 5.0), ("a-3", "a", 3.0), ("b-2", "b", 2.0)):
        headers.save(store, Header(name, "GEPA", state="budget", asked_as=asked, started_at=at))
    found = {name: headers.latest(store, name) for name in ("a", "a-2", "a-3", "b", "b-2", "c")}
    assert {name: each and each.run for name, each in found.items()} == {
        "a": "a-3", "a-2": "a-2", "a-3": "a-3", "b": "b-2", "b-2": "b-2", "c": None,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "shown"), [("a", "a"), ("a b", "'a b'"), ("-x", "-- -x"), ("'", """''"'"''""")])
def test_a_remedy_names_a_run_as_a_shell_takes_it(name: str, shown: str) -> None:
    assert headers.quoted(name) == shown


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"run": "bad", "optimizer": "x", "beside": [[1]]}',
                                  '{"run": "bad", "optimizer": "x", "started_at": "long ago"}'])  # fmt: skip
def test_a_header_is_damaged_in_whatever_way(text: str, store: Store) -> None:
    store.runs.put_note("bad", "header", text)
    with pytest.raises(ConfigError, match="'bad' is damaged"):
        headers.load(store, "bad")
    assert headers.sound(store) == ([], ["bad"])


def test_a_damaged_header_says_how_to_get_rid_of_it(store: Store) -> None:
    headers.save(store, Header("good", "GEPA", state="completed"))
    store.runs.put_note("bad", "header", "{")
    with pytest.raises(ConfigError, match="optimizations rm bad"):
        headers.load(store, "bad")
    assert [header.run for header in headers.headers(store)] == ["good"]
    headers.remove(store, "bad")
    assert headers.names(store) == ["good"]


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    return float(example.answer == prediction.answer)


def stricter(example: Any, prediction: Any, trace: Any = None) -> float:
    return float(example.answer is prediction.answer)


def made(optimizer: Any = None, student: Any = None, size: int = 6, score: Any = metric, **options: Any) -> Header:
    """The header of a run that is the same but for what is said."""
    train = options.pop("train", [dspy.Example(q=str(n), answer="a").with_inputs("q") for n in range(size)])
    told = described(
        optimizer or dspy.COPRO(metric=metric, breadth=4),
        student or dspy.Predict("q -> answer"),
        {"trainset": train, "valset": None},
        score,
        {"program": options.pop("lm", dspy.LM("openai/m", api_key="sk-secret-of-mine"))},
        options.pop("arguments", None),
    )
    return Header(
        "it", "COPRO", digests(told), told, options.pop("caps", {"usd": 5.0}), options.pop("seeds", {"seed": 0})
    )


def test_what_is_the_same_has_no_differences() -> None:
    assert differences(made(), made()) == ([], [])
    assert made().fingerprints == made().fingerprints


REFUSED = {
    "class": (lambda: made(dspy.SIMBA(metric=metric)), "the optimizer is SIMBA instead of COPRO"),
    "setting": (lambda: made(dspy.COPRO(metric=metric, breadth=5)), "COPRO's breadth is 5 instead of 4"),
    "argument": (lambda: made(arguments={"num_trials": 3}), "compile's num_trials is 3 instead of none"),
    "program": (lambda: made(student=dspy.ChainOfThought("q -> answer")), "the program is ChainOfThought instead of"),
    "instructions": (
        lambda: made(student=dspy.Predict(dspy.Signature("q -> answer", "Be brief."))),
        "the program's predictor 'self' has other instructions",
    ),
    "fewer": (lambda: made(size=5), "the trainset has 5 examples instead of 6"),
    "order": (
        lambda: made(train=[dspy.Example(q=str(n), answer="a").with_inputs("q") for n in (1, 0, 2, 3, 4, 5)]),
        "the examples of the trainset come in another order",
    ),
    "example": (
        lambda: made(train=[dspy.Example(q=str(n), answer="b" if n == 3 else "a").with_inputs("q") for n in range(6)]),
        "1 examples of the trainset are others, the first is number 3",
    ),
    "model": (lambda: made(lm=dspy.LM("openai/n")), "the LM for program is openai/n instead of openai/m"),
    "temperature": (
        lambda: made(lm=dspy.LM("openai/m", temperature=0.3)),
        "the program LM's temperature is 0.3 instead of none",
    ),
    "seed": (lambda: made(seeds={"seed": 1}), "the seed seed is 1 instead of 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lead_elsewhere_is_refused_by_name(case: str) -> None:
    make, words = REFUSED[case]
    refused, allowed = differences(made(), make())
    assert len(refused) == 1, refused
    assert words in refused[0]
    assert allowed == []


def test_a_metric_and_caps_may_change() -> None:
    """Kept answers are then scored anew, for nothing."""
    refused, allowed = differences(made(), made(score=stricter, caps={"usd": 8.0, "calls": 10}))
    assert refused == []
    assert allowed == [
        "the metric is stricter instead of metric",
        "the cap usd is 8.0 instead of 5.0",
        "the cap calls is 10 instead of none",
    ]


def test_more_trials_are_the_same_way_and_further() -> None:
    """Of a number nothing can be told that was left to the optimizer."""
    fewer, more = (made(arguments={"num_trials": number, "minibatch": False}) for number in (6, 9))
    assert differences(fewer, more) == ([], ["compile's num_trials is 9 instead of 6"])
    assert differences(more, fewer) == ([], ["compile's num_trials is 6 instead of 9"])
    assert goes_further(fewer.described, more.described)
    assert not goes_further(fewer.described, fewer.described)
    for other in ({"minibatch": False}, {"num_trials": True, "minibatch": False}):
        refused, allowed = differences(fewer, made(arguments=other))
        assert (len(refused), allowed) == (1, [])
        assert "compile's num_trials is" in refused[0]
    refused, allowed = differences(fewer, made(arguments={"num_trials": 9, "minibatch": True}))
    assert refused == ["compile's minibatch is True instead of False"]


def test_another_version_is_told() -> None:
    old = made()
    older = {**old.described, "versions": {**old.described["versions"], "dspy": "3.4.0"}}
    refused, allowed = differences(replace(old, described=older), made())
    assert refused == []
    assert len(allowed) == 1
    assert "the version of dspy is" in allowed[0]
    assert "instead of '3.4.0'" in allowed[0]


def test_a_header_has_no_key_in_it(store: Store) -> None:
    headers.save(store, made())
    text = store.runs.note("it", "header")
    assert text is not None
    assert "secret" not in text
    assert "openai/m" in text


def test_differences_survive_the_way_through_the_store(store: Store) -> None:
    """JSON makes lists of tuples."""
    headers.save(store, made(dspy.COPRO(metric=metric, breadth=4)))
    loaded = headers.load(store, "it")
    assert loaded is not None
    assert differences(loaded, made()) == ([], [])


def test_a_container_of_the_same_name_numbers_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on one host may share its name and its boot; a number of one means another process here."""
    monkeypatch.setattr(os, "readlink", lambda *_: "pid:[1]")
    monkeypatch.setattr(processes, "_named", processes._named.__wrapped__)  # the name is found once
    there = f"{alive.this_process().rpartition(' ')[0].rpartition(' ')[0]} 999999999 123"
    assert alive.dead_pid(there) == 999999999
    monkeypatch.setattr(os, "readlink", lambda *_: "pid:[2]")
    assert alive.dead_pid(there) is None
    assert alive.lives(there, time.time())
