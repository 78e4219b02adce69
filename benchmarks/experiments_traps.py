"""The section of `benchmarks.experiments` about outcomes that lie: late ones, missing ones, those of several calls of a
user, and a judge's.

The variants are equal in truth, so whatever is called better is wrong. Each is counted as it usually is, and as an
`Experiment` counts it by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Literal, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from benchmarks.experiments_batch import compared
from benchmarks.experiments_measured import A_SIDE, Row, Size
from benchmarks.experiments_worlds import Bools, Floats, heavy
from dspy_prod.experiments.evidence import Evidence, Exposure
from dspy_prod.options.metrics import Metric

DAYS: Final = 14.0
WINDOW: Final = 3.0
"""Days."""
HALVES: Final = {"control": 0.5, "new": 0.5}


class Users(NamedTuple):
    """Those of one run.

    Attributes:
        at: the day of each one's exposure. candidate, solved: whether it had the candidate; whether it was helped.
    """

    at: Floats
    candidate: Bools
    solved: Bools


def _users(rng: np.random.Generator, units: int, share: float) -> Users:
    return Users(np.sort(rng.random(units) * DAYS), rng.random(units) < 0.5, rng.random(units) < share)


def _proven(metric: Metric, users: Users, values: list[float | None]) -> str:
    """The first verdict about one metric, told in order of exposure, with a look every ten users."""
    evidence = Evidence([metric], ["new"], alpha=0.05)
    for place, (candidate, value) in enumerate(zip(users.candidate, values, strict=True)):
        exposure = Exposure("new" if candidate else "control", HALVES)
        evidence.exposed(exposure)
        evidence.matured(metric.name, exposure, value)
        if place % 10 == 9 and (verdict := evidence.look().verdict) != "keep":
            return verdict
    return "keep"


def _late(rng: np.random.Generator, units: int) -> tuple[bool, str]:
    """The candidate's users say within 2.5 days that they were helped, control's within one. Counted each day with "not
    yet" as no (a z-test, wrong if it ever is significant); and each user when the window is over."""
    users = _users(rng, units, 0.5)
    said = users.at + rng.random(units) * np.where(users.candidate, 2.5, 1.0)
    wrong = False
    for day in np.arange(1.0, DAYS):
        here, yes = users.at < day, users.solved & (said < day)
        wrong = wrong or _z(yes[here], users.candidate[here]) > 1.96
    within = [1.0 if good and when < start + WINDOW else 0.0
              for good, when, start in zip(users.solved, said, users.at, strict=True)]  # fmt: skip
    return wrong, _proven(Metric("resolved", window="3d"), users, list(within))


def _z(yes: Bools, candidate: Bools) -> float:
    arms = [yes[~candidate], yes[candidate]]
    if min(len(arm) for arm in arms) < 30:
        return 0.0
    variance = sum(float(arm.var()) / len(arm) for arm in arms)
    return abs(float(arms[1].mean() - arms[0].mean())) / math.sqrt(max(variance, 1e-12))


def _silent(rng: np.random.Generator, units: int, missing: float | Literal["exclude"] = 0.0) -> tuple[bool, str]:
    """Half of the users answer; of those of the candidate that were not helped a quarter. Counted are those who answer
    (with the same bets, without the alarm on shares of answers); and everybody, silence as "not resolved"."""
    users = _users(rng, units, 0.6)
    answers = rng.random(units) < np.where(users.candidate & ~users.solved, 0.25, 0.5)
    here = Users(users.at[answers], users.candidate[answers], users.solved[answers])
    naive = _proven(Metric("resolved"), here, [float(each) for each in here.solved])
    told = [float(good) if said else None for good, said in zip(users.solved, answers, strict=True)]
    return naive != "keep", _proven(Metric("resolved", missing=missing), users, told)


def _judged(rng: np.random.Generator, units: int) -> tuple[bool, str]:
    """A judge who takes nine of ten right answers for right, two of ten wrong ones, and of the candidate's, whose style
    it likes, 3.5 of ten. Trusted; and as a judge is by itself."""
    users = _users(rng, units, 0.8)
    likes = np.where(users.solved, 0.9, np.where(users.candidate, 0.35, 0.2))
    scores = [float(each) for each in rng.random(units) < likes]
    verdicts = [_proven(Metric("quality", judge=judge), users, list(scores)) for judge in ("trusted", "untrusted")]
    return verdicts[0] == "promote", verdicts[1]


