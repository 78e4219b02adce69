"""Fixtures of the end-to-end tests: real providers, LMs that are closed again, and a store of each kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod import Run
from dspy_prod.testing import Provider
from tests.e2e.support import PRICES, fresh_memory, make_lm
from tests.stores.redis.servers import started_valkey

MakeProvider = Callable[..., Provider]
MakeLM = Callable[..., Any]


@pytest.fixture
def serve() -> Iterator[MakeProvider]:
    """Start a provider with our prices; all are stopped at the end, and none of their callables may have failed."""
    started: list[Provider] = []

    def start(**options: Any) -> Provider:
        provider = Provider(**{"prices": PRICES, **options})
        provider.start()
        started.append(provider)
        return provider

    yield start
    for provider in started:
        provider.stop()
        assert provider.errors == []


@pytest.fixture
def connect() -> Iterator[MakeLM]:
    """Make an LM in front of a provider; all are closed at the end, with their stores."""
    made: list[Any] = []

    def make(provider: Provider, **options: Any) -> Any:
        lm = make_lm(provider.url, **options)
        made.append(lm)
        return lm

    yield make
    for lm in made:
        lm.close()
        lm.pipeline.store.close()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/state.db"


@pytest.fixture(scope="session")
def databases() -> Iterator[Iterator[str]]:
    """The URLs of databases of one server; each test takes one for itself."""
    server = started_valkey(databases=4096)
    yield (f"redis://127.0.0.1:{server.port}/{number}" for number in itertools.count())
    server.stop()


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.chaos)])
def store_url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    """A fresh store of each kind; on Redis with the tests marked chaos, as they take a minute."""
    if request.param == "redis":
        url: str = next(request.getfixturevalue("databases"))
        return url
    return fresh_memory() if request.param == "memory" else sqlite_url


@pytest.fixture
def run(store_url: str) -> Run:
    """A run with caps that no test reaches; those that one means are set by `allow`."""
    return Run("it", usd=1e6, calls=10**9, tokens=10**9, store=store_url, namespace="e2e")
