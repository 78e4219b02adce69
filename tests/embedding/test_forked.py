"""Embedders of functions in forked processes, as servers that preload the library make them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.embedding.conftest import MakeEmbedder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def in_child(say: Callable[[], str]) -> str:
    """What a forked child says."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, say().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        found = said.read()
    os.waitpid(pid, 0)
    return found


def key_of(make: MakeEmbedder, function: Any) -> str:
    """The limiter of an embedder of a function, in whatever store."""
    return str(make(function, caching=False).pipeline.primary.limit_key)


def test_functions_of_two_children_have_a_limiter_each(make: MakeEmbedder) -> None:
    """Both were the first function of "this process", and the strict limit of one was the other's as well."""

    def say() -> str:
        return key_of(make, lambda texts: [[1.0] for _ in texts])

    first, second = in_child(say), in_child(say)
    assert first
    assert second
    assert first != second


def test_a_function_has_the_limiter_of_its_parent_in_a_child(make: MakeEmbedder) -> None:
    """It asks the same upstream in both."""

    def own(texts: list[str]) -> Any:
        return [[1.0] for _ in texts]

    assert in_child(lambda: key_of(make, own)) != key_of(make, own), "each met it first"
    assert in_child(lambda: key_of(make, own)) == key_of(make, own)
