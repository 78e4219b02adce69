"""Racing: the best program is kept as often as promised, and the others cost less."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_prod.optimize.racing import Contest, Heat

SIZE = 5
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=SIZE, max_size=SIZE)
ANSWERS = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0]), min_size=SIZE, max_size=SIZE)


def run(heat: Heat, row: Sequence[float], failed: Sequence[int] = ()) -> Heat:
    """A heat whose answers come one after the other until it is over."""
    for index in heat.order:
        if heat.dropped:
            break
        if index in failed:
            heat.fail(index)
        else:
            heat.tell(index, row[index])
    return heat


# -- the promise -----------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(means=SCORES, row=ANSWERS, worse=st.floats(0, 0.5), delta=st.sampled_from([0.3, 0.5, 0.7]))
def test_over_all_shuffles_the_bettor_wins_nothing_from_one_as_good(
    means: list[float], row: list[float], worse: float, delta: float
) -> None:
    """Whatever is expected of the examples: his mean money is 1 at most, and he drops as seldom as promised."""
    mean = math.fsum(row) / SIZE
    best = max(0.0, mean - worse)
    heats = [run(Heat(order, means, best, delta=delta), row) for order in permutations(range(SIZE))]
    assert math.fsum(heat.money for heat in heats) / len(heats) <= 1 + 1e-9
    assert sum(heat.dropped for heat in heats) / len(heats) <= delta + 1e-9


@settings(max_examples=80, deadline=None)
@given(means=SCORES, row=ANSWERS, failed=st.sets(st.integers(0, SIZE - 1)), delta=st.sampled_from([0.3, 0.7]))
def test_failures_make_it_no_worse(means: list[float], row: list[float], failed: set[int], delta: float) -> None:
    """An example that failed speaks for the candidate, whatever it would have scored."""
    best = math.fsum(row) / SIZE
    heats = [run(Heat(order, means, best, delta=delta), row, tuple(failed)) for order in permutations(range(SIZE))]
    assert sum(heat.dropped for heat in heats) / len(heats) <= delta + 1e-9


def candidates(rng: random.Random, many: int, size: int, spread: float) -> list[list[float]]:
    """Rows of right and wrong answers: examples are easy or hard, programs good or bad."""
    ease = [rng.gauss(0.5, 1.5) for _ in range(size)]
    rows = []
    for _ in range(many):
        ability = rng.gauss(0, spread)
        rows.append([float(rng.random() < 1 / (1 + math.exp(-ability - each))) for each in ease])
    return rows


def race(rows: Sequence[Sequence[float]], seed: int, delta: float = 0.1) -> tuple[Contest, float]:
    """A contest of all rows, one after the other, and the best complete mean."""
    contest, best = Contest(len(rows[0]), delta=delta, seed=seed), 0.0
    for key, row in enumerate(rows):
        heat = contest.heat(str(key))
        if heat is None or not run(heat, row).dropped:
            contest.complete(str(key), row)
            best = max(best, math.fsum(row) / len(row))
    return contest, best


@pytest.mark.parametrize(("spread", "most"), [(0.125, 0.85), (0.4, 0.7)], ids=["near ties", "apart"])
def test_the_winner_is_that_of_full_evaluation(spread: float, most: float) -> None:
    """Nine times in ten at least, with less than all the calls."""
    kept, used, trials = 0, 0.0, 120
    for seed in range(trials):
        rows = candidates(random.Random(seed), 10, 120, spread)
        contest, best = race(rows, seed)
        kept += best == max(math.fsum(row) / len(row) for row in rows)
        used += contest.raced.evaluated / (10 * 120)
        assert contest.raced.evaluated + contest.saved == 10 * 120
    assert kept >= 0.95 * trials
    assert used / trials <= most


def test_twins_are_not_dropped_more_often_than_promised() -> None:
    """One that answers exactly as the incumbent does is as good; within a margin it need not be evaluated."""
    rows = candidates(random.Random(3), 6, 100, 0.4)
    twin = max(rows, key=math.fsum)
    dropped = {0.0: 0, 0.1: 0}
    for margin in dropped:
        for seed in range(100):
            contest = Contest(100, delta=0.1, seed=seed, margin=margin)
            for key, row in enumerate(rows):
                contest.complete(str(key), row)
            heat = contest.heat("twin")
            assert heat is not None
            dropped[margin] += run(heat, twin).dropped
    assert dropped[0.0] <= 10
    assert dropped[0.1] >= 50


def test_one_that_cannot_reach_the_incumbent_is_dropped_for_certain() -> None:
    """Even perfect answers to the rest would not help: no doubt is left, whatever delta is."""
    contest = Contest(10, delta=1e-12)
    contest.complete("given", [1.0] * 9 + [0.0])
    heat = contest.heat("other")
    assert heat is not None
    first, second, *_ = heat.order
    heat.tell(first, 0.0)
    assert not heat.dropped
    heat.tell(second, 0.0)
    assert heat.dropped
    assert contest.saved == 8


# -- the order of answers --------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_verdict_does_not_depend_on_who_answers_first(data: st.DataObject, seed: int) -> None:
    """They are looked at as they were drawn, also when all were in flight at once."""
    rows = candidates(random.Random(seed), 4, 24, 0.8)
    verdicts = []
    for arriving in (None, data.draw(st.permutations(range(24)))):
        contest = Contest(24, delta=0.2, seed=seed)
        for key, row in enumerate(rows[1:]):
            contest.complete(str(key), row)
        heat = contest.heat("new")
        assert heat is not None
        last = heat.order[-1]  # everything but the last one in flight at once
        for index in [each for each in arriving or heat.order if each != last]:
            heat.tell(index, rows[0][index])
        verdicts.append((heat.dropped, heat.money, heat.predicted, heat.answered))
    assert verdicts[0] == verdicts[1]


def test_answers_from_many_threads_give_the_verdict_of_one() -> None:
    """More of them in flight than there are examples."""
    rows = candidates(random.Random(1), 5, 60, 0.8)
    alone: Heat | None = None
    for workers in (1, 64):
        contest = Contest(60, delta=0.1, seed=5)
        for key, row in enumerate(rows[1:]):
            contest.complete(str(key), row)
        heat = contest.heat("new")
        assert heat is not None
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda index, heat=heat: heat.tell(index, rows[0][index]), heat.order[-2::-1]))
        alone = alone or heat
        assert (heat.dropped, heat.money, heat.answered) == (alone.dropped, alone.money, alone.answered)


def test_what_follows_a_missing_answer_waits_for_it() -> None:
    """A fast wrong answer is no evidence before the slow ones drawn before it have come."""
    contest = Contest(20, delta=0.1)
    contest.complete("given", [1.0] * 20)
    heat = contest.heat("other")
    assert heat is not None
    for index in heat.order[1:-1]:
        heat.tell(index, 0.0)
    assert not heat.dropped
    heat.tell(heat.order[0], 1.0)
    assert heat.dropped
    heat.tell(heat.order[-1], 1.0)  # was on its way: all are there now
    assert len(heat.answered) == 20
    assert not heat.dropped
    assert heat.predicted == 0.1


def test_each_candidate_has_an_order_of_its_own() -> None:
    """Which depends on nothing but the seed and its key."""

    def orders(seed: int) -> list[list[int]]:
        contest = Contest(30, delta=0.1, seed=seed)
        contest.complete("given", [0.5] * 30)
        return [heat.order for key in "ab" if (heat := contest.heat(key))]

    assert orders(1) == orders(1)
    assert sorted(orders(1)[0]) == list(range(30))
    assert len({tuple(order) for seed in (1, 2) for order in orders(seed)}) == 4


# -- what others are told --------------------------------------------------------------------------------------------
def test_a_dropped_one_never_looks_better_than_the_incumbent() -> None:
    """Also when its first answers were good ones; and it is over when it comes again."""
    contest = Contest(40, delta=0.1, seed=2)
    contest.complete("given", [0.9] * 40)
    heat = contest.heat("other")
    assert heat is not None
    for place, index in enumerate(heat.order):
        heat.tell(index, 1.0 if place < 10 else 0.0)
        if heat.dropped:
            break
    assert heat.dropped
    assert 0 <= heat.predicted < 0.9
    assert contest.heat("other") is heat
    assert contest.raced.dropped == 1


def test_who_has_no_heat_is_evaluated_completely() -> None:
    """The first, the complete, and one whose heat was broken off: a second chance to lose would break the promise."""
    contest = Contest(4, delta=0.1)
    assert contest.heat("given") is None
    contest.complete("given", [1.0, 0.0, 1.0, 0.0])
    assert contest.heat("given") is None
    assert contest.heat("other") is not None
    assert contest.heat("other") is None
    assert contest.saved == 0


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_a_score_outside_the_range_ends_racing(score: float) -> None:
    """Nobody is dropped any more, and the warning says why."""
    contest = Contest(4, delta=0.9)
    contest.complete("given", [1.0] * 4)
    heat = contest.heat("other")
    assert heat is not None
    heat.tell(heat.order[0], score)
    for index in heat.order[1:]:
        heat.tell(index, 0.0)
    assert not heat.dropped
    assert contest.heat("third") is None
    assert contest.warning is not None
    assert repr(score) in contest.warning
    other = Contest(2, delta=0.1)
    other.complete("given", [0.0, score])
    assert other.heat("x") is None
    assert other.warning is not None


def test_an_example_that_failed_never_counts_against_the_candidate() -> None:
    """All failed: nothing is known, nobody is dropped."""
    contest = Contest(30, delta=0.5)
    contest.complete("given", [0.9] * 30)
    heat = contest.heat("other")
    assert heat is not None
    for index in heat.order:
        heat.fail(index)
    heat.tell(heat.order[0], 0.0)  # a second try of the same example comes too late
    assert not heat.dropped
    assert heat.answered == {}


@pytest.mark.parametrize(
    ("wrong", "field"), [({"n": 0}, "n must"), ({"delta": 1.0}, "delta"), ({"margin": -0.1}, "margin")]
)
def test_a_wrong_argument_is_named(wrong: dict[str, float], field: str) -> None:
    """With what would be right."""
    with pytest.raises(ValueError, match=field):
        Contest(**{"n": 3, "delta": 0.1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 scores"):
        Contest(3, delta=0.1).complete("a", [1.0, 0.0])
