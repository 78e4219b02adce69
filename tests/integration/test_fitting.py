"""A fallback is another model: what it refuses of a call that was written for the first one is left out for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Reasoning, Request

import dspy_prod
from dspy_prod import Budget, ConfigError, Price
from dspy_prod.pipeline.fitting import known_refusals, refused_by
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import Status
from tests.differential import mirror
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


THINKING = Reasoning(effort="low")
EVERYTHING: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9, "reasoning": THINKING}


@pytest.mark.parametrize(
    ("model", "said", "left_out"),
    [
        ("openai/o3", EVERYTHING, {"temperature", "top_p"}),
        ("openai/gpt-4o-mini", EVERYTHING, {"reasoning"}),
        ("openai/local", EVERYTHING, set()),
        ("anthropic/claude-sonnet-4-20250514", EVERYTHING, {"temperature", "top_p"}),
        ("anthropic/claude-sonnet-4-20250514", {"temperature": 0.2, "top_p": 0.9}, set()),
        ("anthropic/claude-sonnet-4-20250514", {"temperature": 1.0, "reasoning": THINKING}, set()),
        ("anthropic/claude-sonnet-4-20250514", {"temperature": 0.2, "reasoning": Reasoning(effort="off")}, set()),
        ("anthropic/claude-sonnet-4-20250514", {"top_k": 5, "reasoning": THINKING}, {"top_k"}),
        ("anthropic/claude-opus-4-1", {"temperature": 0.2, "top_p": 0.9}, {"top_p"}),
        ("anthropic/claude-opus-4-1", {"top_p": 0.9}, set()),
        ("bedrock/us.anthropic.claude-haiku-4-5-20251001-v1:0", {"temperature": 0.2, "top_p": 0.9}, {"top_p"}),
        ("openrouter/anthropic/claude-sonnet-4.5", {"temperature": 0.2, "top_p": 0.9}, {"top_p"}),
        ("anthropic/claude-opus-4-7", {"temperature": 0.2, "top_k": 5}, {"temperature", "top_k"}),
        ("vertex_ai/claude-opus-5@default", {"temperature": 0.2}, {"temperature"}),
        ("anthropic/claude-opus-4-7", {"temperature": 1.0}, set()),
        ("anthropic/claude-3-5-haiku-20241022", {"reasoning": THINKING}, {"reasoning"}),
        ("anthropic/claude-3-7-sonnet-20250219", {"reasoning": THINKING}, set()),
        ("gemini/gemini-2.5-flash", EVERYTHING, set()),
    ],
)
def test_what_a_model_refuses_is_told_by_its_name(model: str, said: dict[str, Any], left_out: set[str]) -> None:
    """Combinations too: a temperature is refused by a model that is to think."""
    config = Config(max_tokens=5000, **said)
    assert {name for name, refuses in refused_by(model) if refuses(config)} == left_out


@pytest.fixture
def elsewhere() -> Iterator[mirror.Mirror]:
    """Every provider's dialect, on one address."""
    started = mirror.Mirror()
    yield started
    started.stop()


SAID: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9, "frequency_penalty": 0.1, "seed": 1, "stop": ["x"]}


@pytest.mark.parametrize("way", ["sync", "async", "stream"])
@pytest.mark.parametrize(
    ("model", "engine", "arrives"),
    [
        ("mistral/mistral-large-latest", "auto", {"temperature": 0.2, "top_p": 0.9, "random_seed": 1}),
        ("anthropic/claude-opus-4-7", "auto", {"stop_sequences": ["x"]}),
        ("anthropic/claude-opus-4-7", "litellm", {"stop_sequences": ["x"]}),
        ("perplexity/sonar", "auto", {"temperature": 0.2, "top_p": 0.9, "frequency_penalty": 0.1}),
    ],
)
def test_what_litellm_or_a_catalogue_says_a_model_lacks_is_left_out(
    serve: MakeProvider, elsewhere: mirror.Mirror, model: str, engine: Any, arrives: dict[str, Any], way: str
) -> None:
    """LiteLLM refused the call before it was sent, and the fallback was none."""
    other = dspy_prod.LM(
        model, api_key="k", api_base=elsewhere.url, engine=engine, store=fresh_memory(), cache=False, max_tokens=50
    )
    lm = make_lm(serve(faults=Status(503)).url, fallbacks=[other])
    for _ in range(2):  # before and after more is known of the model
        if way == "sync":
            assert lm("q", **SAID)
        elif way == "async":
            assert asyncio.run(lm.acall("q", **SAID))
        else:
            config = Config(max_tokens=50, **{**SAID, "stop": ("x",)})
            asked = Request(model=lm.model, messages=(Message.user("q"),), config=config)
            assert list(lm._engine_spec.stream(asked))[-1].type == "end"
    settings = {"temperature", "top_p", "frequency_penalty", "seed", "random_seed", "stop", "stop_sequences"}
    sent = [{name: arrived.body[name] for name in settings & arrived.body.keys()} for arrived in elsewhere.take()]
    if model.startswith("mistral"):
        for body in sent:
            body.pop("stop", None)
    assert sent == [arrives] * 2
    lm.close()
    other.close()


