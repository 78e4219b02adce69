"""The stages of a rollout: what they say, and what they refuse."""

from __future__ import annotations

import datetime as dt
import pickle
from typing import Any

import pytest

from dspy_prod.errors import ConfigError
from dspy_prod.options.experiments import Rollout


def test_the_default_begins_with_one_user_in_a_hundred_and_hurries_nobody() -> None:
    rollout = Rollout()
    assert rollout.shares == (0.01, 0.05, 0.25, 0.5)
    assert not rollout.shadow
    assert [rollout.least_users(stage) for stage in range(4)] == [25, 100, 400, 1_600]
    assert [rollout.most_users(stage) for stage in range(4)] == [None] * 4
    assert (rollout.least_time(0), rollout.most_time(0), rollout.on_inconclusive) == (300.0, None, "pause")


def test_a_shadow_stage_has_no_users() -> None:
    rollout = Rollout(stages=("shadow", 0.01, 0.05, 0.25, 0.5), max_users=(0, 50, 250, None, None))
    assert rollout.shadow
    assert rollout.shares == (0.0, 0.01, 0.05, 0.25, 0.5)
    assert [rollout.least_users(stage) for stage in range(5)] == [0, 25, 100, 400, 1_600]
    assert [rollout.most_users(stage) for stage in range(5)] == [0, 50, 250, None, None]


def test_one_value_is_for_all_stages_and_several_are_for_each() -> None:
    rollout = Rollout(
        stages=[0.1, 0.5],
        max_users=1_000,
        min_users=(10, 20),
        min_time=dt.timedelta(minutes=1),
        max_time=(3_600, None),
    )
    assert [rollout.most_users(stage) for stage in (0, 1)] == [1_000, 1_000]
    assert [rollout.least_users(stage) for stage in (0, 1)] == [10, 20]
    assert [rollout.least_time(stage) for stage in (0, 1)] == [60.0, 60.0]
    assert [rollout.most_time(stage) for stage in (0, 1)] == [3_600.0, None]


def test_it_is_a_value() -> None:
    rollout = Rollout(stages=("shadow", 0.5), min_users=5)
    assert rollout == Rollout(stages=["shadow", 0.5], min_users=5)
    assert hash(rollout) == hash(pickle.loads(pickle.dumps(rollout)))
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout
    with pytest.raises(ConfigError, match="does not change"):
        rollout.stages = (0.5,)  # type: ignore[misc]


def test_the_last_stage_may_be_capped_below_what_a_next_one_would_need() -> None:
    assert Rollout(stages=(0.1, 0.5), max_users=(25, 50)).most_users(1) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (0.5, 0.1)}, "stages: 0.1 after 0.5.*sort"),
        ({"stages": (0.1, 0.1)}, "stages: 0.1 after 0.1"),
        ({"stages": (0.1, "shadow")}, "can only come first.*move it"),
        ({"stages": ("shadow", "shadow")}, "can only come first"),
        ({"stages": ("shadow",)}, "could never end; add shares"),
        ({"stages": ()}, "stages: an empty rollout.*give one"),
        ({"stages": 0.1}, "stages: give the shares in a tuple"),
        ({"stages": "shadow"}, "stages: give the shares in a tuple"),
        ({"stages": (0.1, 1.0)}, "leaving no control"),
        ({"stages": (0, 0.5)}, "no share"),
        ({"stages": (True,)}, "no share"),
        ({"max_users": (1, 2)}, "max_users has 2 values for 4 stages; give one for each"),
        ({"min_users": (1, 2)}, "min_users has 2 values"),
        ({"min_time": (1, 2)}, "min_time has 2 values"),
        ({"max_time": (1e3, 2e3)}, "max_time has 2 values"),
        ({"max_users": -1}, "max_users: -1 is no number of users"),
        ({"max_users": 1.5}, "max_users: 1.5 is no number of users"),
        ({"max_users": (1, True, 1, 1)}, "no number of users"),
        ({"max_users": 10}, "below its min_users=25.*raise max_users or lower min_users"),
        ({"stages": ("shadow", 0.1), "max_users": (5, 50)}, "say 0"),
        ({"min_time": -1}, "min_time: -1 is no duration"),
        ({"min_time": float("inf")}, "no duration"),
        ({"max_time": 10}, "max_time=10 of the stage 0.01 is below its min_time=300; raise max_time"),
        ({"on_inconclusive": "paus"}, "did you mean 'pause'"),
        ({"stage": (0.5,)}, "did you mean 'stages'"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rollout(**options)
