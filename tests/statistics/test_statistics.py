"""What scores are worth: the luck of the best is taken back, and two programs are compared fairly."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.expected import measured
from dspy_prod.statistics.expected import _effects, _noise, expected
from dspy_prod.statistics.paired import paired


def scored(seed: int, many: int, size: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """True means of programs, and their right and wrong answers on examples that are easy or hard for all."""
    rng = np.random.default_rng(seed)
    ability = rng.normal(0, spread / 0.16, many)

    def right(ease: np.ndarray) -> np.ndarray:
        chance: np.ndarray = 1 / (1 + np.exp(-(0.5 + ability[:, None] + ease[None, :])))
        return chance

    true = right(rng.normal(0, 1.5, 5000)).mean(axis=1)
    return true, (rng.random((many, size)) < right(rng.normal(0, 1.5, size))).astype(float)


@pytest.mark.parametrize(
    ("many", "size", "spread", "overstated"),
    [
        (16, 100, 0.02, 4.0),
        (48, 200, 0.02, 4.0),
        (16, 100, 0.12, 1.0),
        pytest.param(16, 100, 0.04, 4.0, marks=pytest.mark.slow),
        pytest.param(48, 200, 0.01, 4.0, marks=pytest.mark.slow),
    ],
)
def test_the_best_score_is_too_high_and_the_expected_one_is_right(
    many: int, size: int, spread: float, overstated: float
) -> None:
    """Within a point on average, where the raw score overstates by four and more; 95 % intervals hold the truth."""
    raw, told, held = [], [], []
    for seed in range(150):
        true, scores = scored(seed, many, size, spread)
        best = int(scores.mean(axis=1).argmax())
        estimate = expected([dict(enumerate(row)) for row in scores], size)[best]
        raw.append(100 * (scores[best].mean() - true[best]))
        told.append(100 * (estimate.mean - true[best]))
        held.append(estimate.low <= true[best] <= estimate.high)
    assert np.mean(raw) >= overstated
    assert abs(np.mean(told)) <= 1
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize(
    ("landscape", "many", "raced"),
    [
        ("near ties", 3, False), ("near ties", 16, True), ("exact ties", 16, False), ("small breakthrough", 16, False),
        pytest.param("near ties", 3, True, marks=pytest.mark.slow),
        pytest.param("near ties", 48, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_few_candidates_twins_and_dropped_ones_are_told_within_a_point(landscape: str, many: int, raced: bool) -> None:
    """On 50 examples; `benchmarks.expected` has all landscapes and sizes."""
    row = measured(landscape, many, 50, raced, 0, 120)
    assert row.overstated >= 4
    assert abs(row.off) <= 1
    assert row.held >= 0.9


def test_twins_are_told_alike_and_nobody_overtakes_who_scored_more() -> None:
    """One seen whole and one that a race dropped answer alike on what both were asked: they are one program."""
    rng = np.random.default_rng(4)
    rows = [dict(enumerate((rng.random(80) < 0.6).astype(float))) for _ in range(6)]
    half = {place: score for place, score in rows[0].items() if place < 40}
    found = expected([*rows, rows[0], half], 80)
    assert found[6] == found[7] == found[0]
    assert found[:6] == expected(rows, 80)
    order = np.argsort([-sum(row.values()) for row in rows], kind="stable")
    told = [found[place].mean for place in order]
    assert told == sorted(told, reverse=True)


def test_programs_that_do_differ_stay_apart() -> None:
    """Many examples, little noise: nothing is taken back; the order is kept."""
    scores = np.zeros((3, 2000))
    for row, right in zip(scores, (400, 1000, 1800), strict=True):
        row[:right] = 1
    found = expected([dict(enumerate(np.random.default_rng(0).permutation(row))) for row in scores], 2000)
    assert [each.mean for each in found] == pytest.approx([0.2, 0.5, 0.9], abs=0.015)


def test_one_that_was_seen_on_few_examples_is_believed_less() -> None:
    """Its luck is drawn further to the others; the interval is wider."""
    _, scores = scored(5, 8, 200, 0.02)
    rows = [dict(enumerate(row)) for row in scores]
    easy = [place for place in range(200) if scores[:, place].mean() == 1][:10]
    assert len(easy) == 10
    *_, few = expected([*rows, dict.fromkeys(easy, 1.0)], 200)
    whole = expected(rows, 200)
    assert few.mean < np.mean([each.mean for each in whole]) + 0.1
    assert few.high - few.low > max(each.high - each.low for each in whole)


def test_the_noise_is_not_told_smaller_for_examples_that_few_were_asked() -> None:
    """As a race leaves them: two candidates seen whole, four on a sixth; the noise has a variance of one."""
    rng, found = np.random.default_rng(7), []
    for _ in range(200):
        scores = rng.choice([-1.0, 1.0], (6, 60)) + rng.normal(0, 0.1, 60) + rng.normal(0, 0.1, (6, 1))
        for row in scores[2:]:
            row[rng.permutation(60)[10:]] = np.nan
        _, _, residuals = _effects(scores)
        noise, own = _noise(scores, residuals, (~np.isnan(scores)).sum(axis=1))
        found.append((noise, *own))
    assert np.mean(found, axis=0) == pytest.approx(np.ones(7), abs=0.1)


def test_examples_that_are_hard_count_as_hard() -> None:
    """Who was only asked the easy half is not the better one for it."""
    size = 100
    row = [1.0] * 50 + [0.0] * 50
    rng = np.random.default_rng(1)
    others = [dict(enumerate(np.where(rng.random(size) < 0.1, 1 - np.array(row), row))) for _ in range(6)]
    *_, half = expected([*others, {place: others[0][place] for place in range(50)}], size)
    assert 0.35 < half.mean < 0.65


def test_little_is_known_of_few() -> None:
    """One candidate is taken as it is; one without scores is one of the others; alike ones are alike."""
    [only] = expected([{0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}], 4)
    assert only.mean == 0.75
    assert only.low < 0.5
    none, first, _ = expected([{}, {0: 1.0, 1: 0.0}, {0: 0.0, 1: 0.0}], 2)
    assert math.isfinite(none.mean)
    assert none.high - none.low >= first.high - first.low
    same = expected([{0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}], 2)
    assert [each.mean for each in same] == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="no scores"):
        expected([{}, {}], 3)
    with pytest.raises(ValueError, match="place 3"):
        expected([{3: 1.0}], 3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.integers(0, 5), st.floats(-5, 5), max_size=6), min_size=1, max_size=6),
)
def test_whatever_the_scores_the_estimates_are_numbers(rows: list[dict[int, float]]) -> None:
    """And lie within their intervals."""
    if not any(rows):
        return
    for each in expected(rows, 6):
        assert all(map(math.isfinite, (each.low, each.mean, each.high)))
        assert each.low <= each.mean <= each.high


# -- two programs ----------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_signs(pairs: list[tuple[int, int]]) -> None:
    """Ties among them, in any range of scores."""
    given, best = [a / 10 for a, _ in pairs], [b / 10 for _, b in pairs]
    differences = [b - a for a, b in pairs]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=len(pairs))
    ]
    result = paired(given, best)
    assert result.p_value == pytest.approx(sum(abs(each) >= abs(sum(differences)) for each in sums) / len(sums))
    assert result.p_value == paired([10 * score for score in given], [10 * score for score in best]).p_value
    assert result.low <= result.difference <= result.high
    assert (result.better, result.worse) == (sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def test_many_unequal_differences_are_sampled_and_always_alike() -> None:
    """Close to the exact test's value, which all signs would give."""
    rng = np.random.default_rng(2)
    given = rng.random(40)
    best = given + rng.normal(0.02, 0.1, 40)
    result = paired(list(given), list(best))
    z = (best - given).sum() / math.sqrt(((best - given) ** 2).sum())
    assert result.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)
    assert result == paired(list(given), list(best))
    assert paired(list(given), list(given + rng.random(40))).p_value < 0.001


