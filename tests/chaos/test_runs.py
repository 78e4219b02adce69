"""The short form of `python -m tests.chaos`: worker processes on one file, while something befalls them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.afflictions import AFFLICTIONS, FILES
from tests.chaos.runs import run


@pytest.mark.long
@pytest.mark.parametrize("afflictions", [["killed"], ["clock", "full disk"]], ids=" and ".join)
def test_the_books_are_right_whatever_befalls(tmp_path: Path, afflictions: list[str]) -> None:
    """The provider bills no more than the budget, the ledger no less than the provider; every error has its class."""
    result = run(5, 60, tmp_path, afflictions)
    assert result.violations == []
    assert result.ends.total() > 0


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("affliction", [*AFFLICTIONS, *FILES])
def test_the_books_are_right_after_each_of_all(tmp_path: Path, affliction: str) -> None:
    """The same for everything that can befall, one after another."""
    assert run(7, 300, tmp_path, [affliction]).violations == []
