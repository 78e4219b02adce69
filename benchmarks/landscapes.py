"""Kinds of optimization for the race: how far candidates lie apart, in which order they come, and how they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SLOPE: Final = 0.16
"""How much a program gains on average for one unit of ability: near a half, with examples of that variety."""
_EASE: Final = np.random.default_rng(0).normal(0.0, 1.5, 2000)
"""Examples that stand for all there are: what a program scores on them is its true quality."""


@dataclass(frozen=True)
class Table:
    """What candidates score on each example of a selection set, in the order they come, and how good they truly are."""

    scores: Floats
    true: Floats


def _chances(ability: Floats, ease: Floats) -> Floats:
    chances: Floats = 1 / (1 + np.exp(-(0.5 + ability[:, None] + ease[None, :])))
    return chances


def _answered(rng: np.random.Generator, quality: Floats, n: int) -> Table:
    """Right or wrong answers: examples are easy or hard for all."""
    ability = quality / SLOPE
    chances = _chances(ability, rng.normal(0.0, 1.5, n))
    right = (rng.random(chances.shape) < chances).astype(float)
    return Table(right, _chances(ability, _EASE).mean(axis=1))


def _spread(spread: float) -> Callable[[np.random.Generator, int, int], Table]:
    return lambda rng, many, n: _answered(rng, rng.normal(0.0, spread, many), n)


def _drift(rise: float) -> Callable[[np.random.Generator, int, int], Table]:
    """Later candidates are better, as in a search that learns; or worse."""
    return lambda rng, many, n: _answered(rng, rng.normal(0.0, 0.04, many) + np.linspace(0.0, rise, many), n)


def _breakthrough(share: float) -> Callable[[np.random.Generator, int, int], Table]:
    """One candidate solves a kind of example at which all others fail."""

    def draw(rng: np.random.Generator, many: int, n: int) -> Table:
        table, one, kind = _answered(rng, rng.normal(0.0, 0.06, many), n), rng.integers(many), rng.random(n) < share
        table.scores[:, kind], true = 0.0, table.true * (1 - share)
        table.scores[one, kind] = 1.0
        true[one] += share
        return Table(table.scores, true)

    return draw


def _specialists(rng: np.random.Generator, many: int, n: int) -> Table:
    """Each candidate is good at some kinds of examples and bad at others: what is easy for one is not for the next."""
    own = rng.normal(0.0, 1.0, (many, 8))
    kinds, ability, ease = rng.integers(8, size=n), rng.normal(0.0, 0.06, many) / SLOPE, rng.normal(0.0, 1.2, n)
    chances = 1 / (1 + np.exp(-(0.5 + ability[:, None] + own[:, kinds] + ease[None, :])))
    true = np.mean([_chances(ability + own[:, kind], 0.8 * _EASE).mean(axis=1) for kind in range(8)], axis=0)
    return Table((rng.random(chances.shape) < chances).astype(float), true)


def _graded(rng: np.random.Generator, many: int, n: int) -> Table:
    """Scores between 0 and 1, as of an F1 metric or a judge."""
    ability = rng.normal(0.0, 0.06, many) / SLOPE
    chances = _chances(ability, rng.normal(0.0, 1.5, n))
    return Table(rng.beta(4 * chances + 0.05, 4 * (1 - chances) + 0.05), _chances(ability, _EASE).mean(axis=1))


def _ties(rng: np.random.Generator, many: int, n: int) -> Table:
    """Every other candidate answers exactly as one before it, the best one included."""
    table = _answered(rng, rng.normal(0.0, 0.06, many), n)
    scores, true = table.scores, table.true
    scores[1::2], true[1::2] = scores[: many - many % 2 : 2], true[: many - many % 2 : 2]
    return Table(scores, true)


def _duel(rng: np.random.Generator, many: int, n: int) -> Table:
    """The last one is better than all before it by exactly one example, and differs from them on many."""
    table = _answered(rng, rng.normal(0.0, 0.06, many), n)
    best = table.scores[:-1].sum(axis=1).max()
    last = table.scores[-1]
    while last.sum() != best + 1:
        up = last.sum() <= best
        last[rng.choice(np.flatnonzero(last == (0.0 if up else 1.0)))] = 1.0 if up else 0.0
    return table


LANDSCAPES: Final[dict[str, Callable[[np.random.Generator, int, int], Table]]] = {
    "apart": _spread(0.06),
    "near ties": _spread(0.02),
    "far apart": _spread(0.12),
    "breakthrough": _breakthrough(0.25),
    "small breakthrough": _breakthrough(0.08),
    "upward drift": _drift(0.2),
    "downward drift": _drift(-0.2),
    "specialists": _specialists,
    "graded scores": _graded,
    "exact ties": _ties,
    "better by one example": _duel,
}

SCENARIOS: Final = [
    *[(kind, 16, 200) for kind in LANDSCAPES],
    *[("apart", 16, n) for n in (50, 100, 500)],
    *[("near ties", 16, n) for n in (50, 500)],
    ("breakthrough", 16, 50),
    ("apart", 32, 200),
    *[(kind, 48, 200) for kind in ("apart", "near ties", "breakthrough")],
    ("apart", 48, 500),
]
"""Kind, candidates, examples."""
