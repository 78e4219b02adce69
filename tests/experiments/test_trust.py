"""What makes an experiment invalid: units that arrive in other shares than declared, or in two arms."""

from __future__ import annotations

import math
import random

import pytest

from dspy_prod.experiments.trust import SampleRatio


@pytest.mark.parametrize(
    ("shares", "batches", "expected"),
    [
        ({"a": 0.5, "b": 0.5}, [(510, 490), (540, 460), (1100, 900)], [-0.2466469043, 1.118058623, 8.2022923235]),
        ({"a": 0.9, "b": 0.1}, [(905, 95), (925, 75), (1850, 150)], [-0.2657469217, 1.2160315564, 6.7515158693]),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, [(500, 230, 270), (520, 200, 280)], [0.1074924646, 4.0478736896]),
    ],
)
def test_as_savvi_has_it(shares: dict[str, float], batches: list[tuple[int, ...]], expected: list[float]) -> None:
    """`Multinomial` of savvi 0.3.1 at k = 1000: the logarithm of its posterior odds, whatever the order of units."""
    ratio, draw = SampleRatio(), random.Random(3)
    for counts, log in zip(batches, expected, strict=True):
        arms = [arm for arm, count in zip(shares, counts, strict=True) for _ in range(count)]
        draw.shuffle(arms)
        for arm in arms:
            ratio.see(arm, shares)
        assert ratio.state()["log"] == pytest.approx(log, abs=1e-9)
        assert ratio.peak >= log - 1e-9


def test_an_alarm_stays() -> None:
    """54 to 46 is found; that later units even it out does not take it back."""
    ratio, shares = SampleRatio(), {"a": 0.5, "b": 0.5}
    for place in range(4_000):
        ratio.see("a" if place % 100 < 56 else "b", shares)
    assert ratio.mismatch
    assert ratio.e_value >= 100
    for _ in range(480):
        ratio.see("b", shares)
    assert ratio.state()["log"] < 0
    assert ratio.mismatch


def test_each_stage_is_tested_by_its_own_shares() -> None:
    """A ramp is no mismatch, though the arms' counts over all fit no stage; a full stage has nothing to test."""
    ratio, draw = SampleRatio(), random.Random(5)
    for stage, share in (("1", 0.01), ("2", 0.25), ("3", 0.5)):
        for _ in range(2_000):
            arm = "b" if draw.random() < share else "a"
            ratio.see(arm, {"a": 1 - share, "b": share}, stage)
    for _ in range(500):
        ratio.see("a", {"a": 1.0, "b": 0.0}, "3")
    assert not ratio.mismatch
    assert ratio.units == 6_500
    assert sum(ratio.counts.values()) == 6_000


def test_units_in_two_arms() -> None:
    """More than one in a hundred, and three at least. One in an arm that its draw ruled out is such a unit."""
    ratio, shares = SampleRatio(), {"a": 0.5, "b": 0.5}
    for place in range(200):
        ratio.see("ab"[place % 2], shares)
    found = []
    for _ in range(2):
        ratio.cross()
        found.append(ratio.contaminated)
    ratio.see("b", {"a": 1.0})
    found.append(ratio.contaminated)
    assert ratio.crossed == 3
    for place in range(200):
        ratio.see("ab"[place % 2], shares)
    found.append(ratio.contaminated)
    assert found == [False, False, True, False]


def test_the_alarm_is_rarely_false_and_finds_a_loss() -> None:
    """Looked at after every unit: of 60 sound experiments hardly one, of 20 that lose units nearly all."""
    draw, shares = random.Random(8), {"a": 0.5, "b": 0.5}

    def alarmed(true: float) -> bool:
        ratio = SampleRatio()
        for _ in range(6_000):
            ratio.see("b" if draw.random() < true else "a", shares)
        return ratio.mismatch

    assert sum(alarmed(0.5) for _ in range(60)) <= 2
    assert sum(alarmed(0.45) for _ in range(20)) >= 19


def test_the_e_value_is_a_number_however_large() -> None:
    """JSON has no infinity."""
    ratio = SampleRatio()
    for _ in range(3_000):
        ratio.see("b", {"a": 0.99, "b": 0.01})
    assert math.isfinite(ratio.e_value)
