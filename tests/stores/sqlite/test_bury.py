"""What a dead process held is charged as soon as somebody knows that it is dead."""

from __future__ import annotations

import os
from pathlib import Path

from dspy_prod.stores.base import AccountState
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, ask, granted, settlement


def test_it_is_charged_in_full_and_a_late_settlement_replaces_the_charge(tmp_path: Path) -> None:
    """Should it live after all, nothing is lost."""
    path = str(tmp_path / "state.db")
    one, other = SqliteStore(path), SqliteStore(path)
    held = granted(one, ask(5 * CENT))
    one.flush(10)
    other.runs.bury(os.getpid() + 1)
    assert other.account("day") == AccountState(0, 5 * CENT, 0)
    other.runs.bury(os.getpid())
    assert other.account("day") == AccountState(5 * CENT, 0, 5 * CENT)
    own = granted(other, ask(2 * CENT))
    other.runs.bury(os.getpid())
    assert other.account("day").held == 2 * CENT, "its own holds are those of somebody who lives"
    one.settle(held, settlement(held, CENT))
    one.flush(10)
    other.settle(own, settlement(own, CENT))
    other.flush(10)
    assert (other.account("day").spent, other.account("day").held) == (2 * CENT, 0)
    one.close()
    other.close()
