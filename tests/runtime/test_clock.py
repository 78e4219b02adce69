"""The machine's clock is one object."""

from __future__ import annotations

import copy
import pickle

from dspy_prod.runtime.clock import SYSTEM_CLOCK


def test_the_system_clock_stays_itself() -> None:
    """Pickled or copied it is the same one: stores are told apart by their clocks, and one file has one store."""
    assert pickle.loads(pickle.dumps(SYSTEM_CLOCK)) is SYSTEM_CLOCK
    assert copy.deepcopy(SYSTEM_CLOCK) is copy.copy(SYSTEM_CLOCK) is SYSTEM_CLOCK
