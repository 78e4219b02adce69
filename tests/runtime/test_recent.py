"""The least recently used value goes first."""

from __future__ import annotations

from dspy_prod.runtime.recent import Recent


def test_what_was_used_last_is_kept() -> None:
    """Finding a value and keeping it again both count as a use."""
    recent: Recent[int] = Recent(3)
    for key, value in (("a", 1), ("b", 2), ("c", 3)):
        recent.keep(key, value)
    assert recent.find("a") == 1
    recent.keep("b", 2)
    recent.keep("d", 4)
    assert recent.find("c") is None
    assert sorted(recent.all()) == [1, 2, 4]


def test_the_first_value_of_a_key_stays() -> None:
    """Threads that made one each go on with the same."""
    recent: Recent[str] = Recent(2)
    assert recent.keep("a", "first") == "first"
    assert recent.keep("a", "second") == "first"
