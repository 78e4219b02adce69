"""What DSPy documents of its LM, asked of `dspy.LM` and of `dspy_prod.LM` alike, on both engines.

Each test states a behaviour of DSPy and runs four times. Where the plain LM passes and ours fails, ours is no drop-in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import dspy
import pytest

import dspy_prod
from dspy_prod.testing import Provider

KINDS: Final = ["dspy-lm15", "dspy-litellm", "dspy_prod-lm15", "dspy_prod-litellm"]
MODEL: Final = "openai/gpt-4o-mini"

Make = Callable[..., Any]
_names = itertools.count()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Whose LM, on which engine."""
    return str(request.param)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    """DSPy's cache is one for the process: each test has a fresh one, in memory."""
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    yield
    dspy.cache = before


@pytest.fixture
def make(kind: str, provider: Provider) -> Make:
    """Make an LM of the kind; without retries, for DSPy's pause whole seconds."""

    def make(model: str = MODEL, **options: Any) -> Any:
        whose, engine = kind.split("-")
        given: dict[str, Any] = {"api_base": provider.url, "api_key": "sk-test", "num_retries": 0, **options}
        if engine == "litellm":
            given.setdefault("engine", "litellm")
        if whose == "dspy":
            return dspy.LM(model, **given)
        return dspy_prod.LM(model, store=f"memory://suite-{next(_names)}", **given)

    return make


@pytest.fixture
def lm(make: Make) -> Any:
    """An LM as most people make it."""
    return make()