@pytest.mark.parametrize("size", [8, 30, 100])
@pytest.mark.parametrize(("better", "worse"), [(0.05, 0.05), (0.3, 0.1), (0.6, 0.0)])
def test_the_interval_holds_the_true_difference(size: int, better: float, worse: float) -> None:
    """19 times in 20, and equal programs are told apart one time in 20 at most."""
    held, told = 0, 0
    for seed in range(400):
        luck = np.random.default_rng(seed).random(size)
        best = np.where(luck < better, 1.0, 0.0)
        given = np.where((luck >= better) & (luck < better + worse), 1.0, 0.0)
        result = paired(list(given), list(best))
        held += result.low <= better - worse <= result.high
        told += result.p_value <= 0.05
    assert held >= 0.92 * 400
    if better == worse:
        assert told <= 0.07 * 400


def test_equal_programs_are_not_certainly_equal() -> None:
    """No difference was seen, so none is likely; but few examples exclude little."""
    result = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (result.difference, result.p_value, result.better, result.worse) == (0.0, 1.0, 0, 0)
    assert result.low < -0.5
    assert result.high > 0.5


@pytest.mark.parametrize(
    ("given", "best", "problem"),
    [([], [], "no scores"), ([1.0], [1.0, 0.0], "given has 1"), ([1.0], [math.nan], "finite")],
)
def test_what_cannot_be_compared_is_named(given: list[float], best: list[float], problem: str) -> None:
    """With the field that is wrong."""
    with pytest.raises(ValueError, match=problem):
        paired(given, best)


def test_a_comparison_reads_as_a_sentence() -> None:
    assert str(paired([0.0, 1.0, 0.0] * 8, [1.0, 1.0, 0.0] * 8)).startswith(
        "0.6667, given program 0.3333: +0.3333 (95 %: +0.1007 to +0.5147), 24 examples, 8 better, 0 worse, p = 0.00"
    )