class Trap(NamedTuple):
    """A way to be misled.

    Attributes:
        run: gives whether the usual way is wrong, and the verdict. naive: the least share that shows that it is.
        promoted: the largest share of the runs.
    """

    name: str
    run: Callable[[np.random.Generator, int], tuple[bool, str]]
    naive: float
    promoted: float = 0.02


TRAPS: Final = (
    Trap("outcomes that come later from one, day by day", _late, 0.9),
    Trap("unhappy users of one say less", _silent, 0.9),
    Trap("the same, and missing='exclude' asked for", partial(_silent, missing="exclude"), 0.9, 0.7),
    Trap("a judge who likes the style of one", _judged, 0.3, 0.0),
)
"""Who leaves the silent out has only the alarm on shares of answers, which comes too late in about half of the runs."""


def traps(size: Size) -> Iterator[Row]:
    """What is found in equal variants, counted as usual and as here."""
    units, full = min(size.units // 2, 5_000), size.units >= 8_000
    runs = size.some(0.05)
    for place, (name, run, least, most) in enumerate(TRAPS):
        rng = np.random.default_rng([size.seed, 10, place])
        found = [run(rng, units) for _ in tqdm(range(runs), desc=name, leave=False, file=sys.stderr)]
        verdicts = [verdict for _, verdict in found]
        figures = {
            "as usual": float(np.mean([wrong for wrong, _ in found])),
            "promoted": verdicts.count("promote") / runs, "rolled back": verdicts.count("rollback") / runs,
        }  # fmt: skip
        bounds = [("promoted", "<=", most), ("rolled back", "<=", 0.03)]
        yield Row("traps", name, figures, runs, [*bounds, *([("as usual", ">=", least)] if full else [])])
    some = size.some(0.25)
    naive, ours = (_several_calls(np.random.default_rng([size.seed, 10, 9]), size.units, some, by) for by in (1, 0))
    figures = {"as usual": sum(naive), "promoted": ours[0], "rolled back": ours[1]}
    bounds = [("promoted", "<=", A_SIDE.better), ("rolled back", "<=", A_SIDE.worse_success)]
    told = [("as usual", ">=", 0.1)] if full else []
    yield Row("traps", "users of several calls, each call counted", figures, some, [*bounds, *told])


def _several_calls(rng: np.random.Generator, calls: int, runs: int, each: int) -> tuple[float, float]:
    """Shares of runs in which the candidate is found better, and worse; 2.5 % for either.

    Args:
        calls: in each run, of users whom it goes well with more or less often, and who call seldom or very often.
        each: whether each call counts, not the mean of a user's.
    """
    comparison = compared(Metric("quality"), runs)
    left, arm, likes = np.zeros(runs, int), np.zeros(runs, bool), np.zeros(runs)
    many, good = np.ones(runs, int), np.zeros(runs)
    half = np.full(runs, 0.5)
    for _ in tqdm(range(calls), desc="several calls", leave=False, file=sys.stderr):
        new = left == 0
        many = np.where(new, heavy(rng, runs), many)
        left = np.where(new, many, left)
        arm = np.where(new, rng.random(runs) < 0.5, arm)
        likes = np.where(new, np.clip(0.75 + 0.3 * rng.standard_normal(runs), 0.0, 1.0), likes)
        right = (rng.random(runs) < likes).astype(float)
        good = np.where(new, 0.0, good) + right
        left = left - 1
        if each:
            comparison.unit(arm, half, right)
        else:  # a user's mean is known with its last call; of the others nothing is bet on
            last = left == 0
            comparison.unit(arm & last, np.where(last, 0.5, 0.0), np.where(last, good / many, 0.75))
    assert comparison.better is not None
    better, worse = comparison.better.peak >= 1 / A_SIDE.better, comparison.worse.peak >= 1 / A_SIDE.worse_success
    return float((better & ~worse).mean()), float(worse.mean())
