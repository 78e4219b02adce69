"""The benchmark beside the peers runs, and what it says of ours is what is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import steps
from benchmarks.peers.subjects import OURS


def test_the_steps_of_a_call_add_up_to_it() -> None:
    """Of both subjects; most of a bare call is DSPy's, and none of it is ours."""
    found = steps.measure(seconds=0.1, count=50)
    for name, each in found["steps"].items():
        assert sum(each.values()) == pytest.approx(found["us"][name], rel=1e-6)
    assert found["added_us"] == found["us"]["ours"] - found["us"]["dspy.LM"]
    assert set(found["steps"]["dspy.LM"]) <= {steps.BESIDE, steps.AROUND}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_short_form_measures_shows_and_draws(tmp_path: Path) -> None:
    """All parts of it, to the end."""
    file, folder = tmp_path / "figures.json", tmp_path / "pictures"
    asked = ["--quick", "--json", str(file), "--plots", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *asked], capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stderr
    assert "provider_budget_config" in done.stdout
    assert len(list(folder.iterdir())) == 4
    figures = json.loads(file.read_text())
    rows = [row for row in figures["behaviour"] if row["subject"] in OURS]
    assert all(row["usd"] <= 1.0 for row in rows if "usd" in row)
    assert [row["seen"] for row in rows if "seen" in row] == [1, 1, 1]
    assert all(row["recorded"] >= row["billed"] for row in rows if "recorded" in row)
    assert set(OURS) < set(figures["cpu"]["task"])
    assert figures["machine"]["versions"]["litellm"]
