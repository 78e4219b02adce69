"""`dspy-prod prompts`, `promote` and `rollback`."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import dspy
import pytest

from dspy_prod import registry
from dspy_prod.cli import main
from tests.registry.aliases.test_promotion import publish
from tests.registry.programs import qa


def test_versions_promotion_and_rollback(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands print for people, and the moves are made."""
    publish(2)
    assert main(["promote", "it", "1", "--reason", "first [one]", "--tracking-uri", store]) == 0
    assert main(["promote", "it", "2", "--expected", "1"]) == 0
    assert main(["promote", "it", "2"]) == 0
    assert main(["promote", "it", "it@production", "--alias", "canary"]) == 0
    assert main(["rollback", "it", "--reason", "it lies"]) == 0
    said = capsys.readouterr().out
    assert "production: nothing -> 1 (promote)" in said
    assert "first [one]" in said
    assert "is 2 already, nothing to do" in said
    assert "production: 2 -> 1 (rollback)" in said
    assert main(["prompts"]) == 0
    assert main(["prompts", "it"]) == 0
    assert main(["prompts", "it", "--history"]) == 0
    shown = capsys.readouterr().out
    assert "canary" in shown
    assert "accuracy 0.1" in shown
    assert "rollback" in shown


def test_json_for_programs(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed can be parsed."""

    def said(*arguments: str) -> object:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    publish(1)
    moved = said("promote", "it", "1")
    assert isinstance(moved, dict)
    assert (moved["to_version"], moved["outcome"]) == (1, "applied")
    (version,) = said("prompts", "it")  # type: ignore[misc]
    assert (version["name"], version["version"], version["aliases"]) == ("it", 1, ["production"])
    assert version["metrics"] == {"accuracy": 0.0}
    assert said("prompts") == [version]
    (entry,) = said("prompts", "it", "--history")  # type: ignore[misc]
    assert entry["id"] == moved["id"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompts", "nobody"], "publish it first"),
        (["prompts", "--history"], "needs the name"),
        (["promote", "it", "7"], "not found"),
        (["promote", "it", "1", "--expected", "3"], "was expected to have version 3"),
        (["promote", "it", "x"], "name@production"),
        (["rollback", "it"], "nothing to roll back"),
        (["prompts", "--tracking-uri", "./mlruns"], "sqlite:///"),
        (["prompts", "--tracking-uri", "http://127.0.0.1:9"], "cannot be reached"),
    ],
)
def test_errors_name_the_remedy(
    store: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """One line on standard error, and exit code 2."""
    publish(1)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dspy-prod {arguments[0]}: ")
    assert words in said


def test_an_empty_store_says_so(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No table without rows."""
    assert main(["prompts"]) == 0
    assert "Nothing is published" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_what_people_write_is_shown_as_it_is(store: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons and messages became emojis or markup, and one that cp1252 lacks ended the command."""
    odd = "[x] [/dim] :bug: 日本 ∑ \U0001f600"
    shown_as = odd.encode(encoding, "backslashreplace").decode(encoding)
    monkeypatch.delenv("COLUMNS", raising=False)
    shutil.copy(Path(__file__).with_name("evaluation.py"), "evals.py")
    Path("case.json").write_text(json.dumps({"metrics": {"score": 0.9}}))
    for number in range(2):
        registry.publish(dspy.Predict(f"q{number} -> a"), "it", message=odd)
    registry.publish(qa(), "other", message=odd)
    for command in (
        ["promote", "it", "1", "--reason", odd], ["promote", "it", "2", "--reason", odd],
        ["rollback", "it", "--reason", odd], ["prompts"], ["prompts", "it"], ["prompts", "it", "--history"],
        ["deploy", "other", "--candidate", "1", "--eval", "evals.py", "--reason", odd],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            said = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", said)
                assert main([*command, *more]) == 0
            text = said.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
            found = json.loads(text) if more else text
            assert (odd if more else shown_as) in (str(found) if more else found), command
