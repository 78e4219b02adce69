"""What a limiter counts in the last minute, slot by slot."""

from __future__ import annotations

import pytest

from dspy_prod.stores.admission.slices import RequestPacer
from dspy_prod.stores.admission.window import SLOT, Window

NOW = 1_000.0


def test_a_call_that_left_late_is_counted_from_then_on() -> None:
    """It leaves the window a minute after it was sent, not after it was granted."""
    window = Window(0.0, NOW)
    slot = window.add(NOW, 70)
    window.advance(NOW + 10)
    moved = window.move(slot, NOW + 10, 70)
    assert moved == slot + 10 / SLOT
    assert (window.requests, window.tokens, window.held) == (1, 70, 70)
    window.advance(NOW + 65)
    assert (window.requests, window.tokens) == (1, 70)
    window.settle(moved, 0, 70, 30)
    assert (window.tokens, window.held) == (30, 0)
    window.advance(NOW + 71)
    assert (window.requests, window.tokens, window.held) == (0, 0, 0)


def test_a_call_that_left_within_its_slot_stays_there() -> None:
    """Nothing is counted twice, and nothing is given back."""
    window = Window(0.0, NOW)
    slot = window.add(NOW, 70)
    assert window.move(slot, NOW + SLOT / 2, 70) == slot
    assert (window.requests, window.tokens, window.held) == (1, 70, 70)


def test_a_forgotten_call_that_leaves_after_all_is_counted_once() -> None:
    """More than a minute late: its old slot has gone, and gives nothing back."""
    window = Window(0.0, NOW)
    slot = window.add(NOW, 70)
    window.advance(NOW + 100)
    assert window.requests == 0
    window.move(slot, NOW + 100, 70)
    assert (window.requests, window.tokens, window.held) == (1, 70, 70)


def log_of(pacer: RequestPacer) -> list[tuple[float, ...]]:
    """(calls, first, last) of each group."""
    return [tuple(group) for group in pacer._log]


def test_a_late_call_takes_its_place_among_those_that_left_before_it() -> None:
    """The log stays in order, so that the oldest of a burst decides when the next may go."""
    pacer = RequestPacer(4, 1.0, NOW)
    first, second, third = (pacer.push(NOW + step * 0.1) for step in range(3))
    late = NOW + 0.15
    assert pacer.move(first, late) == late
    assert log_of(pacer) == [(1, second, second), (1, late, late), (1, third, third)]
    last = NOW + 5
    assert pacer.move(second, last) == last
    assert log_of(pacer) == [(1, late, late), (1, third, third), (1, last, last)]


@pytest.mark.parametrize("later", [NOW - 0.5, NOW - 1.0], ids=["earlier", "much earlier"])
def test_a_call_is_never_dated_back(later: float) -> None:
    """A clock that two processes read differently must not make room."""
    pacer = RequestPacer(4, 1.0, NOW)
    nominal = pacer.push(NOW)
    assert pacer.move(nominal, later) == nominal
    assert log_of(pacer) == [(1, nominal, nominal)]


def test_a_call_that_has_left_the_log_is_not_brought_back() -> None:
    """What nobody counts any more has no place to be moved from."""
    pacer = RequestPacer(1, 1.0, NOW)
    old = pacer.push(NOW)
    new = pacer.push(NOW + 2)
    assert pacer.move(old - 1, NOW + 3) == old - 1
    assert log_of(pacer) == [(1, new, new)]


def test_a_call_that_left_the_slice_gives_back_nobody_else_s_place() -> None:
    """Calls of one group that came long after each other: early ones were given back twice, and one more could go."""
    pacer = RequestPacer(128, 5.0, 0.0)
    early = [pacer.push(0.0) for _ in range(3)]
    for _ in range(128):
        pacer.push(20.0)
    assert not any(pacer.refund(nominal) for nominal in early)
    assert pacer.room(20.0) == 0
