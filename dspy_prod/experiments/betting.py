"""Bets against "the candidate is not different": money that can only grow where the candidate truly is.

A unit's arm was drawn with a known probability. If nothing distinguishes the arms, its outcome tells nothing about the
draw, and whoever bets on it plays a fair game: he multiplies his money by 20 at most one time in 20, however often it
is counted (Ville's inequality). So wealth is evidence that may be looked at after every unit. Since each bet is fair
for the probability that held at its moment, ramps, drift and any distribution of outcomes are taken in stride, from the
first unit on: no variance is estimated, there is no burn-in and there are no strata.

Two games. `ArmBet` guesses the arm from the outcome; it is fair, or worse for the bettor, as long as the candidate's
outcomes are stochastically not larger than control's ("Anytime-valid inference for counts", Lindon and Malek 2022, is
the case of two outcomes). `LinearBet` stakes on the difference of means of bounded outcomes against a margin
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024).

Each spreads its money over several stakes, so that none has to be tuned. Beyond `LARGEST` money is no longer invested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

THETAS: Final = tuple(0.05 * (6.0 / 0.05) ** (place / 11) for place in range(12))
"""How strongly the outcome is taken to speak for an arm: the change in the arm's log odds for one unit of it."""
_PLAUSIBLE: Final = tuple(math.exp(-0.5 * math.log(theta / 0.3) ** 2) for theta in THETAS)
WEIGHTS: Final = tuple(each / sum(_PLAUSIBLE) for each in _PLAUSIBLE)
"""The part of the money on each: most of it where a share of 0.8 changes by a few points, little on extremes, which
need little."""
MULTIPLES: Final = (0.3, 0.6, 1.0, 1.6, 2.5, 4.0)
"""Stakes, as multiples of the one that is best where the truth lies a margin away from the hypothesis."""
SHARES: Final = (0.15, 0.4, 0.9)
"""Stakes, as shares of the one that could lose everything at once."""
LARGEST: Final = 1e100


class Bet:
    """Money spread over several stakes.

    Attributes:
        begin: the parts of 1 that are on them.
        wealths: what these have become.
    """

    __slots__ = ("wealths",)
    begin: tuple[float, ...] = ()

    def __init__(self) -> None:
        self.wealths = list(self.begin)

    @property
    def wealth(self) -> float:
        """What the whole has made of 1: an e-value."""
        return sum(self.wealths)


class Claim:
    """Something claimed of the candidate, and the bets that pay if it is true. It has the mean of their wealth.

    Args:
        bets: which share the money evenly.

    Attributes:
        peak: the most that it ever had. Proof of the claim at level `alpha` is a peak of `1 / alpha`; money that is
            lost later does not take it back.
    """

    __slots__ = ("bets", "peak")

    def __init__(self, *bets: Bet) -> None:
        self.bets = bets
        self.peak = 1.0

    @property
    def wealth(self) -> float:
        """What the claim is worth now: an e-value."""
        bets = self.bets
        return bets[0].wealth if len(bets) == 1 else sum([bet.wealth for bet in bets]) / len(bets)

    def settle(self) -> None:
        """After the bets on a unit."""
        wealth = self.wealth
        if wealth > self.peak:
            self.peak = wealth

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"peak": self.peak, "bets": [list(bet.wealths) for bet in self.bets]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: its bets are others.
        """
        if [len(wealths) for wealths in state["bets"]] != [len(bet.begin) for bet in self.bets]:
            raise ValueError("the checkpoint has other bets than this release: replay the outcomes that are stored")
        self.peak = float(state["peak"])
        for bet, wealths in zip(self.bets, state["bets"], strict=True):
            bet.wealths = [float(each) for each in wealths]


class ArmBet(Bet):
    """Guesses the arm from the outcome: the larger it is, the likelier the candidate's."""

    __slots__ = ()
    begin = WEIGHTS

    def bet(self, candidate: bool, propensity: float, surprise: float) -> None:
        """One unit.

        Args:
            candidate: whether it had the candidate.
            propensity: how probable that was, over 0 and under 1.
            surprise: by how much its outcome was larger than expected, in -5 to 5.
        """
        against, exp = 1.0 - propensity, math.exp
        odds = [exp(theta * surprise) for theta in THETAS]
        if candidate:
            grown = [wealth * (each / (against + propensity * each)) for wealth, each in zip(self.wealths, odds)]  # noqa: B905
        else:
            grown = [wealth * (1.0 / (against + propensity * each)) for wealth, each in zip(self.wealths, odds)]  # noqa: B905
        self.wealths = grown if max(grown) <= LARGEST else [min(each, LARGEST) for each in grown]


class LinearBet(Bet):
    """Stakes on a gain whose expectation is 0 or less under the hypothesis."""

    __slots__ = ()
    begin = (1.0 / (len(MULTIPLES) + len(SHARES)),) * (len(MULTIPLES) + len(SHARES))
    multiples: tuple[float, ...] = MULTIPLES

    def bet(self, gain: float, worst: float, natural: float) -> None:
        """One unit.

        Args:
            gain: what a stake of 1 wins.
            worst: the least it could have been, below 0; known before the outcome, as is `natural`.
            natural: the stake that is best where the truth lies a margin away from the hypothesis.
        """
        staked = stakes(natural, -1.0 / worst, self.multiples)
        grown = [wealth * (1.0 + stake * gain) for wealth, stake in zip(self.wealths, staked)]  # noqa: B905
        self.wealths = grown if max(grown) <= LARGEST else [min(each, LARGEST) for each in grown]


class ProofBet(LinearBet):
    """Stakes against harm by a margin, where most often there is none at all.

    Then the natural stake is the best on average. Three quarters of it win nearly as fast and swing less: half of the
    proofs take as long, the slowest fifth is there a tenth sooner.
    """

    __slots__ = ()
    begin = (0.02, 0.8, 0.13, 0.03, 0.005, 0.005, 0.005, 0.0025, 0.0025)
    multiples = (0.3, 0.75, 1.0, 1.6, 2.5, 4.0)


def stakes(natural: float, safe: float, multiples: Sequence[float] = MULTIPLES) -> Sequence[float]:
    """What is staked, none of it enough to lose everything: `safe` would."""
    most = SHARES[-1] * safe
    staked = [multiple * natural for multiple in multiples]
    if staked[-1] > most:  # they are in order
        staked = [min(each, most) for each in staked]
    staked += [share * safe for share in SHARES]
    return staked


def spread_gain(candidate: bool, propensity: float, outcome: float, expected: float, margin: float) -> float:
    """Gain on "the candidate's mean is higher than control's less `margin`", of outcomes from 0 to 1.

    Its expectation is `p (1 - p) (difference of means + margin)`, whatever `expected` is.
    """
    centred = (1.0 - propensity if candidate else -propensity) * (outcome - expected)
    return centred + propensity * (1.0 - propensity) * margin


def ratio_gain(candidate: bool, propensity: float, outcome: float, expected: float, ratio: float) -> float:
    """Gain on "the candidate's mean is more than `ratio` times control's", of outcomes from 0 to 1.

    Its expectation is `p (1 - p) (candidate's mean - ratio * control's mean)`, whatever `expected` is.
    """
    weight = 1.0 - propensity if candidate else -ratio * propensity
    return (outcome - expected) * weight + propensity * (1.0 - propensity) * expected * (1.0 - ratio)
