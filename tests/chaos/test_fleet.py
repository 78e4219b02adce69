"""The short form of `python -m tests.chaos.fleet`: several processes on one store, while something befalls them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.fleet.scenes import Result, Size, dollar, pace, same, storm

SMALL = Size(processes=2, callers=8, seed=3)
STORES = pytest.mark.parametrize("store", ["sqlite", "redis"])


def told(result: Result) -> str:
    """What a reader of a failure wants to know."""
    return f"{result.violations}; ends {dict(result.ends)}; faults {dict(result.faults)}; {result.figures}"


@pytest.mark.long
@STORES
def test_a_budget_is_never_exceeded_though_workers_are_killed(tmp_path: Path, store: str) -> None:
    """The bill is at most the budget, the ledger at least the bill, and all that is confirmed was billed."""
    result = dollar(store, tmp_path, SMALL, usd=0.01, kills=2, patience=60)
    assert not result.violations, told(result)
    assert result.ends["BudgetExceededError"] > 0


@pytest.mark.long
@STORES
def test_the_books_are_right_after_everything_at_once(tmp_path: Path, store: str) -> None:
    """Provider, workers and store fail in every way: each call ends in time and typed, and then nothing is missing."""
    result = storm(store, tmp_path, SMALL, seconds=3)
    assert not result.violations, told(result)
    assert result.ends["answer"] > 0
    assert result.faults.total() > 0


@pytest.mark.long
def test_processes_whose_clocks_differ_share_the_pace_of_a_limit(tmp_path: Path) -> None:
    """In the first seconds no more is sent than is theirs of a minute's requests, and much of it is."""
    result = pace("redis", tmp_path, SMALL, seconds=6)
    assert not result.violations, told(result)
    assert result.ends["answer"] >= 30


@pytest.mark.long
@STORES
def test_one_question_of_all_is_asked_once(tmp_path: Path, store: str) -> None:
    """By one of all processes where the store knows of flights, else by one caller of each process."""
    result = same(store, tmp_path, SMALL)
    assert not result.violations, told(result)


@pytest.mark.chaos
@pytest.mark.timeout(600)
@STORES
def test_a_dollar_is_spent_whole(tmp_path: Path, store: str) -> None:
    """At least 99 cents of it, and not a nano-USD more, by four processes of 64 callers whose clocks differ."""
    result = dollar(store, tmp_path, Size(seed=2))
    assert not result.violations, told(result)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@STORES
@pytest.mark.parametrize("seed", [11, 12])
def test_the_books_are_right_after_a_storm_of_a_minute(tmp_path: Path, store: str, seed: int) -> None:
    """Four processes of 64 callers, everything at once."""
    result = storm(store, tmp_path, Size(seed=seed), seconds=40, usd=0.2 if seed % 2 else 1_000.0)
    assert not result.violations, told(result)
