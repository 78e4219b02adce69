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


SERVICE = (
    GOOD
    + """
[lm.big]
model = "openai/m"
api_base = "{url}"
api_key_env = "TEAM_KEY"
max_tokens = 200
[embedder.docs]
model = "openai/e"
api_base = "{url}"
api_key_env = "TEAM_KEY"
prices."openai/e" = {{ input = 1, output = 0 }}
[production]
name = "triage"
fallback_response = "later"
[tracking]
sample = 0.5
[logging]
format = "json"
[metrics]
port = 9464
workers = 4
[alerts]
url_env = "HOOK"
""".replace("{{", "{").replace("}}", "}")
)


def test_the_file_of_a_service_is_tried_as_a_whole(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused for its first table beside the LM's, which the guide tells everybody to write."""
    monkeypatch.setenv("HOOK", "https://hooks.example.com/team")
    began: list[str] = []
    for place in ("metrics.serving.Endpoint", "alerts.sending.Webhook", "tracking.setup.Courier"):
        monkeypatch.setattr(f"dspy_prod.{place}.__init__", lambda *_, place=place, **__: began.append(place))
    with Provider() as provider:
        code, found = checked(SERVICE.replace("{url}", provider.url))
        assert not provider.calls
    assert code == 0, found
    assert {each["of"] for each in found.values()} >= {"embedder.docs"}
    assert found["openai/e", "budget"]["outcome"] == "ok"
    tables = {f"[{name}]" for name in ("production", "tracking", "logging", "metrics", "alerts")}
    assert {route for route, what in found if what == "table"} == tables
    assert began == []


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("[production]\ndeadline = -1", "deadline"),
        ("[tracking]\nsample = 7", "sample"),
        ("[logging]\nlevel = 'LOUD'", "level"),
        ("[metrics]\nport = 99999", "port"),
        ("[alerts]\nurl_env = 'HOOK'\nevery = -1", "every"),
    ],
)
def test_a_value_in_a_table_that_cannot_be_is_told(
    table: str, told: str, checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the service tells it, when it is started."""
    monkeypatch.setenv("HOOK", "https://hooks.example.com/team")
    with Provider() as provider:
        code, found = checked(GOOD.replace("{url}", provider.url) + table)
    [finding] = [each for (_, what), each in found.items() if what == "table"]
    assert (code, finding["outcome"]) == (1, "fails")
    assert told in finding["detail"]


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
