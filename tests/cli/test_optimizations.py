"""`dspy-prod optimizations`: runs are listed, shown, stopped and removed from a shell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod import Run, call_context
from dspy_prod.cli import main
from dspy_prod.optimize import headers
from dspy_prod.optimize.headers import Header
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import open_store
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm

DESCRIBED = {
    "datasets": {"trainset": ["a"] * 40, "valset": ["b"] * 60},
    "lms": {"program": {"model": "openai/small"}, "prompt_model": {"model": "openai/big"}},
    "versions": {"dspy": "3.4.1"},
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url, "cli")
    yield store
    store.close()


@pytest.fixture
def filled(store: Store, url: str) -> Store:
    """A run that ended, one of this process that goes on, and answers of a run that nobody described."""
    caps = {"usd": 5.0, "calls": None}
    headers.save(store, Header("ended", "MIPROv2", described=DESCRIBED, caps=caps, seeds={"seed": 9}, state="budget",
                               spent_usd=4.99, started_at=1e9, ended_at=1e9 + 60, calls=5_900, replayed=412,
                               score=0.75, warnings=("17 calls differ",)))  # fmt: skip
    headers.save(store, Header("goes on", "GEPA", started_at=2e9))
    with Provider() as provider, call_context(run=Run("kept", usd=1, store=store, keep_answers=True)):
        lm = make_lm(provider.url)
        lm("question")
        lm.close()
    return store


Said = Callable[..., Any]


@pytest.fixture
def said(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What a command prints: JSON as values, else text."""
    monkeypatch.setenv("COLUMNS", "120")

    def said(*arguments: str, code: int = 0) -> Any:
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        options = [each for each in arguments[:cut] if each.startswith("--")]
        words = [each for each in arguments[:cut] if not each.startswith("--")]  # behind `--` all are
        said = ["optimizations", "--store", url, "--namespace", "cli", *options, *words, *arguments[cut:]]
        assert main(said) == code
        out = capsys.readouterr()
        if code:
            return out.err
        return json.loads(out.out) if "--json" in arguments else out.out

    return said


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("command", [(), ("list",)])
def test_all_are_listed_the_latest_first(said: Said, command: tuple[str, ...]) -> None:
    rows = said(*command, "--json")
    assert [(row["run"], row["state"], row["answers"]) for row in rows] == [
        ("goes on", "running", 0),
        ("ended", "budget", 0),
        ("kept", "-", 1),
    ]
    assert (rows[1]["score"], rows[1]["spent_usd"], rows[1]["caps"]["usd"]) == (0.75, 4.99, 5.0)
    assert rows[2]["spent_usd"] > 0, "what its account says"
    table = said(*command)
    for words in ("goes on", "GEPA", "running", "ended", "MIPROv2", "budget", "0.75", "4.990000", "kept"):
        assert words in table


@pytest.mark.usefixtures("filled")
def test_one_is_shown(said: Said) -> None:
    row = said("show", "ended", "--json")
    assert (row["optimizer"], row["calls"], row["replayed"], row["warnings"]) == (
        "MIPROv2",
        5900,
        412,
        ["17 calls differ"],
    )
    text = said("show", "ended")
    for words in (
        "4.990000 USD",
        "5,900",
        "412",
        "40 examples",
        "60 examples",
        "openai/big",
        "Warning: 17 calls differ",
    ):
        assert words in text
    assert "resume=True" in text
    assert "resume=True" not in said("show", "goes on")
    assert "1, 0.0 MB" in said("show", "kept")


def test_a_running_one_is_asked_to_stop(said: Said, filled: Store) -> None:
    assert "asked to stop" in said("stop", "goes on")
    assert headers.asked_to_stop(filled, "goes on")
    assert said("stop", "goes on", "--json") == {"run": "goes on", "asked_to_stop": True}
    for name, why in (("ended", "it is budget"), ("kept", "keeps answers")):
        error = said("stop", name, code=2)
        assert "is not running" in error
        assert why in error


def test_what_is_removed_is_gone(said: Said, filled: Store) -> None:
    assert "is removed, with 1 kept answers" in said("rm", "kept")
    assert said("rm", "ended", "--json") == {"run": "ended", "removed": True, "answers": 0}
    assert headers.names(filled) == ["goes on"]
    assert Run("kept", usd=1, store=filled).used().usd == 0.0


def test_a_running_one_is_not_removed_but_by_force(said: Said, filled: Store) -> None:
    error = said("rm", "goes on", code=2)
    assert "is running" in error
    assert "optimizations stop 'goes on'" in error, "as a shell takes it"
    assert "--force" in error
    assert "goes on" in headers.names(filled)
    said("rm", "goes on", "--force")
    assert "goes on" not in headers.names(filled)


