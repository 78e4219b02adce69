"""Who gets what: sticky, monotone along a ramp, as often as is said, and the same everywhere."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.assignment import Assignment, Design
from dspy_prod.stores.trials import Arm

MANY = 200_000
NAMES = ("control", *(f"c{number}" for number in range(7)))
PINNED = ["c0", "c1", "c2", "c1", "c1", "c1", "c0", "c1"]
PINNED_PLACE = (0.021969223717761888, 0.1412479205383801)

units = st.text(max_size=20) | st.integers(0, 10**6).map(str)
variants = st.integers(2, 8).map(lambda number: NAMES[:number])
weight = st.floats(1e-3, 1e3)
ramps = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(sorted)


def chi_square(found: list[int], expected: list[float]) -> float:
    return sum((number - mean) ** 2 / mean for number, mean in zip(found, expected, strict=True) if mean)


def unlikely(degrees: int) -> float:
    """Chi-square that chance exceeds about once in ten thousand times (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


# -- stickiness --------------------------------------------------------------------------------------------------------
@given(units, variants, st.data())
def test_a_unit_gets_the_same_arm_from_any_design_of_the_same_terms(
    unit: str, names: tuple[str, ...], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(weight, min_size=len(names), max_size=len(names)))
    shares = data.draw(ramps)
    stage = data.draw(st.integers(0, len(shares) - 1))
    first, other = (Design("salt", names, weights=weights, shares=shares, holdout=0.1) for _ in range(2))
    assert first.assign(unit, stage) == first.assign(unit, stage) == other.assign(unit, stage)


@given(units, variants, st.data())
def test_when_the_share_grows_a_unit_moves_from_control_to_its_candidate_and_never_otherwise(
    unit: str, names: tuple[str, ...], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(weight, min_size=len(names), max_size=len(names)))
    design = Design("salt", names, weights=weights, shares=data.draw(ramps))
    seen = [design.assign(unit, stage).variant for stage in range(len(design.shares))]
    moved = [arm for arm, before in zip(seen, ["", *seen], strict=False) if arm != before]
    assert moved in ([seen[0]], ["control", seen[-1]])


@given(variants, st.data())
def test_propensities_add_up_to_one_and_full_candidates_have_none(names: tuple[str, ...], data: st.DataObject) -> None:
    weights = data.draw(st.lists(weight, min_size=len(names), max_size=len(names)))
    shares = data.draw(ramps)
    stage = data.draw(st.integers(0, len(shares) - 1))
    full = data.draw(st.integers(0, 2 ** (len(names) - 1) - 1))
    design = Design("salt", names, weights=weights, shares=shares)
    found = design.propensities(stage, full)
    assert math.isclose(sum(found), 1.0, abs_tol=1e-12)
    assert min(found) >= 0.0
    total = sum(weights[1:])
    for index, propensity in enumerate(found[1:]):
        expected = 0.0 if full >> index & 1 else shares[stage] * weights[1 + index] / total
        assert math.isclose(propensity, expected, abs_tol=1e-12)


@given(units, variants, st.data())
def test_a_unit_is_told_the_propensity_of_its_arm(unit: str, names: tuple[str, ...], data: st.DataObject) -> None:
    shares = data.draw(ramps)
    stage = data.draw(st.integers(0, len(shares) - 1))
    full = data.draw(st.integers(0, 2 ** (len(names) - 1) - 1))
    design = Design("salt", names, shares=shares)
    found = design.assign(unit, stage, full)
    assert found.propensity == design.propensities(stage, full)[names.index(found.variant)]
    assert found.propensity > 0
    assert found.random == (found.propensity < 1.0)


# -- frequencies -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "weights", "shares", "stage", "full"),
    [
        (2, None, None, 0, 0),
        (2, (9, 1), None, 0, 0),
        (8, (8, 7, 6, 5, 4, 3, 2, 1), None, 0, 0),
        (2, None, (0.01, 0.25), 0, 0),
        (4, (1, 1, 2, 3), (0.01, 0.25), 1, 0),
        (4, (1, 1, 2, 3), (0.01, 0.6), 1, 0b101),
    ],
)
def test_arms_are_as_frequent_as_their_propensities_say(
    names: int, weights: Any, shares: Any, stage: int, full: int
) -> None:
    design = Design("frequencies", NAMES[:names], weights=weights, shares=shares)
    found = Counter(design.assign(f"user-{number}", stage, full).variant for number in range(MANY))
    propensities = design.propensities(stage, full)
    expected = [propensity * MANY for propensity in propensities]
    assert set(found) == {name for name, propensity in zip(NAMES, propensities, strict=False) if propensity}
    assert chi_square([found[name] for name in NAMES[:names]], expected) < unlikely(len(found) - 1)


