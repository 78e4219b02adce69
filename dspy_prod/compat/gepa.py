"""What GEPA tells of the candidates that it makes, by callbacks of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol


class Listener(Protocol):
    """Who is told. Numbers are those of GEPA's pool, texts what it knows a candidate by."""

    def candidate(self, number: int, texts: dict[str, str]) -> None:
        """One was taken into the pool."""
        ...

    def made(self, texts: dict[str, str], parents: Iterable[int | None]) -> None:
        """One was made of others."""
        ...


class _Callback:
    """A callback of GEPA's, whose errors it logs."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_valset_evaluated(self, event: dict[str, Any]) -> None:
        self._listener.candidate(event["candidate_idx"], event["candidate"])
        self._listener.made(event["candidate"], event["parent_ids"])

    def on_merge_attempted(self, event: dict[str, Any]) -> None:
        self._listener.made(event["merged_candidate"], event["parent_ids"])


@contextmanager
def telling(optimizers: Iterable[Any], listener: Callable[[], Listener]) -> Iterator[None]:
    """Give each `dspy.GEPA` among optimizers a listener of its own, until the end of the block."""
    found = [each for each in optimizers if isinstance(getattr(each, "gepa_kwargs", None), dict)]
    if not found or not _takes_callbacks():
        yield
        return
    before = [(each, each.gepa_kwargs) for each in found]
    try:
        for each, given in before:
            own = list(given.get("callbacks") or ())
            each.gepa_kwargs = {**given, "callbacks": [*own, _Callback(listener())]}
        yield
    finally:
        for each, given in before:
            each.gepa_kwargs = given


@lru_cache(maxsize=1)
def _takes_callbacks() -> bool:
    try:
        from gepa.api import optimize
    except ImportError:
        return False
    return "callbacks" in inspect.signature(optimize).parameters
