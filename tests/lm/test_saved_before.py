"""States and pickles that earlier releases wrote still load.

The files in `data/` were written by 0.1.0, whose modules stood elsewhere.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import dspy
import pytest
from dspy.clients.base_lm import BaseLM

import dspy_prod
from dspy_prod import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry

DATA = Path(__file__).parent / "data"


def from_state() -> dspy_prod.LM:
    state = json.loads((DATA / "lm_0.1.0.json").read_text(encoding="utf-8"))
    lm: dspy_prod.LM = BaseLM.load_state(state, allow_custom_lm_class=True)
    return lm


def from_pickle() -> dspy_prod.LM:
    lm: dspy_prod.LM = pickle.loads((DATA / "lm_0.1.0.pickle").read_bytes())
    return lm


@pytest.mark.parametrize("load", [from_state, from_pickle])
def test_an_lm_that_0_1_0_wrote_is_what_it_was(load: Callable[[], dspy_prod.LM]) -> None:
    """A program saved before an upgrade keeps its model, policies and store; keys come from the environment."""
    lm = load()
    assert type(lm) is dspy_prod.LM
    assert (lm.model, lm.cache, lm.finetuning_model) == ("openai/gpt-4o-mini", True, "openai/base")
    assert (lm.kwargs["temperature"], lm.kwargs["max_tokens"]) == (0.7, 55)
    settings = lm.settings
    assert (settings.engine, settings.namespace, lm.pipeline.store.url) == ("auto", "before", "memory://before")
    assert settings.clients == {"api_base": "https://gateway.example/v1", "timeout": 9.5}
    assert settings.extras == {"num_ctx": 4096}
    assert settings.retry == Retry(attempts=7, backoff=0.1)
    assert settings.breaker == CircuitBreaker(failure_threshold=2)
    assert settings.limit == RateLimit(rpm=100, tpm=5000)
    assert settings.cache == Cache(ttl=60, shared=True)
    assert settings.budgets == (
        Budget(usd=5, per="day"),
        Budget(usd=1, scope="tag:team", soft=0.5, degrade_to="openai/gpt-4.1-nano"),
    )
    assert settings.prices == {"openai/gpt-4o-mini": Price(input=1, output=2, cached_input=0.5)}
    name, plain, ours = settings.fallbacks
    assert name == "anthropic/claude-haiku-4-5"
    assert isinstance(plain, dspy.LM)
    assert (plain.model, plain.kwargs["temperature"]) == ("openai/gpt-4.1", 0.2)
    assert isinstance(ours, dspy_prod.LM)
    assert (ours.model, ours.settings.limit) == ("openai/gpt-4.1-mini", RateLimit(rpm=5))


@pytest.mark.parametrize("load", [from_state, from_pickle])
def test_it_is_saved_again_as_the_same_state(load: Callable[[], dspy_prod.LM]) -> None:
    """Nothing is lost or added on the way through another release."""
    state = json.loads((DATA / "lm_0.1.0.json").read_text(encoding="utf-8"))
    assert load().dump_state() == state


def test_an_argument_that_came_later_has_its_default() -> None:
    """An upgrade that adds a policy does not break pickles from before it."""
    lm = from_pickle()
    state = lm.__getstate__()
    del state["settings"].__dict__["breaker"]
    settings = pickle.loads(pickle.dumps(state))["settings"]
    assert settings.breaker == CircuitBreaker()
    assert settings.retry == Retry(attempts=7, backoff=0.1)