def test_positions_are_spread_evenly_and_the_two_of_a_unit_are_independent() -> None:
    design = Design("spread", NAMES[:2])
    first, second, both = Counter[int](), Counter[int](), Counter[tuple[int, int]]()
    for number in range(MANY):
        position, choice = design._place(str(number).encode())
        assert 0.0 <= position < 1.0
        assert 0.0 <= choice < 1.0
        first[int(position * 100)] += 1
        second[int(choice * 100)] += 1
        both[int(position * 10), int(choice * 10)] += 1
    for counts in (first, second, both):
        assert chi_square(list(counts.values()), [MANY / 100] * 100) < unlikely(99)


def test_assignments_under_two_salts_are_independent() -> None:
    one, other = Design("one", NAMES[:2]), Design("other", NAMES[:2])
    found = Counter((one.assign(str(n)).variant, other.assign(str(n)).variant) for n in range(MANY))
    assert chi_square(list(found.values()), [MANY / 4] * 4) < unlikely(3)


def test_a_salt_and_a_unit_do_not_make_the_text_of_another_pair() -> None:
    pairs = [("a:b", "c"), ("a", "b:c"), ("a%3Ab", "c"), ("a%253Ab", "c")]
    places = {Design(salt, NAMES[:2])._place(unit.encode()) for salt, unit in pairs}
    assert len(places) == len(pairs)


# -- other processes ---------------------------------------------------------------------------------------------------
def _arms(salt: str) -> list[Assignment]:
    design = Design(salt, NAMES[:5], shares=(0.01, 0.5), holdout=0.05, program="p", overrides={"u7": "c3"})
    return [design.assign(f"u{number}", number % 2) for number in range(2_000)]


def _told(salt: str) -> tuple[int, list[Assignment]]:
    return os.getpid(), _arms(salt)


@pytest.mark.long
def test_four_processes_agree_and_one_begun_after_them_whatever_the_seed_of_their_hashes() -> None:
    """Each answers once and ends, so the fifth is begun when one of the four has ended, as after a restart."""
    with multiprocessing.get_context("spawn").Pool(4, maxtasksperchild=1) as pool:
        found = pool.map(_told, ["it"] * 5, chunksize=1)
    assert len({process for process, _ in found}) == 5
    assert [arms for _, arms in found] == [_arms("it")] * 5


def test_the_hash_is_the_same_in_every_release() -> None:
    """Else an update of this library would move users between arms in the middle of an experiment."""
    design = Design("salt", NAMES[:4])
    assert [design.assign(f"u{number}").variant for number in range(8)] == PINNED
    assert design._place(b"u0") == PINNED_PLACE


# -- what is not left to chance ----------------------------------------------------------------------------------------
def test_overrides_are_followed_and_tell_nothing() -> None:
    design = Design("salt", NAMES[:3], shares=(0.0, 0.5), overrides={"me": "c1", "you": "control"})
    assert design.assign("me", 0) == Assignment("c1", 1.0, 0, 0, "override")
    assert design.assign("you", 1).variant == "control"
    assert not design.assign("me", 0).random


