"""Processes that wait for one limiter take turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.turns import FRESH, PASSED, PASSED_BY_HIGHER
from dspy_prod.stores.base import GRANTED, Reservation
from dspy_prod.stores.durable.transactions import Transactions
from tests.stores.sqlite.processes import Process
from tests.stores.support import FakeClock, ask, settlement

SEATS = RateLimit(concurrency=4)


def wanted(priority: int = 1) -> Reservation:
    return ask(budget=None, limit=SEATS, priority=priority)


@pytest.mark.parametrize(
    ("theirs", "own", "after"), [(1, 0, 0), (1, 1, PASSED), (0, 1, PASSED_BY_HIGHER)], ids=["high", "normal", "lower"]
)
def test_no_process_starves(tmp_path: Path, theirs: int, own: int, after: int) -> None:
    """Eight threads of one process kept four places to themselves: another one's call had none in six seconds."""
    clock = FakeClock()
    crowd, other = (Process(str(tmp_path / "state.db"), clock) for _ in range(2))
    flying = [crowd.admit(wanted(theirs)) for _ in range(4)]
    line = [crowd.admit(wanted(theirs)) for _ in range(40)]
    lonely = other.admit(wanted(own))
    went = 0
    while lonely.state != GRANTED:
        ended = flying.pop(0)
        crowd.settle(ended, settlement(ended, 0))
        crowd.run()
        while line and line[0].state == GRANTED:
            flying.append(line.pop(0))
            went += 1
        assert went <= after
        clock.advance(0.01)
        other.run()
    assert went == after
    crowd.run()
    other.settle(lonely, settlement(lonely, 0))
    other.run()
    crowd.run()
    assert line[0].state == GRANTED
    crowd.kill()
    other.kill()


def test_who_died_in_line_keeps_nobody_for_long(tmp_path: Path) -> None:
    """Its turn passes."""
    clock = FakeClock()
    crowd, other = (Process(str(tmp_path / "state.db"), clock) for _ in range(2))
    flying = [crowd.admit(wanted()) for _ in range(4)]
    other.admit(wanted(0))
    other.kill()
    ended = flying.pop()
    crowd.settle(ended, settlement(ended, 0))
    next_one = crowd.admit(wanted())
    assert next_one.state != GRANTED
    clock.advance(FRESH + 0.01)
    crowd.run()
    assert next_one.state == GRANTED
    crowd.kill()


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (RateLimit(concurrency=100), {}),
        (RateLimit(concurrency=100), {"requests": (900, 60.0)}),
        (RateLimit(concurrency=100, rpm=60_000, tpm=60_000_000), {}),
    ],
    ids=["places alone", "the provider told what is left", "paced"],
)
def test_where_there_is_room_for_all_nobody_waits_for_his_turn(
    tmp_path: Path, limit: RateLimit, told: dict[str, tuple[float, float]]
) -> None:
    """With a hundred free places each process let four go, saw the other in line, and waited: at a tenth of the pace,
    for ever.
    """
    clock = FakeClock()
    one, other = (Process(str(tmp_path / "state.db"), clock) for _ in range(2))
    flying: list[Reservation] = []
    while len(flying) < 100:  # the paced ones in several slices
        flying.append(one.admit(ask(budget=None, limit=limit)))
        clock.advance(0.01)
    one.inbox.append((Transactions.resync, ("provider", limit), told))
    lines = [[process.admit(ask(budget=None, limit=limit)) for _ in range(40)] for process in (one, other)]
    assert all(each.state == GRANTED for each in flying)
    assert not any(each.state == GRANTED for line in lines for each in line)
    for each in flying:
        one.settle(each, settlement(each, 0))
    for process in (one, other):
        process.run()
    assert all(each.state == GRANTED for line in lines for each in line)
    one.kill()
    other.kill()
