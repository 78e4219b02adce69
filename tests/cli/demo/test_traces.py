"""The demo's traces in MLflow: when there are none, when they are lost, and when sums differ."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import dspy_prod
from dspy_prod import registry, tracking
from dspy_prod.cli.demo import traces as demo_mlflow
from dspy_prod.cli.demo import triage as demo_prompts
from dspy_prod.cli.demo.traces import Written, begin, end, invitation, table, written
from dspy_prod.cli.demo.triage import SortMessage, Triage
from dspy_prod.testing import ScriptedEngine

WRITTEN = Written("sqlite:////somewhere/mlflow.db", "1", 35, 0, 0, 35, 0.006046, 0.006046, None)


@pytest.fixture
def console() -> Console:
    """A console that keeps what was printed."""
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """Tracking is off again after each test."""
    yield
    end()


def test_without_mlflow_the_demo_says_so_and_goes_on(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the package to install."""
    monkeypatch.setattr(demo_mlflow, "find_spec", lambda name: None)
    assert begin(console, "sqlite:///mlflow.db") is False
    assert console.export_text().strip() == (
        "MLflow is not installed (pip install 'dspy-prod[mlflow]'): the demo goes on without it."
    )
    assert tracking.status() is None


def test_left_off_it_says_nothing(console: Console) -> None:
    """`--no-mlflow` is quiet."""
    assert begin(console, None) is False
    assert console.export_text() == ""
    assert tracking.status() is None


def test_an_unreachable_mlflow_does_not_hold_the_demo_up(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting has a bound, the trouble is named, and nothing is claimed about the sums."""
    monkeypatch.setattr(demo_mlflow, "PATIENCE", 5.0)
    nowhere = "http://127.0.0.1:9"
    assert begin(console, nowhere) is True
    lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine("yes"), store="memory://demo-mlflow")
    began = time.time()
    lm("hello")
    result = written(console, nowhere, lm.ledger.records(), began)
    assert time.time() - began < 60
    assert (result.exported, result.waiting, result.usd) == (0, 1, None)
    assert result.complete is False
    assert result.agrees is True
    assert "not every trace arrived" in _said(table(result))


def test_sums_that_differ_are_a_failure_unless_traces_are_missing() -> None:
    """A nano-dollar is tolerated; more is not, but only when every trace arrived."""
    assert WRITTEN.complete
    assert WRITTEN.agrees
    assert replace(WRITTEN, usd=0.006046 + 0.9e-9).agrees
    wrong = replace(WRITTEN, usd=0.006046 + 1.1e-9)
    assert not wrong.agrees
    assert "NO" in _said(table(wrong))
    for missing in ({"lost": 1}, {"waiting": 1}, {"usd": None}):
        some: dict[str, Any] = missing
        assert replace(wrong, **some).agrees
        assert not replace(wrong, **some).complete


@pytest.mark.parametrize(
    ("uri", "start", "address"),
    [
        (f"sqlite:///{Path.cwd()}/mlflow.db", "make ui", "http://127.0.0.1:5000/#/experiments/1/traces"),
        (
            "sqlite:////else/where.db",
            "mlflow ui --backend-store-uri sqlite:////else/where.db",
            "http://127.0.0.1:5000/#",
        ),
        ("http://mlflow:8080/", "Open:", "http://mlflow:8080/#/experiments/1/overview/usage"),
    ],
)
def test_it_tells_how_to_look(uri: str, start: str, address: str) -> None:
    """The command fits where the traces are, and the addresses lead to the pages."""
    said = invitation(replace(WRITTEN, uri=uri))
    assert start in said
    assert address in said
    assert "dspy_prod.status" in said


def test_the_prompts_are_published_once(
    console: Console, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions with their aliases; a second demo adds and moves nothing, and what runs is the program as ever."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{shutil.copy(schema, tmp_path / 'mlflow.db')}"
    for _ in range(2):
        program, version = demo_prompts.published(console, uri)
        assert version == "triage/2"
        assert program.sort.signature.instructions == SortMessage.instructions
        assert program.sort.demos == []
    found = registry.versions("triage", tracking_uri=uri)
    assert [(one.version, one.aliases) for one in found] == [(2, ("production",)), (1, ("previous",))]
    assert len(registry.history("triage", tracking_uri=uri)) == 2
    assert demo_prompts.DRAFT in str(registry.diff("triage", 1, 2, tracking_uri=uri))
    assert console.export_text() == ""


def test_a_program_of_the_users_own_is_left_alone(
    console: Console, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that happens to be called triage gets no version and no alias from the demo."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{shutil.copy(schema, tmp_path / 'mlflow.db')}"
    registry.publish(Triage(), "triage", message="mine", tracking_uri=uri)
    assert demo_prompts.published(console, uri)[1] is None
    assert [(one.version, one.aliases) for one in registry.versions("triage", tracking_uri=uri)] == [(1, ())]
    assert "not the demo's" in console.export_text()


def test_prompts_that_cannot_be_published_do_not_hold_the_demo_up(console: Console) -> None:
    """Without MLflow the program runs all the same, and a line says what is missing."""
    program, version = demo_prompts.published(console, "http://127.0.0.1:9")
    assert version is None
    assert program.sort.signature.instructions == SortMessage.instructions
    assert "cannot be reached" in console.export_text()


def test_it_tells_where_the_prompts_are() -> None:
    """The address of the prompt's page is named when a version ran, and only then."""
    assert "/#/experiments/1/prompts/triage" in invitation(WRITTEN, "triage/2")
    assert "version 2 ran" in invitation(WRITTEN, "triage/2")
    assert "prompts" not in invitation(WRITTEN)


def _said(shown: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()