def test_the_holdout_of_a_program_is_the_same_in_all_its_experiments_and_gets_control() -> None:
    def held(salt: str, program: str, holdout: float = 0.1) -> set[str]:
        design = Design(salt, NAMES[:2], holdout=holdout, program=program)
        told = {unit: design.assign(unit) for unit in map(str, range(20_000))}
        assert {one.variant for one in told.values() if one.how == "holdout"} <= {"control"}
        assert not any(one.random for one in told.values() if one.how == "holdout")
        return {unit for unit, one in told.items() if one.how == "holdout"}

    one = held("first", "p")
    assert abs(len(one) / 20_000 - 0.1) < 0.01
    assert one == held("second", "p")
    assert one < held("first", "p", 0.2), "a larger one holds the same and others"
    assert one != held("first", "q")
    assert not held("first", "p", 0.0)


def test_a_stage_without_share_gives_control_and_nobody_is_exposed() -> None:
    design = Design("salt", NAMES[:2], shares=(0.0, 0.5))
    assert {design.assign(str(number), 0) for number in range(1_000)} == {Assignment("control", 1.0, 0, 0, "hash")}


def test_past_the_cap_newcomers_get_control_and_those_who_were_in_the_candidate_stay() -> None:
    design = Design("salt", NAMES[:3], shares=(0.5,))
    before = {unit: design.assign(unit).variant for unit in map(str, range(2_000))}
    for unit, arm in before.items():
        newcomer = design.assign(unit, 0, 0b01)
        known = design.assign(unit, 0, 0b01, lambda arm=arm: arm)  # type: ignore[misc]
        assert known.variant == arm
        assert newcomer.variant == ("control" if arm == "c0" else arm)
        if arm == "c0":
            assert known == Assignment("c0", 1.0, 0, 1, "kept")
    assert design.propensities(0, 0b11) == (1.0, 0.0, 0.0)
    assert {design.assign(unit, 0, 0b11).variant for unit in before} == {"control"}


def test_a_candidate_is_full_once_it_has_had_its_users_in_the_stage() -> None:
    design = Design("salt", NAMES[:3], shares=(0.1, 0.5))
    arms = [
        Arm(0, "c0", 0, 99, 99, 0),
        Arm(1, "control", 0, 99, 99, 0),
        Arm(1, "c0", 0, 4, 3, 0),
        Arm(1, "c0", 2, 1, 1, 0),
        Arm(1, "c1", 0, 6, 0, 0),
        Arm(1, "gone", 0, 99, 0, 0),
    ]
    assert [design.full(arms, 1, most) for most in (None, 7, 6, 5, 0)] == [0, 0, 0b10, 0b11, 0b11]
    assert design.full([], 1, 1) == 0
    assert design.full([], 0, 0) == 0b11


def test_an_arm_may_be_decided_elsewhere_with_declared_weights() -> None:
    design = Design("salt", NAMES[:3], weights=(2, 1, 1), assign=lambda unit: "c1" if unit == "a" else "control")
    assert design.assign("a") == Assignment("c1", 0.25, 0, 0, "elsewhere")
    assert design.assign("b") == Assignment("control", 0.5, 0, 0, "elsewhere")
    with pytest.raises(ConfigError, match="no variant"):
        Design("salt", NAMES[:2], assign=lambda unit: "nobody").assign("u")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"salt": ""}, "salt=''"),
        ({"variants": ("control",)}, "1 to 7 candidates"),
        ({"variants": tuple("abcdefghi")}, "leave some"),
        ({"variants": ("a", "a")}, "twice"),
        ({"variants": ("a", "")}, "must be a name"),
        ({"weights": (1,)}, "one number for each"),
        ({"weights": (1, 0)}, "positive"),
        ({"weights": (1, True)}, "positive"),
        ({"weights": (1, math.inf)}, "positive"),
        ({"shares": ()}, "shares"),
        ({"shares": (0.5, 0.1)}, "none below"),
        ({"shares": (0.5, 1.1)}, "0 to 1"),
        ({"holdout": 1.0}, "holdout"),
        ({"holdout": -0.1}, "holdout"),
        ({"overrides": {"u": "nobody"}}, "'nobody'"),
        ({"shares": (0.1, 0.5), "assign": str}, "rollout="),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Design(**{"salt": "salt", "variants": ("control", "cot"), **options})
