"""After each test of a run, nothing of it is in force any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from benchmarks.world import World
from dspy_prod.compat.racing import HEATS
from dspy_prod.compat.scoring import ENDER
from dspy_prod.context.current import EMPTY, current
from dspy_prod.optimize.gate import Gate, gate_here


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert current() == EMPTY
    assert gate_here() is None
    assert ENDER not in dspy.settings.config or dspy.settings.get(ENDER, None) is None
    assert not [each for each in dspy.settings.callbacks or () if isinstance(each, Gate)]
    assert not HEATS


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """As many examples for training and for validation as `EXAMPLES` of the test's file says, or the mark `LARGER`."""
    size = getattr(request, "param", None) or getattr(request.module, "EXAMPLES", 24)
    with World(1, train=size, val=size, test=size // 2, latency=0.0) as found:
        yield found


LARGER = pytest.mark.parametrize("world", [24], indirect=True)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


@pytest.fixture
def asked(world: World) -> Iterator[Any]:
    """The world's cheap model as DSPy's LM, with a cache of its own for the test."""
    lm = world.lm()
    lm.cache_clear()
    with dspy.context(lm=lm):
        yield lm
