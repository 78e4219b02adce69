"""Pictures of an optimization: what is drawn, and that nobody else's figures are touched."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from dspy_prod.errors import ConfigError
from dspy_prod.optimize import figures
from dspy_prod.optimize.candidates import Candidate
from tests.optimize.found import best_of, found


def at(index: int, score: float, price: float, found_usd: float = 0.1) -> Candidate:
    """A complete candidate."""
    return Candidate(index, str(index), "", "complete", score=score, usd_per_answer=price, found_usd=found_usd)


def test_the_front_has_only_those_that_no_other_beats_at_its_price() -> None:
    """Of two at one price the better is on it; of two as good the cheaper; what is not complete is not looked at."""
    candidates = [at(0, 0.5, 1.0), at(1, 0.6, 1.0), at(2, 0.6, 2.0), at(3, 0.9, 3.0), at(4, 0.8, 4.0)]
    unpriced, raced = replace(at(5, 1.0, 1.0), usd_per_answer=None), replace(at(6, 1.0, 0.1), status="raced")
    assert [one.index for one in figures.pareto([*candidates, unpriced, raced])] == [1, 3]


def test_the_steps_rise_with_the_money_whatever_the_order_of_the_candidates() -> None:
    """A later candidate that is no better makes no step."""
    candidates = [at(0, 0.5, 1.0, 0.1), at(1, 0.7, 1.0, 0.3), at(2, 0.6, 1.0, 0.2), at(3, 0.7, 1.0, 0.4)]
    assert figures.records(candidates) == [(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]


def test_score_against_dollars_shows_candidates_baseline_and_cap() -> None:
    """Every scored candidate is a dot; the given program and the cap are lines, named with their numbers."""
    candidates = found()
    spent = sum(one.cost_usd for one in candidates)
    figure = figures.score_against_dollars(candidates, spent_usd=spent, budget_usd=spent * 1.2, baseline=0.6)
    [axes] = figure.axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "given program (0.6)" in names
    assert f"cap (${spent * 1.2:,.4g})" in names
    dots = axes.collections[0].get_offsets()
    assert len(dots) == len([one for one in candidates if one.score is not None])
    assert axes.get_xlim()[1] >= spent * 1.2


def test_a_cap_far_away_does_not_squeeze_the_rest() -> None:
    """It is named, and not drawn."""
    candidates = found()
    spent = sum(one.cost_usd for one in candidates)
    [axes] = figures.score_against_dollars(candidates, spent_usd=spent, budget_usd=spent * 50).axes
    assert axes.get_xlim()[1] < 2 * spent
    assert any("further right" in text.get_text() for text in axes.get_legend().get_texts())


def test_nothing_found_yet_can_be_drawn() -> None:
    """A run that has just begun, and one without prices, have pictures too."""
    for candidates in ((), (replace(found(1)[0], usd_per_answer=None),)):
        assert figures.png(figures.both(candidates, spent_usd=0.0, budget_usd=1.0)).startswith(b"\x89PNG")


def test_no_picture_is_left_in_pyplot() -> None:
    """A notebook's own figures and backend stay what they are."""
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), plt.get_backend()
    candidates = found()
    picture = figures.png(figures.both(candidates, spent_usd=1.0, best=best_of(candidates)))
    assert picture.startswith(b"\x89PNG")
    assert plt.get_fignums() == before
    assert plt.get_backend() == backend


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional dependency."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"dspy-prod\[notebooks\]"):
        figures.both((), spent_usd=0.0)
