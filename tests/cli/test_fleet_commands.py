"""`dspy-prod stop`, `resume`, `breaker`, `status` and `budgets set`, on a store that an LM has used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod import Budget, CircuitOpenError, StoppedError
from dspy_prod.cli import main
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import MODEL, over


@pytest.fixture
def lm(tmp_path: Path) -> Iterator[Any]:
    """In service, with a budget."""
    lm = over(
        ScriptedEngine("ok"), store=f"sqlite:///{tmp_path}/state.db", namespace="n", breaker=True,
        budget=Budget(usd=1.0, name="day", per="day"),
    )  # fmt: skip
    lm("question")
    yield lm
    lm.close()
    lm.pipeline.store.close()


@pytest.fixture
def command(lm: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints; its errors too."""

    def run(*words: str, code: int = 0) -> str:
        assert main([*words, "--store", lm.pipeline.store.url, "--namespace", "n"]) == code
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_status_shows_what_holds_and_what_was_done(command: Callable[..., str]) -> None:
    assert "Nothing is stopped." in command("status")
    assert "tenant 'acme' is stopped: unpaid" in command(
        "stop", "--tenant", "acme", "--reason", "unpaid", "--for", "2h"
    )
    command("breaker", "open", "openai/other", "--reason", "status page")
    told = json.loads(command("status", "--json"))
    assert [(each["scope"], each["value"], each["reason"]) for each in told["stops"]] == [("tenant", "acme", "unpaid")]
    assert [(each["route"], each["state"]) for each in told["circuits"]] == [("openai/other", "forced_open")]
    assert [each["what"] for each in told["journal"]] == ["forced open", "stopped"]
    assert told["budgets"][0]["limit_usd"] == 1.0
    shown = command("status")
    assert all(word in shown for word in ("unpaid", "status page", "forced open", "Budgets"))
    assert "unpaid" in command("health")
    assert "Calls go on." in command("resume", "--tenant", "acme")
    assert "Nothing of that was stopped." in command("resume", "--tenant", "acme")


def test_an_lm_in_service_obeys(command: Callable[..., str], lm: Any) -> None:
    command("stop", "--all")
    with pytest.raises(StoppedError):
        lm("another")
    command("resume", "--all")
    command("breaker", "open", MODEL)
    with pytest.raises(CircuitOpenError):
        lm("another")
    command("breaker", "reset", MODEL)
    assert lm("another") == ["ok"]
    assert "3 USD per day" in command("budgets", "set", "day", "--usd", "3")
    assert lm.costs().budgets[0].limit_usd == 3.0


def test_a_shell_looks_where_the_service_was_moved(
    lm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the variable that wins over the service's file, whatever the default says."""
    monkeypatch.setenv("DSPY_PROD_STORE", "sqlite:////nonexistent/state.db")
    monkeypatch.setenv("DSPY_PROD__STORE", lm.pipeline.store.url)
    monkeypatch.setenv("DSPY_PROD__NAMESPACE", "n")
    assert main(["stop", "--all"]) == 0
    with pytest.raises(StoppedError):
        lm("another")


@pytest.mark.parametrize(
    "words", [("stop", "--model", "pair"), ("stop", "--program", "nosuch"), ("breaker", "open", "pair")]
)
def test_what_no_call_is_named_is_doubted(command: Callable[..., str], lm: Any, words: tuple[str, ...]) -> None:
    """It is said, and holds for calls that may come; calls of the name that was meant go on."""
    shown = command(*words)
    assert f"Nothing may come of it: no call of {words[1].strip('-').replace('open', 'model')} {words[2]!r}" in shown
    assert ("is in the ledger; known: 'openai/pair'." in shown) is (words[2] == "pair")
    assert json.loads(command(*words, "--json"))["doubt"].startswith("No call of ")
    assert lm("another") == ["ok"]


@pytest.mark.parametrize("words", [("stop", "--model", MODEL), ("breaker", "open", MODEL), ("stop", "--all")])
def test_what_is_known_is_not_doubted(command: Callable[..., str], words: tuple[str, ...]) -> None:
    assert "Nothing may come of it" not in command(*words)
    assert json.loads(command(*words, "--json"))["doubt"] == ""


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("stop", "--all", "--for", "soon"), "write 30s, 10m, 2h or 1d"),
        (("budgets", "set", "day"), "--usd LIMIT"),
        (("budgets", "set", "week", "--usd", "1"), "known: 'day'"),
        (("budgets", "list", "day"), "budgets set NAME"),
        (("status", "--limit", "-1"), "at least 0"),
    ],
)
def test_mistakes_end_with_a_remedy(command: Callable[..., str], words: tuple[str, ...], remedy: str) -> None:
    assert remedy in command(*words, code=2)
