"""What `best.optimization` says, and that a program goes on as before with it."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import dspy
import pytest

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.candidates import Candidate
from dspy_prod.optimize.racing import Raced
from dspy_prod.optimize.report import Spent
from dspy_prod.optimize.reporting import _expected as expected_of
from dspy_prod.statistics.paired import paired
from tests.optimize.found import best_of, found, program, report


def optimized() -> dspy.Module:
    """A program with its report."""
    best = program(best_of(found()))
    best.optimization = report()
    return best


def test_a_copy_of_the_program_has_the_very_same_report() -> None:
    """`copy.deepcopy` and DSPy's own `deepcopy` copy the program and not what all candidates were."""
    best = optimized()
    assert copy.deepcopy(best).optimization is best.optimization
    assert best.deepcopy().optimization is best.optimization
    assert copy.copy(best.optimization) is best.optimization


def test_the_program_is_saved_and_loaded_without_it(tmp_path: Path) -> None:
    """State is what it was; a file of it is loaded by a fresh program."""
    best, bare = optimized(), program(best_of(found()))
    assert best.dump_state() == bare.dump_state()
    best.save(tmp_path / "best.json")
    fresh = dspy.Predict("message -> category")
    fresh.load(tmp_path / "best.json")
    assert fresh.dump_state() == best.dump_state()


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_where_a_report_is_pickled_there_is_none(dumps: Any) -> None:
    """A pickle has no candidates, and whoever reads it needs nothing of this library for that."""
    pickled = dumps({"report": report()})
    assert pickle.loads(pickled) == {"report": None}
    assert b"dspy_prod" not in pickled


def test_a_whole_program_can_be_pickled() -> None:
    """As `save(save_program=True)` does."""
    loaded = cloudpickle.loads(cloudpickle.dumps(optimized()))
    assert loaded.optimization is None
    assert loaded.dump_state() == optimized().dump_state()


def test_it_cannot_be_changed() -> None:
    """It says what was."""
    with pytest.raises(FrozenInstanceError):
        report().spent_usd = 0.0  # type: ignore[misc]


def priced(index: int, score: float, price: float | None, status: Any = "complete") -> Candidate:
    """A candidate with a score and a price."""
    return replace(found(1)[0], index=index, score=score, usd_per_answer=price, status=status)


def test_the_cheapest_is_the_cheapest_of_those_that_are_good_enough() -> None:
    """Exactly `within` below the best counts; what is not complete or has no price does not."""
    candidates = (
        priced(0, 0.5, 0.1), priced(1, 0.9, 0.9), priced(2, 0.8, 0.3), priced(3, 0.79, 0.2), priced(4, 0.89, None),
        priced(5, 0.9, 0.01, "raced"),
    )  # fmt: skip
    told = report(candidates)
    assert told.cheapest_candidate(0.0).index == 1
    assert told.cheapest_candidate(0.1).index == 2
    assert told.cheapest_candidate(within=1).index == 0
    assert told.cheapest(within=0.1).dump_state() == program(candidates[2]).dump_state()
    assert told.program(3).dump_state() == program(candidates[3]).dump_state()


@pytest.mark.parametrize("within", [-0.1, float("nan"), "much", True])
def test_an_impossible_within_is_refused(within: Any) -> None:
    """The message names it."""
    with pytest.raises(ConfigError, match="within"):
        report().cheapest(within)


def test_what_is_missing_is_said_with_the_remedy() -> None:
    """No prices, nothing complete, no such number, no programs."""
    with pytest.raises(ConfigError, match="prices"):
        report((priced(0, 0.5, None),)).cheapest()
    with pytest.raises(ConfigError, match="whole selection set"):
        report(found(1), candidates=()).cheapest()
    with pytest.raises(ConfigError, match=r"program\(99\).*0, 1"):
        report(found(2)).program(99)
    with pytest.raises(ConfigError, match="no programs"):
        report(found(1), _make=None).program(0)


def test_a_frame_has_a_row_a_candidate() -> None:
    """With what a person sorts and filters by."""
    candidates = found()
    table = report(candidates).to_frame()
    assert list(table["candidate"]) == [one.index for one in candidates]
    assert table["cost_usd"].sum() == pytest.approx(sum(one.cost_usd for one in candidates))
    assert table.loc[1, "prompts"] == candidates[1].prompts["classify"]


