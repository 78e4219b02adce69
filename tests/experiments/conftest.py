"""A provider, a store of each kind, and programs that differ in what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod.testing import Provider


class Triage(dspy.Module):
    """Sorts a message."""

    def __init__(self, told: str = "") -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> label")
        if told:
            self.classify.signature = self.classify.signature.with_instructions(told)

    def forward(self, message: str) -> Any:
        return self.classify(message=message)

    async def aforward(self, message: str) -> Any:
        return await self.classify.acall(message=message)


@pytest.fixture(autouse=True)
def salted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same units have the same variants in each run of a test."""
    monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _: "salt")


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's URL."""
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


@pytest.fixture
def asked(provider: Provider, store: str) -> Iterator[Callable[..., dspy_prod.LM]]:
    """Makes an LM of the provider and puts it in force."""

    def make(**options: Any) -> dspy_prod.LM:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=store,
            **{"retry": dspy_prod.Retry(attempts=1), "breaker": False, **options},
        )  # fmt: skip
        inside.enter_context(dspy.context(lm=lm))
        return lm

    with ExitStack() as inside:
        yield make
