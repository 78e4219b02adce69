"""The benchmark tells a broken bound from bad luck, and its short form works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import units
from benchmarks.experiments_measured import Row


def test_a_bound_is_broken_beyond_two_standard_errors() -> None:
    """Of false alarms always; of what must be found only where runs are few."""
    assert not Row("same", "x", {"wrong": 0.059}, 2_000, [("wrong", "<=", 0.05)]).broken()
    assert Row("same", "x", {"wrong": 0.061}, 2_000, [("wrong", "<=", 0.05)]).broken() == [
        "same, x: wrong 0.0610, not <= 0.05"
    ]
    assert Row("decisions", "x", {"promote": 0.84}, 500, [("promote", ">=", 0.85)]).broken()
    assert not Row("decisions", "x", {"promote": 0.80}, 40, [("promote", ">=", 0.85)]).broken()


def test_the_short_form_measures_and_writes(tmp_path: Path) -> None:
    """One section of it, to the end; an unknown one is refused."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.experiments", "--seed", "3", "--quick"]
    asked = [*command, "--only", "ratios", "--json", str(file)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "declared 50/50" in done.stdout
    assert json.loads(file.read_text())["violations"] == []
    refused = subprocess.run([*command, "--only", "ratio"], capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2
    assert "there is no section ratio" in refused.stderr


def test_a_look_and_a_new_unit_cost_as_much_in_a_larger_experiment() -> None:
    """Forty times the units: what grows with them would show. The bound leaves room for a busy machine."""
    found = units.measure(40_000, rounds=2, news=200, looks=5)
    assert found["unit_ratio"] < 3, found
    assert found["look_ratio"] < 3, found
