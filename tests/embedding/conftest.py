"""Embedders in front of a real provider."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final

import pytest

import dspy_prod
from dspy_prod.testing import Provider

MODEL: Final = "openai/text-embedding-3-small"
PRICES: Final = {MODEL: (0.02, 0.0)}
"""USD per million tokens, for the provider; DSPy's metadata says the same."""

_numbers = itertools.count()

MakeEmbedder = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """LiteLLM takes seconds to import, on a busy machine very many: no test's time limits are to count them."""
    from dspy_prod.compat.litellm import get_litellm

    get_litellm(feature="tests")


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(prices=PRICES) as provider:
        yield provider
        assert provider.errors == []


@pytest.fixture
def make(provider: Provider) -> Iterator[MakeEmbedder]:
    """Make an embedder in front of the provider; all are closed at the end, with their stores."""
    made: list[Any] = []

    def make(model: Any = MODEL, **options: Any) -> Any:
        own = {"api_key": "test", "api_base": provider.url} if isinstance(model, str) else {}
        store = f"memory://embedding-{next(_numbers)}"
        embedder = dspy_prod.Embedder(model, **{"store": store, "namespace": "t", "retry": False, **own, **options})
        made.append(embedder)
        return embedder

    yield make
    for embedder in made:
        with closing(embedder):
            pass
        embedder.pipeline.store.close()


def sent(provider: Provider) -> list[list[str]]:
    """The texts of each request that arrived."""
    return [call.body["input"] for call in provider.calls]
