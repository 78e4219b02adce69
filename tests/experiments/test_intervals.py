"""The interval that people look at is the one that GrowthBook shows; drift in a ramp does not move it."""

from __future__ import annotations

import random

import pytest

from dspy_prod.experiments.intervals import SHOWN_FROM, Sums, interval, mixture


def sums(count: int, total: float, squares: float) -> Sums:
    return Sums.restored([count, 0.0, total, squares])


@pytest.mark.parametrize(
    ("control", "candidate", "relative", "expected"),
    [
        ((1000, 764, 764), (1000, 814, 814), False, (0.05, -0.006892928, 0.106892928, 0.11634902)),
        ((4000, 3200, 3200), (4100, 3444, 3444), True, (0.05, 0.016592601, 0.083407399, 0.000238672)),
        ((3000, 300, 66), (2900, 319, 78), True, (0.1, 0.004243831, 0.195756169, 0.03428369)),
        ((3000, 300, 66), (2900, 319, 78), False, (0.01, 0.000837818, 0.019162182, 0.022544441)),
    ],
)
def test_as_gbstats_has_it(
    control: tuple[int, float, float],
    candidate: tuple[int, float, float],
    relative: bool,
    expected: tuple[float, float, float, float],
) -> None:
    """`SequentialTwoSidedTTest` of gbstats 0.8.0, N* = 5000. Its proportions have no n - 1, hence five digits there."""
    found = interval([(sums(*control), sums(*candidate))], relative=relative)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.p_value is not None
    digits = 2e-8 if control[1] == 300 else 3e-4
    assert (found.difference, found.low, found.high) == pytest.approx(expected[:3], abs=digits * 0.1)
    assert found.p_value == pytest.approx(expected[3], rel=digits * 10)


def test_it_is_shown_from_a_hundred_units_of_each_on() -> None:
    """Before that there is an estimate without bounds; before two units of each there is nothing."""
    few = interval([(sums(SHOWN_FROM - 1, 50, 50), sums(500, 250, 250))])
    assert few is not None
    assert few.low is few.high is few.p_value is None
    assert few.difference == pytest.approx(0.5 - 50 / 99)
    assert interval([(sums(1, 1, 1), sums(500, 250, 250))]) is None
    assert interval([]) is None
    assert interval([(sums(200, 0, 0), sums(200, 10, 10))], relative=True) is None


def test_stages_are_put_together_by_their_differences() -> None:
    """Everybody's outcomes fell during the ramp, when most candidates' units came: the arms are equal all the same."""
    early, late = (sums(1980, 1782, 1782), sums(20, 18, 18)), (sums(1000, 500, 500), sums(1000, 500, 500))
    found = interval([early, late])
    assert found is not None
    assert found.difference == pytest.approx(0, abs=1e-12)
    assert 518 / 1020 - 2282 / 2980 < -0.2


def test_sums_keep_their_digits_far_from_zero() -> None:
    """A variance of 1 around a million is not lost in squares of a million."""
    draw, far = random.Random(1), Sums()
    values = [1e6 + draw.gauss(0, 1) for _ in range(2000)]
    for value in values:
        far.see(value)
    centre = sum(values) / len(values)
    assert far.mean == pytest.approx(centre, rel=1e-14)
    assert far.variance == pytest.approx(sum((each - centre) ** 2 for each in values) / 1999, rel=1e-9)


def test_it_narrows_with_units() -> None:
    """The width falls, though more slowly than that of a test that is looked at once."""
    widths = [mixture(0.32 / units, units, 0.05) for units in (500, 2_000, 8_000, 32_000)]
    assert widths == sorted(widths, reverse=True)
    assert all(each > 1.96 * (0.32 / n) ** 0.5 for each, n in zip(widths, (500, 2_000, 8_000, 32_000), strict=True))