BESIDE: dict[str, Any] = {"logit_bias": {"5": 1}, "verbosity": "low", "prediction": {"type": "content", "content": "x"}}
OTHERS: dict[str, Any] = {**BESIDE, "store": True, "service_tier": "flex"}
AWS = {"aws_region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}


MISTRAL: Any = ("mistral/mistral-large-latest", {"api_key": "k"}, set(OTHERS))
AZURE: Any = ("azure/a-deployment", {"api_key": "k", "api_version": "2024-10-21"}, {"verbosity", "service_tier"})
BEDROCK: Any = ("bedrock/us.anthropic.claude-haiku-4-5-20251001-v1:0", AWS, OTHERS.keys() - {"service_tier"})


@pytest.mark.parametrize(
    ("model", "more", "refused", "way"),
    [
        *[(*each, way) for each in (MISTRAL, AZURE) for way in ("sync", "async", "stream")],
        *[(*BEDROCK, way) for way in ("sync", "async")],  # its streams are of a kind of their own
    ],
)
def test_what_the_usual_settings_do_not_say_is_left_out_too(
    serve: MakeProvider, elsewhere: mirror.Mirror, model: str, more: dict[str, Any], refused: set[str], way: str
) -> None:
    """LiteLLM refused a fallback's call for its `logit_bias`, its `verbosity`, its `service_tier`."""
    other = dspy_prod.LM(model, api_base=elsewhere.url, store=fresh_memory(), cache=False, max_tokens=50, **more)
    lm = make_lm(serve(faults=Status(503)).url, fallbacks=[other])
    events: list[Any] = []
    remove = dspy_prod.add_listener(events.append)
    try:
        for _ in range(2):  # before and after more is known of the model
            if way == "sync":
                assert lm("q", **OTHERS)
            elif way == "async":
                assert asyncio.run(lm.acall("q", **OTHERS))
            else:
                config = Config(max_tokens=50, store=True, service_tier="flex", extensions=BESIDE)
                asked = Request(model=lm.model, messages=(Message.user("q"),), config=config)
                assert list(lm._engine_spec.stream(asked))[-1].type == "end"
    finally:
        remove()
    bodies = [arrived.body for arrived in elsewhere.take()]
    assert len(bodies) == 2
    assert not [name for body in bodies for name in refused if body.get(name)]
    if not model.startswith("bedrock"):
        assert [{name for name in OTHERS if body.get(name)} for body in bodies] == [OTHERS.keys() - refused] * 2
    left_out = [set(event.data["arguments"]) for event in events if event.name == "arguments_left_out"]
    assert left_out == [refused] * 2
    lm.close()
    other.close()


def test_the_catalogue_tells_of_models_that_no_rule_names() -> None:
    """A plain model of Gemini's, and one of Anthropic's whose dials are gone."""

    def known(model: str) -> set[str]:
        return {name for name, _ in known_refusals(Upstream(model, "chat", "auto", None, {}, {}))}

    assert known("anthropic/claude-opus-4-7") == {"temperature", "top_p", "top_k"}
    assert known("anthropic/claude-opus-4-6") == set()
    assert known("openai/gpt-4o-mini") == {"reasoning"}
    assert known("openai/nobody-knows-it") == set()
