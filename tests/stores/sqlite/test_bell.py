"""The bytes that tell processes of a change: also when a process dies in between, or the file goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspy_prod.stores.sqlite import bell
from dspy_prod.stores.sqlite.bell import GIVEN_UP, LOOK, STALE, Bell


class Moment:
    """In place of the module `time`, on a clock that stands still."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Moment:
    moment = Moment()
    monkeypatch.setattr(bell, "time", moment)
    return moment


@pytest.fixture
def two(tmp_path: Path, moment: Moment) -> tuple[Bell, Bell]:
    return Bell(str(tmp_path / "state.db")), Bell(str(tmp_path / "state.db"))


def test_it_says_the_same_until_somebody_rings(two: tuple[Bell, Bell]) -> None:
    one, other = two
    before = other.token
    assert other.token == before
    one.ring()
    after = other.token
    assert after != before
    assert other.token == after


def test_while_a_change_is_under_way_the_tables_are_read_again_and_again(
    two: tuple[Bell, Bell], moment: Moment
) -> None:
    """But not for every call; after it they are read once more."""
    one, other = two
    one.begin()
    first = other.token
    assert other.token == first
    moment.now += STALE * 1.1
    second = other.token
    assert second != first
    one.ring()
    assert other.token not in (first, second)


def test_the_change_of_a_process_that_died_is_given_up(two: tuple[Bell, Bell], moment: Moment) -> None:
    one, other = two
    one.begin()
    assert other.token
    moment.now += GIVEN_UP + 1
    assert other.token
    settled = other.token
    moment.now += STALE * 3
    assert other.token == settled


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_goes_is_noticed(two: tuple[Bell, Bell], moment: Moment, replaced: bool) -> None:
    """Both go on with the new one."""
    one, other = two
    assert one.token == other.token
    one.path.unlink()
    if replaced:
        Bell(str(one.path).removesuffix("-board")).ring()
    moment.now += LOOK + 0.1
    assert one.token == other.token
    one.ring()
    assert one.token == other.token


def test_a_file_that_was_truncated_is_made_whole_at_the_next_look(two: tuple[Bell, Bell], moment: Moment) -> None:
    """A program that makes a call now and then goes on; one in the middle of many is ended by the system."""
    one, other = two
    assert one.token == other.token
    one.path.write_bytes(b"")
    moment.now += LOOK + 0.1
    assert other.token == one.token
    one.ring()
    assert one.token == other.token


def test_without_a_file_the_tables_are_read_twice_a_second(tmp_path: Path, moment: Moment) -> None:
    """A directory that nobody may write to, or that is not there."""
    alone = Bell(str(tmp_path / "missing" / "state.db"))
    before = alone.token
    assert alone.token == before
    moment.now += LOOK + 0.1
    assert alone.token != before