def test_it_is_plain_json() -> None:
    """Everything but states; what is not a number becomes null."""
    told = report(expected_score=float("nan"), test=paired([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
    read = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert read["best"] == best_of(found()).index
    assert read["expected_score"] is None
    assert read["test"]["better"] == 2
    assert read["spent_by"]["task/openai/small"]["calls"] == 700
    assert len(read["candidates"]) == len(found())
    assert "state" not in read["candidates"][0]


def test_it_reads_as_text_and_as_a_page() -> None:
    """Raw and expected score with the interval, why it ended, cap and use, test, racing, warnings."""
    told = report(test=paired([0.0] * 30 + [1.0] * 10, [1.0] * 38 + [0.0] * 2), racing=Raced(0.1, 0.0, 700, 300, 4))
    text, page = str(told), told._repr_html_()
    for words in ("0.9833", "0.9", "0.84 to 0.95", "budget", "cap $0.5", "55 % used", "flatters", "30 %", "p ="):
        assert words in text, words
        assert words in page, words
    assert "4 candidates were dropped early" in text
    assert "valset is not used by the optimizer" in text
    assert "data:image/png" in page


def test_a_forecast_stands_beside_what_it_came_to() -> None:
    """Within the range it is confirmed; of a run that did not come to its end nothing can be said."""
    forecast = SimpleNamespace(usd=0.25, usd_low=0.2, usd_high=0.3, calls=700.0)
    assert "in the range" in str(report(stopped_by="completed", forecast=forecast))
    assert "outside the range" in str(report(stopped_by="completed", spent_usd=0.4, forecast=forecast))
    assert "which this one did not" in str(report(forecast=forecast))
    phases = {"search": Spent(0.25, 500, 1), "test": Spent(0.15, 100, 1)}  # the test set is no part of a forecast
    tested = str(report(stopped_by="completed", spent_usd=0.4, phases=phases, forecast=forecast))
    assert "without the test set: 1.00 × as forecast, in the range" in tested


def test_what_was_spent_before_is_told_too() -> None:
    """The parts add up to what was spent, of which a pilot and earlier parts of a run may be a share."""
    phases = {"baseline": Spent(0.1, 60, 1), "search": Spent(0.15, 500, 1)}
    text = str(report(spent_usd=0.4, phases=phases))
    [row] = [line for line in text.splitlines() if "earlier parts" in line]
    assert "0.1500" in row
    assert "earlier parts" not in str(report(spent_usd=0.25, phases=phases))


def test_a_run_that_found_nothing_says_so() -> None:
    """Nothing complete, nothing spent."""
    empty = report(
        found(1), candidates=(), best=None, baseline=None, best_score=None, expected_score=None, spent_usd=0.0,
        expected_interval=None, stopped_by="failed", detail="the model does not answer", warnings=(),
    )  # fmt: skip
    assert "nothing was evaluated completely" in str(empty)
    assert "nothing complete" in repr(empty)
    assert "<table" in empty._repr_html_()


def test_many_long_warnings_are_bounded() -> None:
    """A page stays a page."""
    page = report(warnings=tuple(f"{number} " + "x" * 10_000 for number in range(500)))._repr_html_()
    rows = page[page.index("What to know") :]
    assert rows.count("<tr>") == 20
    assert len(rows) < 20_000
    assert "480 more" in rows


def test_what_others_wrote_cannot_write_html() -> None:
    """Origins and warnings come from optimizers and models."""
    candidates = (replace(found(1)[0], origin="<script>alert(1)</script>"),)
    page = report(candidates, warnings=("<img src=x onerror=alert(1)>",))._repr_html_()
    assert "<script" not in page
    assert "<img src=x" not in page


def test_without_matplotlib_the_page_has_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """And `plot()` names the remedy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report()._repr_html_()
    assert "<table" in page
    assert "data:image/png" not in page
    with pytest.raises(ConfigError, match=r"dspy-prod\[notebooks\]"):
        report().plot()


@pytest.mark.parametrize("tried", [(), found()[:1], found()], ids=["none", "one", "many"])
def test_columns_of_numbers_are_numbers_whatever_was_tried(tried: tuple[Candidate, ...]) -> None:
    """Also where no candidate has one: a mean over them is NaN, and not an error."""
    frame = report(found(), candidates=tried).to_frame()
    assert {str(frame[name].dtype) for name in ("score", "predicted", "usd_per_answer", "latency")} == {"float64"}
    assert {str(frame[name].dtype) for name in ("candidate", "examples", "tokens", "demos")} == {"int64"}


def test_nothing_is_expected_of_an_infinite_score() -> None:
    """And nothing fails."""
    first, second = found(1)
    wild = replace(second, scores={**second.scores, 0: float("inf")})
    assert expected_of((first, wild), first, 60) == (None, None)
    assert expected_of((first, second), first, 60)[0] is not None
