"""The secrets this process holds are known by their value, whatever they look like."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import dspy_prod
from dspy_prod.privacy import known
from dspy_prod.privacy.error_text import error_text, scrubbed
from dspy_prod.privacy.forms import blotted
from dspy_prod.privacy.names import secrets_in
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.living import living

PLAIN = "correct horse battery"
"""A secret that looks like none."""


def make_lm(key: str, **arguments: Any) -> dspy_prod.LM:
    return dspy_prod.LM("openai/m", api_key=key, store="memory://known", cache=False, **arguments)


def test_a_key_is_hidden_while_another_thread_makes_lms() -> None:
    """While an LM was being made elsewhere, keys of all LMs went into logs as they were."""
    lms = [make_lm(f"{PLAIN} {number}") for number in range(20)]
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            unshown([f"another secret {number}" for number in range(50)], "api_key")

    thread = threading.Thread(target=others)
    thread.start()
    texts = {error_text(RuntimeError(f"refused: {PLAIN} 7")) for _ in range(200)}
    stop.set()
    thread.join()

    assert texts == {"RuntimeError: refused: ***"}
    assert len(lms) == 20


def test_a_secret_is_known_as_long_as_somebody_holds_it() -> None:
    """Whoever it was given to: the address of MLflow has a password too, and no LM knows it."""
    held = unshown("postgresql://user:long-but-plain@host/mlflow")
    assert scrubbed("cannot log in with long-but-plain") == "cannot log in with ***"
    del held
    gc.collect()
    assert scrubbed("cannot log in with long-but-plain") == "cannot log in with long-but-plain"


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
    monkeypatch.setenv("SOMETHING_NEW", "x")

    for _ in range(10):
        scrubbed("text")

    assert searched.count(len(os.environ)) == 1


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
    assert blotted("abcdef-ghijkl abcdef", {"abcdef", "abcdef-ghijkl"}) == "*** ***"


def test_a_secret_that_is_deep_json_is_no_error() -> None:
    """A setting of a thousand brackets ended in a `RecursionError`."""
    deep = '{"a":' * 100_000
    assert deep in secrets_in({"api_key": deep})


@pytest.mark.parametrize("look", [known.in_environment, living], ids=["environment", "LMs"])
def test_who_looks_with_no_stack_left_is_told(look: Callable[[], object]) -> None:
    """A `RecursionError` is a `RuntimeError`: it was taken for another thread's change, and tried again for ever."""
    lm = make_lm("any")
    told: list[bool] = []

    def at(deeper: int) -> object:
        return at(deeper - 1) if deeper else look()

    def everywhere() -> None:
        for left in range(60):
            known._secrets_of.cache_clear()
            try:
                at(sys.getrecursionlimit() - left)
            except RecursionError:
                told.append(True)
            else:
                told.append(False)

    thread = threading.Thread(target=everywhere, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert set(told) == {True, False}, "the depths reach from too deep to deep enough"
    assert lm in living()
