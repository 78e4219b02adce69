"""The demo's experiment: a version that fails every call is rolled back, and next to nobody meets it."""

from __future__ import annotations

import logging

from dspy_prod.cli.demo.experiment import Act, act, lines


def test_a_version_that_fails_is_rolled_back_again_and_again() -> None:
    """Each run is one of its own, also in one process; nobody's logging is changed."""
    level = logging.getLogger("dspy").level
    for _ in range(3):
        found = act()
        assert found.serves == "control"
        assert 1 <= found.hurt <= 6
        assert found.hurt <= found.came
        assert "error_rate" in found.reason
    assert logging.getLogger("dspy").level == level


def test_what_is_printed_is_short_and_says_who_was_hurt() -> None:
    told = lines(Act(312, 4, "control", "new is worse on error_rate", 1.04))
    assert len(told) <= 10
    assert "312 users came, 4 users met it" in told[1]
    assert "1 user met it" in lines(Act(312, 1, "control", "worse", 1.0))[1]


def test_what_was_not_decided_is_not_claimed() -> None:
    (line,) = lines(Act(5_000, 0, None, "too few users", 9.0))
    assert line == "Experiment: not decided after 5,000 users: too few users."
