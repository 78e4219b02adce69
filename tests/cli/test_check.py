"""`dspy-prod check`: what would fail is told before anybody pays for finding out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.cli import main
from dspy_prod.testing import Provider

Checked = Callable[..., tuple[int, dict[tuple[str, str], dict[str, Any]]]]


@pytest.fixture
def checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Checked:
    """The exit code and the findings by (route, what), of a file with this text."""
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GROQ_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEAM_KEY", "sk-team-secret")

    def checked(text: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
        path = tmp_path / "prod.toml"
        path.write_text(f'store = "sqlite:///{tmp_path}/state.db"\nnamespace = "check"\n{text}', encoding="utf-8")
        code = main(["check", str(path), "--json"])
        out = capsys.readouterr().out
        assert "sk-team" not in out
        return code, {(each["route"], each["what"]): each for each in json.loads(out)}

    return checked


GOOD = """
model = "openai/m"
api_base = "{url}"
api_key_env = "TEAM_KEY"
max_tokens = 100
[prices."openai/m"]
input = 1
output = 10
[[budget]]
usd = 1
per = "day"
"""


def test_a_configuration_that_would_work(checked: Checked) -> None:
    """Nothing is generated, and the table says what was looked at."""
    with Provider() as provider:
        code, found = checked(GOOD.replace("{url}", provider.url))
        outcomes = {what: each["outcome"] for (_, what), each in found.items()}
        assert outcomes.pop("address") in ("ok", "unsure")
        assert outcomes == dict.fromkeys(("key", "price", "budget", "store"), "ok")
        assert code == 0
        assert not provider.calls


def test_each_thing_that_would_fail_is_named(checked: Checked) -> None:
    """A missing key, an unknown price under a budget, a bound above the budget, a dead address."""
    code, found = checked(
        'model = "openai/unknown-model"\napi_base = "http://127.0.0.1:9/v1"\n'
        'fallbacks = ["anthropic/claude-haiku-4-5"]\n'
        'api_key_env = "TEAM_KEY"\nmax_tokens = 1000\n[limit]\ntpm = 500\n[budget]\nusd = 0.0001\n'
    )
    assert code == 1
    primary, fallback = "openai/unknown-model", "anthropic/claude-haiku-4-5"
    assert found[primary, "price"]["outcome"] == "fails"
    assert found[primary, "address"]["outcome"] == "fails"
    assert "tpm=500" in found[primary, "limit"]["detail"]
    assert found[fallback, "key"]["outcome"] == "fails"
    assert "ANTHROPIC_API_KEY" in found[fallback, "key"]["detail"]
    assert found[fallback, "address"]["outcome"] == "not tried"
    assert "every such call is refused" in found[fallback, "budget"]["detail"]


def test_a_file_that_cannot_be_used_fails(checked: Checked) -> None:
    code, found = checked('model = "openai/m"\nmax_token = 5\n')
    assert code == 1
    ((_, what),) = found
    assert what == "configuration"


def test_a_look_changes_no_budget_in_force(checked: Checked, tmp_path: Path) -> None:
    """Somebody tries a new file beside a running service."""
    from dspy_prod.options import Budget
    from dspy_prod.stores.sqlite.store import SqliteStore

    running = SqliteStore(str(tmp_path / "state.db"), "check")
    running.declare(Budget(usd=5, per="day"))
    with Provider() as provider:
        checked(GOOD.replace("{url}", provider.url))
    assert [terms.in_force.usd for terms in running.terms()] == [5]
    running.close()


def test_the_table_is_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    path = tmp_path / "prod.toml"
    path.write_text('model = "openai/m"\nmodell = "x"\n', encoding="utf-8")
    assert main(["check", str(path)]) == 1
    assert "did you mean" in capsys.readouterr().out.replace("\n", " ")
