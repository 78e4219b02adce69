"""The same is told at once, and then once in a while with a count."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_prod.alerts import folding
from dspy_prod.alerts.folding import Folding
from dspy_prod.alerts.notices import Notice


def notice(subject: str = "m", text: str = "t") -> Notice:
    return Notice("breaker_opened", subject, "warning", text, 0.0)


def test_the_first_is_told_at_once_and_the_others_when_the_window_ends() -> None:
    """With the words of the last one, and how many came before it."""
    fold = Folding(60)
    assert fold.next_due() == inf
    assert fold.note(notice(), 0) == notice()
    assert fold.note(notice(text="second"), 10) is None
    assert fold.note(notice(text="third"), 59) is None
    assert fold.due(59.9) == []
    assert fold.next_due() == 60
    assert fold.due(60) == [notice(text="third")._replace(folded=1)]
    assert fold.note(notice(), 61) is None  # another window has begun
    assert fold.due(119) == []


def test_subjects_are_told_apart_and_quiet_ones_forgotten() -> None:
    """Two circuits that open are two messages."""
    fold = Folding(60)
    assert fold.note(notice("a"), 0)
    assert fold.note(notice("b"), 0)
    assert fold.due(60) == []
    assert fold.next_due() == inf
    assert fold.note(notice("a"), 61)


def test_the_rest_can_be_had_before_its_time() -> None:
    """As the program ends; and the window goes on, should it not end."""
    fold = Folding(60)
    fold.note(notice(), 0)
    fold.note(notice(), 1)
    assert fold.rest(2) == [notice()]
    assert fold.note(notice(), 3) is None
    assert fold.next_due() == 62


def test_strangers_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many subjects there are."""
    monkeypatch.setattr(folding, "MOST", 3)
    fold = Folding(60)
    for number in range(10):
        fold.note(notice(str(number)), number)
    assert len(fold._windows) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 30)), max_size=60))
def test_every_notice_is_told_or_counted(steps: list[tuple[str, float]]) -> None:
    """Whenever they come: messages and what they count are as many as there were notices."""
    fold, now, told = Folding(20), 0.0, []
    for subject, pause in steps:
        now += pause
        told += fold.due(now)
        at_once = fold.note(notice(subject), now)
        told += [] if at_once is None else [at_once]
    told += fold.rest(now)
    assert sum(1 + each.folded for each in told) == len(steps)
