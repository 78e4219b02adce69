"""A fallback is another model: what it refuses of a call that was written for the first one is left out for it."""

from __future__ import annotations

from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, ConfigError, Price
from dspy_prod.testing import Status
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import MODEL, fresh_memory, make_lm

CALL: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9, "stop": ["x"]}


def test_the_chosen_model_is_told_everything(serve: MakeProvider) -> None:
    """Nothing is left out for the model that the caller chose: what it refuses is the caller's to mend."""
    provider = serve()
    make_lm(provider.url)("q", **CALL)
    assert {name: provider.calls[0].body[name] for name in CALL} == CALL


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_a_reasoning_model_as_a_fallback_is_not_told_the_temperature(engine: str, serve: MakeProvider) -> None:
    """Every call of such a fallback was a 400, in the outage for which it was there."""
    provider = serve(faults=lambda call: Status(503) if call.model == "e2e" else None)
    lm = make_lm(provider.url, engine=engine, fallbacks=["openai/o3"])
    events: list[Any] = []
    remove = dspy_prod.add_listener(events.append)
    try:
        assert lm("q", **CALL) == ["ok"]
    finally:
        remove()
    first, second = provider.calls
    assert {name: first.body[name] for name in CALL} == CALL
    assert second.model == "o3"
    assert not {name for name in CALL if second.body.get(name)}
    [left_out] = [event.data for event in events if event.name == "arguments_left_out"]
    assert (left_out["model"], set(left_out["arguments"])) == ("openai/o3", set(CALL))


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_a_plain_model_is_not_told_how_hard_to_think(engine: str, serve: MakeProvider) -> None:
    """The other way round."""
    provider = serve(faults=lambda call: Status(503) if call.model == "o3" else None)
    lm = make_lm(provider.url, model="openai/o3", max_tokens=16_000, engine=engine, fallbacks=["openai/gpt-4o-mini"])
    assert lm("q", reasoning_effort="low") == ["ok"]
    first, second = provider.calls
    assert (first.body["reasoning_effort"], second.body.get("reasoning_effort")) == ("low", None)


def test_a_cheaper_model_fits_too(serve: MakeProvider) -> None:
    """After the soft threshold every call of the day failed."""
    provider = serve()
    prices = {MODEL: Price(input=1, output=1), "openai/o3": Price(input=1, output=1)}
    budget = Budget(usd=1, soft=0.000_000_1, degrade_to="openai/o3")
    lm = make_lm(provider.url).copy(prices=prices, budget=budget)
    for _ in range(3):
        lm("q", temperature=0.2)
    assert [(call.model, call.body.get("temperature")) for call in provider.calls][-1] == ("o3", None)


@pytest.mark.parametrize("name", ["", "openai/", " "])
def test_what_names_no_model_is_refused_at_construction(name: str) -> None:
    """It was noticed in the outage."""
    with pytest.raises(ConfigError, match="name models"):
        dspy_prod.LM(MODEL, store=fresh_memory(), fallbacks=[name])
