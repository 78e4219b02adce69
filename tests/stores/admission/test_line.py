"""The waiting line: FIFO within a priority, fair between groups, without starvation."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.stores.admission.line import MAX_BYPASSES, WaitingLine
from dspy_prod.stores.base import Reservation
from tests.stores.support import ask

_seq = itertools.count(1)


def reservation(priority: int = 1, fair: str = "", seq: int | None = None) -> Reservation:
    made = ask(priority=priority, fair=fair)
    made.seq = next(_seq) if seq is None else seq
    return made


def line_of(*reservations: Reservation) -> WaitingLine:
    line = WaitingLine()
    for each in reservations:
        line.push(each)
    return line


def drain(line: WaitingLine) -> list[Reservation]:
    served = []
    while line:
        head = line.head()
        assert line.pop() is head
        served.append(head)
    assert line.head() is None
    return served


def test_first_in_first_out() -> None:
    reservations = [reservation() for _ in range(5)]
    assert drain(line_of(*reservations)) == reservations


def test_higher_priority_goes_first() -> None:
    low, normal, high = reservation(2), reservation(1), reservation(0)
    assert drain(line_of(low, normal, high)) == [high, normal, low]


def test_a_ticket_that_comes_back_gets_its_old_place() -> None:
    first, second, third = reservation(), reservation(), reservation()
    line = line_of(first, second, third)
    assert line.pop() is first
    line.push(first)
    assert drain(line) == [first, second, third]
    line = line_of(first, third)
    line.push(second)
    assert drain(line) == [first, second, third]


def test_groups_take_turns() -> None:
    crowd = [reservation(fair="crowd") for _ in range(5)]
    single = reservation(fair="single")
    assert drain(line_of(*crowd, single)) == [crowd[0], single, *crowd[1:]]


def test_the_head_stays_until_something_happens() -> None:
    a, b = reservation(fair="a"), reservation(fair="b")
    line = line_of(a, b)
    assert [line.head() for _ in range(3)] == [a, a, a]


def test_removing_from_anywhere() -> None:
    reservations = [reservation(priority, fair) for priority in (0, 1, 2) for fair in ("a", "b")]
    line = line_of(*reservations)
    assert line.remove(reservations[3])
    assert not line.remove(reservations[3])
    assert not line.remove(reservation(fair="nobody"))
    assert len(line) == 5
    assert reservations[3] not in list(line)
    assert drain(line) == reservations[:3] + reservations[4:]


def test_low_priority_is_served_after_so_many_overtakings() -> None:
    low = reservation(2)
    line = line_of(low)
    served = []
    while low not in served:
        line.push(reservation(0))
        served.append(line.pop())
    assert len(served) == MAX_BYPASSES + 1


def test_no_priority_starves_while_another_one_waits_below_it() -> None:
    """The turn of the overtaken goes to the one who waits longest, not always to the lowest priority."""
    normal = reservation(1)
    line = line_of(normal)
    served = []
    for _ in range(5 * MAX_BYPASSES):
        line.push(reservation(0))
        line.push(reservation(2))
        served.append(line.pop())
    assert normal in served


def test_ahead_of_counts_who_is_certainly_served_before() -> None:
    line = line_of(reservation(1), reservation(1), reservation(0), reservation(1, "other"))
    assert line.ahead_of(reservation(1)) == 2
    assert line.ahead_of(reservation(1, seq=0)) == 0
    assert line.ahead_of(reservation(2)) == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_nobody_is_lost_and_groups_stay_in_order(steps: list[tuple[int, str, bool]]) -> None:
    line = WaitingLine()
    waiting: list[Reservation] = []
    served: list[Reservation] = []
    pushed = 0
    for priority, fair, pop in steps:
        if pop and waiting:
            taken = line.pop()
            waiting.remove(taken)
            served.append(taken)
        else:
            made = reservation(priority, fair)
            waiting.append(made)
            line.push(made)
            pushed += 1
        assert len(line) == len(waiting) == len(list(line))
    served.extend(drain(line))
    assert len(served) == len({id(each) for each in served}) == pushed
    for priority in range(3):
        for fair in "abc":
            group = [t.seq for t in served if (t.priority, t.fair) == (priority, fair)]
            assert group == sorted(group)
