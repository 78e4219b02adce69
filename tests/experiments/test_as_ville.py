"""Bets and the interval beside those of `ville`, a package by others (0.1.0, BSD-3).

Its figures are frozen here, since it comes with SciPy. They are made from the streams below:
`BettingABTest(propensity=share)` whose `_cs` is `BettingCS(bounds=(-reach, reach), c=c, grid=grid, intersect=False)`,
after `update(y, treated)` of the first so many units, its `_cs._log_up` where `_cs._m` is the hypothesis; its
`normal_mixture(n, alpha, rho) / n`, with `rho` for `TUNED_FOR` units as a formula has it and, once, as `best_rho` finds
it; and `lower_`, `upper_` and `stopping_time()` of a plain `BettingABTest(propensity=share)`.
"""

from __future__ import annotations

import math
import random

import pytest

from dspy_prod import Metric
from dspy_prod.experiments.betting import SHARES, LinearBet, spread_gain
from dspy_prod.experiments.evidence import Evidence, Exposure
from dspy_prod.experiments.intervals import mixture

MARGIN = 0.02


def stream(seed: int, units: int, share: float, control: float, candidate: float) -> list[tuple[bool, float]]:
    """(whether it had the candidate, whether it went well) of each unit."""
    draw, found = random.Random(seed), []
    for _ in range(units):
        ours = draw.random() < share
        found.append((ours, float(draw.random() < (candidate if ours else control))))
    return found


@pytest.mark.parametrize(
    ("share", "reach", "place", "units", "logs"),
    [
        (0.5, 2.0, 0, 20, 0.22159267214329573),
        (0.5, 2.0, 0, 100, 1.3759062446128534),
        (0.5, 2.0, 1, 20, 0.5389679798690882),
        (0.1, 10.0, 0, 100, 0.054989516069215434),
        (0.1, 10.0, 0, 400, 0.6161893364874264),
        (0.1, 10.0, 1, 100, 0.02190369337236728),
        (0.1, 10.0, 1, 400, 1.2590768230652578),
    ],
)
def test_a_linear_bet_wins_what_ville_s_capital_does(
    share: float, reach: float, place: int, units: int, logs: float
) -> None:
    """On "no worse by two points", with 0.15 and 0.4 of the stake that could lose everything."""
    bet, past = LinearBet(), [0.0, 0.0]
    lost = (reach - MARGIN) / (2 * reach)  # of a scale from 0 to 1: what an outcome of 0 is below the hypothesis
    for ours, good in stream(7, units, share, 0.80, 0.85):
        expected = past[1] / past[0] if past[0] else 0.5
        gain = spread_gain(ours, share, good, expected, MARGIN) / (share * (1 - share))
        bet.bet(gain / (2 * reach), -lost, 1e-12)
        past = [past[0] + 1, past[1] + good]
    part = len(bet.multiples) + place
    assert SHARES[place] == (0.15, 0.4)[place]
    assert math.log(bet.wealths[part] / bet.begin[part]) == pytest.approx(logs, abs=1e-9)


@pytest.mark.parametrize(
    ("alpha", "widths"),
    [
        (0.05, (0.360621627849, 0.042924337188, 0.014497426635)),
        (0.01, (0.389717135643, 0.050510475446, 0.016785666814)),
    ],
)
def test_the_interval_is_as_wide_as_ville_s_mixture(alpha: float, widths: tuple[float, ...]) -> None:
    for units, width in zip((200, 5_000, 50_000), widths, strict=True):
        assert mixture(1 / units, units, alpha) == pytest.approx(width, abs=1e-10)


def test_the_interval_is_tuned_as_ville_tunes_it() -> None:
    """A formula in place of a search: as narrow as can be at 5,000 units, to four digits."""
    for alpha, width in ((0.05, 0.04292311279967596), (0.01, 0.05051014001662528)):
        assert width <= mixture(1 / 5_000, 5_000, alpha) <= 1.0001 * width


@pytest.mark.parametrize(
    ("share", "candidate", "stops", "bounds"),
    [
        (0.5, 0.9, 115, [(1_000, 0.056503, 0.20751), (3_000, 0.076704, 0.165108), (6_000, 0.080704, 0.148507)]),
        (0.5, 0.8, None, [(1_000, -0.051903, 0.117706), (3_000, -0.024901, 0.074104)]),
        (0.1, 0.9, 1_628, [(3_000, 0.034502, 0.159508), (6_000, 0.051503, 0.141507)]),
        (0.1, 0.8, None, [(3_000, -0.079504, 0.073504)]),
    ],
)
def test_evidence_says_what_ville_s_interval_says(
    share: float, candidate: float, stops: int | None, bounds: list[tuple[int, float, float]]
) -> None:
    """The interval that is shown is about as wide, and lies about there; what decides is proven about as soon."""
    evidence, shares = Evidence([Metric("resolved")], ["new"]), {"control": 1 - share, "new": share}
    proven, of = None, {units: (low, high) for units, low, high in bounds}
    for place, (ours, good) in enumerate(stream(11, max(of), share, 0.80, candidate), start=1):
        exposure = Exposure("new" if ours else "control", shares)
        evidence.exposed(exposure)
        evidence.matured("resolved", exposure, good)
        if place % 10 == 0 and proven is None and evidence.look().verdict != "keep":
            proven = place
        if place in of:
            (low, high), shown = of[place], evidence.interval("resolved", "new")
            assert shown is not None
            assert shown.low is not None
            assert shown.high is not None
            assert low < shown.difference < high
            assert max(low, shown.low) < candidate - 0.80 < min(high, shown.high)
            assert 0.7 < (shown.high - shown.low) / (high - low) < 1.3
    assert (proven is None) == (stops is None)
    if proven is not None and stops is not None:
        assert 0.5 < proven / stops < 2
