"""The secrets this process holds are known by their value, whatever they look like."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import dspy_prod
from dspy_prod.privacy import error_text as known
from dspy_prod.privacy.error_text import error_text, scrubbed
from dspy_prod.privacy.names import secrets_in
from dspy_prod.runtime import living

PLAIN = "correct horse battery"
"""A secret that looks like none."""


def make_lm(key: str, **arguments: Any) -> dspy_prod.LM:
    return dspy_prod.LM("openai/m", api_key=key, store="memory://known", cache=False, **arguments)


class Growing(weakref.WeakSet[Any]):
    """A set to which another thread adds an LM, once, while it is being read."""

    more: Any = None

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item
            if self.more is not None:
                more, self.more = self.more, None
                self.data.add(weakref.ref(more))


def test_a_key_is_hidden_while_another_thread_makes_lms(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an LM was being made elsewhere, keys of all LMs went into logs as they were."""
    lms, late = [make_lm(f"{PLAIN} {number}") for number in range(20)], make_lm("another secret")
    growing = Growing(lms)
    growing.more = late
    monkeypatch.setattr(living, "LIVE", growing)

    text = error_text(RuntimeError(f"refused: {PLAIN} 7 and another secret"))

    assert growing.more is None
    assert text == "RuntimeError: refused: *** and ***"


def test_a_changed_environment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is rotated while the program runs is hidden like the first."""
    assert scrubbed("opensesame1") == "opensesame1"
    monkeypatch.setenv("MY_API_KEY", "opensesame1")
    assert scrubbed("opensesame1") == "***"
    monkeypatch.setenv("MY_API_KEY", "opensesame2")
    assert scrubbed("opensesame1 opensesame2") == "opensesame1 ***"
    monkeypatch.setenv("SIGNING_KEY", "opensesame3")
    assert scrubbed("opensesame3") == "***"
    monkeypatch.delenv("MY_API_KEY")
    assert scrubbed("opensesame2") == "opensesame2"


def test_an_unchanged_environment_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error that was told, a thousand in an outage, cost a search through every variable."""
    searched: list[int] = []
    monkeypatch.setattr(known, "secrets_in", lambda settings: searched.append(len(settings)) or set())
    monkeypatch.setattr(living, "LIVE", weakref.WeakSet())
    monkeypatch.setenv("SOMETHING_NEW", "x")

    for _ in range(10):
        scrubbed("text")

    assert searched == [len(os.environ)]


def test_a_variable_deleted_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change the environment at any time."""

    class Shrinking(dict[str, str]):
        reads = 0

        def items(self) -> Any:
            self.reads += 1
            if self.reads == 1:
                raise KeyError("GONE")
            return super().items()

    monkeypatch.setattr(os, "environ", Shrinking(MY_API_KEY="opensesame1"))

    assert known.in_environment() == {"opensesame1"}


def test_a_bearer_token_is_known_with_and_without_its_scheme() -> None:
    """A provider echoes either; a token too short to be told from words garbles no text."""
    assert secrets_in({"headers": {"Authorization": "Bearer abcdef"}}) == {"Bearer abcdef", "abcdef"}
    assert secrets_in({"headers": {"Authorization": "Bearer a"}}) == {"Bearer a"}


def test_the_longest_secret_is_hidden_first() -> None:
    """Else what one adds to another would be left to read."""
    assert known.blotted("abcdef-ghijkl abcdef", {"abcdef", "abcdef-ghijkl"}) == "*** ***"
