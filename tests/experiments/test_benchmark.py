"""The benchmark tells a broken bound from bad luck, and its short form works."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import assignment, experiments, experiments_harm, tracking, units
from benchmarks.experiments_measured import Row, within
from dspy_prod.experiments.alphas import Alphas


def test_a_bound_is_broken_beyond_two_standard_errors() -> None:
    """Of false alarms always; of what must be found only where runs are few."""
    assert not Row("same", "x", {"wrong": 0.059}, 2_000, [("wrong", "<=", 0.05)]).broken()
    assert Row("same", "x", {"wrong": 0.061}, 2_000, [("wrong", "<=", 0.05)]).broken() == [
        "same, x: wrong 0.0610, not <= 0.05"
    ]
    assert Row("decisions", "x", {"promote": 0.84}, 500, [("promote", ">=", 0.85)]).broken()
    assert not Row("decisions", "x", {"promote": 0.80}, 40, [("promote", ">=", 0.85)]).broken()


def test_numbers_of_users_have_no_luck_to_excuse_them_and_what_was_never_found_breaks_a_bound() -> None:
    """A bound above 1 is no share. No figure at all keeps no bound."""
    most = [("most", "<=", 6.0)]
    assert not Row("canary", "x", {"most": 6.0}, 300, most).broken()
    assert Row("canary", "x", {"most": 7.0}, 300, most).broken() == ["canary, x: most 7, not <= 6"]
    for never in (math.inf, math.nan):
        assert Row("power", "x", {"median n": never}, 300, [("median n", "<=", 2_000)]).broken()
    assert Row("power", "x", {"by 4k": math.nan}, 300, [("by 4k", ">=", 0.9)]).broken()


def test_a_stated_share_is_met_within_two_standard_errors() -> None:
    assert within(0.9, 100) == pytest.approx(0.84)
    assert within(1.0, 100) == 1.0


@pytest.mark.parametrize(
    ("sections", "said"),
    [("ratios,shadow,variants", "declared 50/50"), ("traps,same", "unhappy users"), ("canary,power", "fails always")],
)
def test_the_short_form_measures_and_writes(tmp_path: Path, sections: str, said: str) -> None:
    """It goes to the end, and keeps its bounds."""
    file = tmp_path / "figures.json"
    done = _asked("--only", sections, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    told = json.loads(file.read_text())
    assert told["violations"] == []
    assert {row["section"] for row in told["rows"]} == set(sections.split(","))
    bounds = [bound for row in told["rows"] for bound in row["bounds"]]
    assert len(bounds) >= 5


def test_a_section_that_there_is_not_is_refused() -> None:
    refused = _asked("--only", "ratio")
    assert refused.returncode == 2
    assert "there is no section ratio" in refused.stderr


def _asked(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.experiments", "--seed", "3", "--quick", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_a_candidate_that_always_fails_and_hurts_too_many_ends_the_benchmark_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of a broken bound: here nobody is ever rolled back."""
    monkeypatch.setattr(experiments_harm, "alphas", lambda *_: Alphas(1e-90, 1e-90, 1e-90, 1e-90))
    monkeypatch.setattr(experiments_harm, "HARMS", {"fails always": experiments_harm.HARMS["fails always"]})
    monkeypatch.setattr(sys, "argv", ["experiments", "--quick", "--only", "canary"])
    assert experiments.main() == 1
    assert "canary, fails always: most" in capsys.readouterr().err


def test_a_look_and_a_new_unit_cost_as_much_in_a_larger_experiment() -> None:
    """Forty times the units: what grows with them would show. The bound leaves room for a busy machine."""
    found = units.measure(40_000, rounds=2, news=200, looks=5)
    assert found["unit_ratio"] < 3, found
    assert found["look_ratio"] < 3, found
    assert found["one_ratio"] < 3, found


def test_a_missed_bar_is_told_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what a call waits for, and of a look, whether it has news or not."""
    cost = {"memory: known unit, us": 5.0, "memory: first exposure, us of its caller": 15.1}
    monkeypatch.setattr(assignment, "measure", lambda units: {"a request": cost})
    monkeypatch.setattr(sys, "argv", ["assignment"])
    assert assignment.main() == 1
    assert "first exposure, us of its caller: 15.1, not <= 15" in capsys.readouterr().err
    cost.clear()
    assert assignment.main() == 0

    looks = {"units": 1_000_000, "look_us": 999.0, "one_us": 1_001.0}
    monkeypatch.setattr(units, "measure", lambda units: looks)
    assert units.main() == 1
    assert capsys.readouterr().err == (
        "VIOLATION: a look with one new unit at 1,000,000 units: 1,001 us, not <= 1,000\n"
    )
    looks["one_us"] = 1_000.0
    assert units.main() == 0


def test_the_bars_are_of_figures_that_there_are() -> None:
    """A renamed figure would have no bar."""
    found = [*assignment.requests(rounds=2, count=20), *assignment.reads(2_000, "memory")]
    assert all(any(name.endswith(bar) for name in found) for bar in assignment.BARS)


def test_calls_that_wait_for_mlflow_are_told() -> None:
    away = {"gone_median_ratio": 1.0, "mute_median_ratio": 1.2, "there_median_ratio": 1.3}
    assert tracking.missed(away) == [
        "an experiment's call while MLflow is mute: 1.200 x tracking off, not <= 1.05",
    ]
