"""The command line: the demo on the simulated provider, and the reports on what it left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspy_prod.cli import main


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store's URL, filled by one run of the demo."""
    return f"sqlite:///{tmp_path_factory.mktemp('cli') / 'state.db'}"


@pytest.fixture(scope="module")
def demo(store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What `dspy-prod demo --simulate --json` prints, run where nothing is yet."""
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-m", "dspy_prod.cli", "demo", "--simulate", "--json"],
        cwd=tmp_path_factory.mktemp("demo"),
        env={
            "PATH": "",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DSPY_PROD_STORE": store,
            "HOME": "/nonexistent",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, object] = json.loads(run.stdout)
    return result


def test_the_demo_tells_its_story(demo: dict[str, object]) -> None:
    """Load, repeats, outage, recovery and an empty budget all happen, and the ledger is the bill."""
    requests = demo["requests"]
    assert isinstance(requests, dict)
    assert requests["total"] == 35
    assert requests["cached"] == 5
    assert requests["by fallback model"] == 6
    assert demo["fallbacks"].keys() == {"upstream_error", "budget_exceeded"}  # type: ignore[attr-defined]
    assert demo["agrees"] is True
    assert demo["ledger_usd"] == demo["bill_usd"]
    assert demo["breaker"][0].endswith(": opened")  # type: ignore[index]
    assert demo["breaker"][-1].endswith(": closed")  # type: ignore[index]
    assert demo["health"]["status"] == "healthy"  # type: ignore[index]


def test_the_demo_is_in_mlflow_to_the_last_cent(demo: dict[str, object]) -> None:
    """Every request is a trace in `mlflow.db` where the demo ran, and their costs are the ledger's."""
    mlflow = demo["mlflow"]
    assert isinstance(mlflow, dict)
    assert mlflow["uri"].endswith("/mlflow.db")
    assert (mlflow["exported"], mlflow["found"], mlflow["waiting"], mlflow["lost"]) == (35, 35, 0, 0)
    assert mlflow["usd"] == pytest.approx(demo["ledger_usd"], abs=1e-12)
    assert mlflow["complete"] is True
    assert mlflow["agrees"] is True


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("by", ["day", "model", "user", "tenant", "program", "tag:act"])
def test_costs_by_a_dimension_add_up(store: str, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every dimension sums to the same amount, since every call of the demo has a value in each."""
    assert main(["costs", "--store", store, "--namespace", "demo", "--by", by, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main(["costs", "--store", store, "--namespace", "demo", "--json"]) == 0
    today = json.loads(capsys.readouterr().out)["today_usd"]
    assert sum(row["usd"] for row in rows) == pytest.approx(today, abs=1e-12)


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("command", [["health"], ["costs"], ["costs", "--by", "user"], ["calls", "--limit", "5"]])
def test_reports_print_tables(store: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each report has a table for people."""
    assert main([*command, "--store", store, "--namespace", "demo"]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.usefixtures("demo")
def test_calls_are_filtered_newest_first(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`calls` shows what was asked for."""
    assert main(["calls", "--store", store, "--namespace", "demo", "--outcome", "cached", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 5
    assert all(record["cached"] for record in records)
    assert [r["started_at"] for r in records] == sorted((r["started_at"] for r in records), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["costs", "--by", "nonsense"], "use one of"),
        (["calls", "--limit", "0"], "at least 1"),
        (["demo", "--tracking-uri", "./mlruns"], "no longer to a folder"),
        (["health", "--store", "sqlite:///missing.db"], "no store at"),
        (["health", "--store", "memory://"], "sqlite:///"),
        (["health", "--store", "redis://:secret@127.0.0.1:1/0"], "check that the server runs"),
    ],
)
@pytest.mark.usefixtures("demo")
def test_mistakes_end_with_a_remedy(
    store: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong argument prints one line that names the remedy, no traceback and no password, and exits with 2."""
    if "--store" not in arguments and arguments[0] != "demo":
        arguments = [*arguments, "--store", store]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "secret" not in said
