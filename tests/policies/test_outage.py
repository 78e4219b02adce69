"""When an outage of a run begins, who ends it, and how long one pauses in it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from dspy_prod import ConfigError, Run
from dspy_prod.policies.outage import LONGEST_PAUSE, Outages, pause

ONE = {"one": "openai/one"}
BOTH = {"one": "openai/one", "two": "openai/two"}


class Waiting:
    """Somebody who waits, and how often it was woken."""

    def __init__(self) -> None:
        self.woken = 0

    def tell(self) -> None:
        self.woken += 1


def test_it_lasts_from_the_first_failure_until_an_answer() -> None:
    outages = Outages(120)
    first = outages.failed(ONE, 1000.0)
    assert (first.began, first.until, first.models, first.news) == (1000.0, 1120.0, ("openai/one",), True)
    later = outages.failed(ONE, 1060.0)
    assert (later.began, later.until, later.news) == (1000.0, 1120.0, False)
    assert outages.answered("one", 1070.0) == 70.0
    assert outages.answered("one", 1071.0) is None
    again = outages.failed(ONE, 1080.0)
    assert (again.began, again.news) == (1080.0, True)


def test_a_call_with_several_upstreams_counts_from_the_one_that_fell_silent_last() -> None:
    outages = Outages(120)
    outages.failed(ONE, 1000.0)
    assert outages.failed(BOTH, 1050.0).began == 1050.0
    outages.answered("two", 1060.0)
    assert outages.failed(ONE, 1070.0).began == 1000.0
    assert outages.failed(BOTH, 1070.0).began == 1070.0


def test_the_answer_of_one_upstream_says_nothing_of_another() -> None:
    outages = Outages(120)
    outages.failed(ONE, 1000.0)
    assert outages.answered("two", 1010.0) is None
    assert outages.failed(ONE, 1020.0).began == 1000.0


def test_who_waits_is_woken_by_an_answer_and_nobody_waits_for_what_is_over() -> None:
    outages, waiting = Outages(120), Waiting()
    outages.failed(BOTH, 1000.0)
    assert outages.enter(BOTH, waiting)
    assert outages.models == ("openai/one", "openai/two")
    outages.answered("two", 1001.0)
    assert waiting.woken == 1
    assert not outages.enter(BOTH, Waiting())


def test_a_silence_that_nobody_hears_begins_anew() -> None:
    """Nobody asked for ten minutes: the next failure is not the end of the run's patience."""
    outages = Outages(120)
    outages.failed(ONE, 1000.0)
    assert outages.failed(ONE, 1119.0).began == 1000.0
    assert outages.failed(ONE, 1238.0).began == 1000.0, "whoever comes when it is given up gives up too"
    assert outages.failed(ONE, 1838.0).began == 1838.0


def test_while_somebody_waits_it_does_not_begin_anew() -> None:
    outages, waiting = Outages(5), Waiting()
    outages.failed(ONE, 1000.0)
    outages.enter(ONE, waiting)
    assert outages.failed(ONE, 1060.0).began == 1000.0
    outages.leave(ONE, waiting, 1061.0)
    assert outages.models == ()
    assert outages.failed(ONE, 1065.0).began == 1000.0
    assert outages.failed(ONE, 1071.0).began == 1071.0


def test_who_waits_in_the_parent_does_not_in_a_forked_child() -> None:
    """Its first call, however late, was told that the run's patience was over."""
    outages, waiting = Outages(5), Waiting()
    outages.failed(ONE, 1000.0)
    outages.enter(ONE, waiting)
    outages.after_fork()
    assert outages.models == ()
    assert outages.failed(ONE, 1060.0).began == 1060.0


@pytest.mark.parametrize(("number", "low", "high"), [(1, 0.25, 0.5), (2, 0.5, 1.0), (5, 4.0, 8.0), (9999, 5.0, 10.0)])
def test_pauses_double_up_to_ten_seconds_with_half_of_them_jitter(number: int, low: float, high: float) -> None:
    assert pause(number, [None], lambda: 0.0) == low
    assert pause(number, [None], lambda: 1.0) == high <= LONGEST_PAUSE


def test_what_the_upstreams_tell_is_waited_for_once_all_tell_it() -> None:
    assert pause(1, [25.0, 40.0], lambda: 1.0) == 25.5
    assert pause(9, [25.0, 40.0], lambda: 1.0) == 35.0
    assert pause(1, [25.0, None], lambda: 1.0) == 0.5
    assert pause(1, [0.0], lambda: 1.0) == 0.5


@pytest.mark.parametrize("impossible", [-1, float("inf"), float("nan"), True, "1 minute", dt.timedelta(seconds=-1)])
def test_an_impossible_patience_is_refused_by_name(impossible: Any) -> None:
    with pytest.raises(ConfigError, match="Run: outage: must be a number of seconds"):
        Run("it", outage=impossible, store="memory://")


def test_patience_may_be_a_timedelta() -> None:
    assert Run("it", outage=dt.timedelta(minutes=2), store="memory://").outages.patience == 120.0
    assert Run("it", store="memory://").outages.patience == 0.0