def test_a_running_one_that_is_removed_ends_and_spends_nothing_anew(said: Said, store: Store) -> None:
    """Its cap would be whole again for what goes on; the answers go."""
    headers.save(store, Header("it", "GEPA"))
    with Provider() as provider, call_context(run=Run("it", usd=1.0, store=store, keep_answers=True)):
        lm = make_lm(provider.url)
        lm("question")
        lm.close()
    used = Run("it", usd=1.0, store=store).used().usd
    assert "asked to stop" in said("rm", "it", "--force")
    assert store.runs.answers("it") == []
    assert headers.asked_to_stop(store, "it")
    assert Run("it", usd=1.0, store=store).used().usd == used
    assert used is not None
    assert used > 0


NAMES = ["two words", "-x", "--force", "[bold red]x[/]", "new\nline", "\x1b[31mred", "ü|%;'\"", " ", "list", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_shown_stopped_and_removed(name: str, said: Said, store: Store) -> None:
    headers.save(store, Header(name, "GEPA", caps={"usd": 1.0}))
    headers.save(store, Header("another", "GEPA", state="completed", started_at=1.0))
    assert [row["run"] for row in said("--json")] == [name, "another"]
    table = said()
    assert "\x1b" not in table
    given = ("--", name) if name.startswith("-") else (name,)
    assert said("show", "--json", *given)["run"] == name
    assert said("stop", "--json", *given) == {"run": name, "asked_to_stop": True}
    assert said("rm", "--force", "--json", *given) == {"run": name, "removed": True, "answers": 0}
    assert headers.names(store) == ["another"]


def test_half_a_character_in_a_name_is_shown_and_found(said: Said, store: Store) -> None:
    headers.save(store, Header("a\ud800", "GEPA", state="budget"))
    assert said("show", "a\ud800", "--json")["run"] == "a\ud800"
    assert said("rm", "a\ud800", "--json")["removed"]
    assert headers.names(store) == []


def test_a_damaged_one_is_listed_and_can_be_removed(said: Said, store: Store) -> None:
    """The list is there for the others, and the remedy that is told works."""
    headers.save(store, Header("good", "GEPA", state="completed"))
    store.runs.put_note("bad", "header", '{"run": "bad", "optimizer": "x", "beside": [[1]]}')
    assert [(row["run"], row["state"]) for row in said("list", "--json")] == [("good", "completed"), ("bad", "damaged")]
    assert "damaged" in said()
    assert "optimizations rm bad" in said("show", "bad", code=2)
    assert "is removed" in said("rm", "bad")
    assert headers.names(store) == ["good"]


def test_the_list_as_json_says_all_that_is_known(said: Said, store: Store) -> None:
    headers.save(store, Header("it", "GEPA", state="budget", caps={"usd": 5.0, "calls": None}, spent_usd=4.5,
                               started_at=1e9, ended_at=1e9 + 60, score=0.75))  # fmt: skip
    store.runs.keep("it", b"key", b"12345", "m", True).result(10)
    assert said("list", "--json") == [
        {"run": "it", "optimizer": "GEPA", "state": "budget", "started_at": 1e9, "ended_at": 1e9 + 60, "score": 0.75,
         "spent_usd": 4.5, "caps": {"usd": 5.0, "calls": None}, "answers": 1, "bytes": 5}
    ]  # fmt: skip


def test_a_name_may_stand_behind_an_option(url: str, filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--store", url, "--namespace", "cli"]
    assert main(["optimizations", "show", *where, "--json", "ended"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "ended"
    assert main(["optimizations", "rm", "--json", "kept", *where]) == 0
    assert headers.names(filled) == ["ended", "goes on"]
    with pytest.raises(SystemExit):
        main(["optimizations", "show", "ended", *where, "another"])
    assert "unrecognized arguments: another" in capsys.readouterr().err


def test_of_many_names_a_few_are_told(said: Said, store: Store) -> None:
    for number in range(12):
        headers.save(store, Header(f"run {number:02}", "GEPA", state="budget"))
    error = said("show", "nobody", code=2)
    assert "'run 09' and 2 more" in error
    assert "run 10" not in error


CHILD = """
import sys
from dspy_prod.optimize import headers
from dspy_prod.stores.opening import open_store
headers.save(open_store(sys.argv[1], "cli"), headers.Header("it", "GEPA"))
"""


@pytest.mark.usefixtures("store")
def test_a_killed_one_is_told_and_may_be_removed(said: Said, url: str) -> None:
    subprocess.run([sys.executable, "-c", CHILD, url], check=True, timeout=60)
    assert [row["state"] for row in said("--json")] == ["killed"]
    assert "resume=True" in said("show", "it")
    assert "it is killed" in said("stop", "it", code=2)
    said("rm", "it")
    assert "No optimization is known" in said()
    assert said("--json") == []


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show",), "optimizations show NAME"),
        (("rm",), "optimizations rm NAME"),
        (("list", "ended"), "write dspy-prod optimizations"),
        (("show", "nobody"), "only 'ended', 'goes on', 'kept'"),
    ],
)
def test_mistakes_end_with_a_remedy(said: Said, arguments: tuple[str, ...], words: str) -> None:
    assert words in said(*arguments, code=2)


def test_no_store_is_made_by_looking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizations", "--store", f"sqlite:///{tmp_path}/none.db"]) == 2
    assert "no store at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
