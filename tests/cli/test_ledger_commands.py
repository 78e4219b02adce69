"""`dspy-prod costs` and `calls` find in the ledger what MLflow shows, and the other way round."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.cli import main
from dspy_prod.records import CallRecord
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.programs import ProgramCall
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import ScriptedEngine

TRACE = "0123456789abcdef0123456789abcdef"
ROWS: list[dict[str, Any]] = [
    {
        "user": "ada",
        "tenant": "acme",
        "program": "triage",
        "experiment": "e1",
        "variant": "cot",
        "prompt_version": "triage/7",
    },
    {"user": "bob", "tenant": "acme", "program": "triage", "variant": "plain", "prompt_version": "triage/6"},
    {"user": "[/dim]", "program": "other", "prompt_version": "other/1", "tags": (("feature", "a[b]"),)},
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with 25 calls of one trace and one call of each other kind."""
    store = SqliteStore(str(tmp_path / "state.db"), "cli")
    shared = {"route": "primary", "attempt": 1, "outcome": "ok", "started_at": time.time(), "cost_nano": 1_000_000}
    for number in range(25):
        traced = {"model": "openai/m", "user": "ada", "trace_id": f"tr-{TRACE}", "prompt_version": "triage/7"}
        store.append(CallRecord(id=f"t{number}", call_id="c", **shared, **traced))
    for number, row in enumerate(ROWS):
        store.append(CallRecord(id=f"r{number}", call_id="d", model="other/m", **shared, **row))
    store.close()
    return f"sqlite:///{tmp_path}/state.db"


Said = Callable[..., Any]


