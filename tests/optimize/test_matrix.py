"""Every optimizer ended in every way, each in a process of its own: the promises of `benchmarks.stopping`, kept.

A few pairs always run, so that each optimizer and each way is among them; the whole matrix is marked `slow`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.compiling import Compiler
from benchmarks.stopping import ONE_OF_EACH, WAYS, How, Natural, end, natural

SHORT: tuple[tuple[str, How], ...] = (
    ("MIPROv2", "usd"),
    ("GEPA", "interrupt"),
    ("COPRO", "calls"),
    ("Guesses", "tokens"),
    ("InferRules", "time"),
    ("COPRO", "errors"),
    ("Guesses", "retry_after"),
)

_NATURAL: dict[str, Natural] = {}


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


def ended(compiler: Compiler, name: str, how: How) -> None:
    """Run it, and look."""
    if name not in _NATURAL:
        _NATURAL[name] = natural(compiler, name, 1)
    found = end(compiler, name, how, _NATURAL[name], 1)
    assert not found.broken, found


@pytest.mark.parametrize(("name", "how"), SHORT)
def test_it_ends_in_time_within_the_cap_and_with_the_best_program(compiler: Compiler, name: str, how: How) -> None:
    ended(compiler, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("how", WAYS)
def test_every_optimizer_in_every_way(compiler: Compiler, name: str, how: How) -> None:
    ended(compiler, name, how)