@pytest.fixture
def said(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What a command prints: JSON as values, else text."""
    monkeypatch.setenv("COLUMNS", "100")

    def said(*arguments: str) -> Any:
        assert main([*arguments, "--store", url, "--namespace", "cli"]) == 0
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return said


@pytest.mark.parametrize(
    ("by", "values"),
    [
        ("model", {"openai/m": 25, "other/m": 3}),
        ("user", {"ada": 26, "bob": 1, "[/dim]": 1}),
        ("tenant", {"acme": 2}),
        ("experiment", {"e1": 1}),
        ("variant", {"e1/cot": 1, "plain": 1}),
        ("prompt", {"triage/7": 26, "triage/6": 1, "other/1": 1}),
        ("program", {"triage": 2, "other": 1}),
        ("tag:feature", {"a[b]": 1}),
    ],
)
def test_costs_by_every_dimension(said: Said, by: str, values: dict[str, int]) -> None:
    """One row for each value, for programs and for people, whatever characters it has."""
    rows = said("costs", "--by", by, "--json")
    assert {row["value"]: row["attempts"] for row in rows} == values
    assert {row["value"]: row["usd"] for row in rows} == pytest.approx(
        {value: count / 1000 for value, count in values.items()}
    )
    table = said("costs", "--by", by)
    for value in values:
        assert value in table


@pytest.mark.parametrize("by", ["prompts", "experiments", "tag:", "colour"])
def test_an_unknown_dimension_is_refused_by_name(url: str, capsys: pytest.CaptureFixture[str], by: str) -> None:
    """The message lists what there is."""
    assert main(["costs", "--store", url, "--by", by]) == 2
    message = capsys.readouterr().err
    for word in (by, "day", "model", "user", "tenant", "program", "experiment", "variant", "prompt", "tag:<key>"):
        assert word in message


def test_how_programs_ended(said: Said, url: str) -> None:
    """By any dimension, for programs and for people."""
    assert "No calls of programs" in said("programs")
    store = open_store(url, "cli")
    for number, (status, reason) in enumerate([("ok", None), ("fallback", "parse_error"), ("error", "upstream_error")]):
        told = {"experiment": "e1", "variant": "control", "status": status, "reason": reason}
        store.programs.append(ProgramCall(f"p{number}", time.time(), "triage", **told))  # type: ignore[arg-type]
    [row] = said("programs", "--by", "variant", "--since", "7d", "--json")
    assert (row["value"], row["calls"], row["ok"], row["fallback"], row["error"]) == ("e1/control", 3, 1, 1, 1)
    assert row["reasons"] == {"parse_error": 1, "upstream_error": 1}
    table = said("programs")
    for word in ("triage", "33.3", "parse_error"):
        assert word in table
    assert main(["programs", "--store", url, "--by", "colour"]) == 2


@pytest.mark.parametrize("trace", [f"tr-{TRACE}", TRACE, TRACE.upper()])
def test_the_calls_of_a_trace_are_found_by_its_id(said: Said, trace: str) -> None:
    """All of them, in MLflow's spelling or in OpenTelemetry's."""
    records = said("calls", "--trace", trace, "--json")
    assert {record["id"] for record in records} == {f"t{number}" for number in range(25)}
    assert {record["trace_id"] for record in records} == {f"tr-{TRACE}"}
    assert len(said("calls", "--trace", trace, "--limit", "3", "--json")) == 3


def test_the_calls_of_a_program_version_are_found(said: Said) -> None:
    """Together with other filters, too."""
    assert [record["id"] for record in said("calls", "--prompt", "triage/6", "--json")] == ["r1"]
    assert [record["id"] for record in said("calls", "--prompt", "triage/7", "--variant", "cot", "--json")] == ["r0"]
    assert [record["id"] for record in said("calls", "--program", "other", "--json")] == ["r2"]
    assert [record["id"] for record in said("calls", "--experiment", "e1", "--json")] == ["r0"]
    assert len(said("calls", "--json")) == 20
    assert "No calls that match" in said("calls", "--prompt", "triage/99")


def test_calls_show_by_what_they_are_found(said: Said) -> None:
    """Id, program version and trace stand whole in the table, and every field in JSON."""
    table = said("calls", "--limit", "100")
    for words in (f"tr-{TRACE}", "prompt triage/7", "prompt other/1", "[/dim]"):
        assert words in table
    (record,) = said("calls", "--prompt", "triage/6", "--json")
    assert set(CallRecord._fields) <= set(record)
    assert (record["trace_id"], record["prompt_version"], record["cost_usd"]) == (None, "triage/6", 0.001)


def test_the_ledger_finds_what_a_version_did(tmp_path: Path) -> None:
    """In Python as on the command line."""
    lm = dspy_prod.LM("any/model", engine=ScriptedEngine("a"), store=f"sqlite:///{tmp_path}/s.db", cache=False)
    for version in ("triage/6", "triage/7", "triage/7"):
        with dspy_prod.call_context(prompt_version=version):
            lm("q")
    assert len(lm.ledger.records(prompt_version="triage/7")) == 2
    assert lm.ledger.records(prompt_version="triage/8") == []
    lm.close()


STEERING = "eve\x1b[31m\x00\x9b2J\u202ebob\ud800\u2066"


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_what_would_steer_a_screen_is_shown_for_what_it_is(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A user, a tag or an error could clear the operator's terminal, or write a line of its own into the list."""
    monkeypatch.setenv("COLUMNS", "300")
    store = SqliteStore(url.removeprefix("sqlite:///"), "cli")
    store.append(
        CallRecord(
            id="odd", call_id="odd", model="m", route="primary", attempt=1, outcome="error", cost_nano=0, user=STEERING,
            started_at=time.time() + 1, error=STEERING, program=STEERING, tags=((STEERING, STEERING),),
        )
    )  # fmt: skip
    store.close()
    for command in (("calls", "--limit", "1"), ("costs", "--by", "user"), ("costs", "--by", f"tag:{STEERING}")):
        assert main([*command, *arguments, "--store", url, "--namespace", "cli"]) == 0
        text = capsys.readouterr().out
        assert "eve" in text
        assert not {"\x1b", "\x00", "\x9b", "\u202e", "\ud800", "\u2066"} & set(text)
        if arguments:
            json.loads(text)
        else:
            assert r"eve\x1b[31m\x00\x9b2J\u202ebob\ud800\u2066" in text


def test_a_user_called_other_is_listed_in_quotes(url: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table had two rows `(other)`, or one for both: that user, and all that a store no longer tells apart."""
    store = SqliteStore(url.removeprefix("sqlite:///"), "cli")
    store.append(
        CallRecord(
            id="o", call_id="o", model="m", route="primary", attempt=1, outcome="ok", cost_nano=1, user="(other)",
            started_at=time.time(),
        )
    )  # fmt: skip
    store.close()
    assert "'(other)'" in said("costs", "--by", "user")
    assert [row["rest"] for row in said("costs", "--by", "user", "--json") if row["value"] == "(other)"] == [False]
