"""What a saved LM may say when nobody vouches for whoever wrote it."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import dspy
import pytest

from dspy_prod.compat.serving import is_served
from dspy_prod.lm.settings import DSPY, ROWS
from dspy_prod.privacy.states import OPERATING, PLAIN, SHAPING, beyond, harmless, harmless_within

CLASS = "_dspy_lm_class"
ELSEWHERE: dict[str, Any] = {
    "api_base": "https://evil.example/v1",
    "base_url": "https://evil.example/v1",
    "api_key": "os.environ/OTHER",
    "api_version": "2020-01-01",
    "custom_llm_provider": "hosted_vllm",
    "extra_headers": {"x": "y"},
    "headers": {"x": "y"},
    "extra_query": {"x": "y"},
    "extra_body": {"x": "y"},
    "organization": "o",
    "project": "p",
    "model_list": [],
    "aws_bedrock_runtime_endpoint": "https://evil.example",
    "aws_web_identity_token": "/etc/token",
    "aws_region_name": "x",
    "vertex_credentials": "/etc/key.json",
    "vertex_project": "p",
    "azure_ad_token": "t",
    "tools": [{"type": "mcp", "server_url": "https://evil.example"}],
    "provider": {"order": ["evil"]},
    "prices": {"openai/m": {"input": 0, "output": 0}},
    "budget": [{"usd": 1e6}],
    "store": "redis://evil.example/0",
    "namespace": "elsewhere",
    "launch_kwargs": {},
    "train_kwargs": {},
    "engine": {"class": "evil.Engine"},
    "async_engine": {"class": "evil.Engine"},
    "never_heard_of": 1,
}
FALLBACK = {"model": "openai/m", "api_base": "https://evil.example/v1"}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_says_where_or_with_what_is_left_out(name: str, ours: bool) -> None:
    """With the key of the environment and the prompt, a call went where the state said."""
    state = {CLASS: "c", "model": "openai/m", "temperature": 0.5, name: ELSEWHERE[name] or [1]}
    kept, left_out = harmless(state, CLASS, ours=ours)
    assert (kept, left_out) == ({CLASS: "c", "model": "openai/m", "temperature": 0.5}, [name])


@pytest.mark.parametrize("name", sorted(OPERATING - PLAIN))
def test_what_only_our_lm_understands_is_left_out_of_any_other(name: str) -> None:
    """DSPy's LM hands `fallbacks` to LiteLLM, which went to the address in them."""
    assert harmless({"model": "openai/m", name: [FALLBACK]}, CLASS, ours=False) == ({"model": "openai/m"}, [name])


def test_a_cache_is_not_shared_between_tenants() -> None:
    """One state made every tenant's answers everybody's."""
    cache = {"ttl": 60, "shared": True}
    assert harmless({"cache": cache}, CLASS, ours=True) == ({"cache": {"ttl": 60}}, ["cache.shared"])
    assert harmless({"cache": cache}, CLASS, ours=False) == ({}, ["cache"])
    for ours in (True, False):
        for value in (True, False, None):
            assert harmless({"cache": value}, CLASS, ours=ours) == ({"cache": value}, [])


@pytest.mark.parametrize("model", ["huggingface/https://evil.example", "https://evil.example/v1"])
def test_an_address_is_no_model(model: str) -> None:
    for ours in (True, False):
        assert harmless({"model": model}, CLASS, ours=ours) == ({}, ["model"])


def test_nothing_said_is_nothing_left_out() -> None:
    """A plain LM writes its arguments down, given or not."""
    state = {"model": "openai/m", "api_base": None, "finetuning_model": None, "engine": "litellm"}
    assert harmless(state, CLASS, ours=True)[1] == []
    assert harmless({**state, "launch_kwargs": {}, "train_kwargs": {}}, CLASS, ours=False)[1] == []


def test_each_argument_of_ours_is_judged() -> None:
    """One that is new is left out until somebody says that it is harmless."""
    names = {row.name for row in ROWS.values()} | set(DSPY)
    judged = {*OPERATING, *SHAPING, *ELSEWHERE}
    assert names - judged == {"callbacks", "clock", "finetuning_model"}


def test_what_dspy_writes_of_a_predictor_is_harmless() -> None:
    """A program that is saved by this DSPy, or was by an earlier one, is loaded without a word."""
    predictor = dspy.Predict("question -> answer")
    predictor.lm = dspy.LM("openai/m")
    assert beyond(predictor.dump_state()) == ([], [])
    assert harmless(predictor.lm.dump_state(), CLASS, ours=False)[1] == []


@pytest.mark.parametrize("name", ["forward", "callbacks", "history", "stage", "__class__", "forward "])
def test_a_key_that_nobody_writes_is_found(name: str) -> None:
    """DSPy sets it as an attribute: `forward` made each call a TypeError."""
    assert beyond({"demos": [], name: "x"}) == ([name], [])
    assert beyond({"demos": [], name: "x"}, {name}) == ([], [])


@pytest.mark.parametrize("name", [*ELSEWHERE, *sorted(OPERATING)])
def test_arguments_of_a_predictor_shape_its_answers_only(name: str) -> None:
    """They go with each call, and won over the LM's own address."""
    assert beyond({"config": {"temperature": 1, "n": 2, name: "x"}}) == ([], [f"config.{name}"])


@pytest.mark.parametrize("config", [[["api_base", "x"]], "x", 0])
def test_arguments_that_are_no_object_are_none(config: Any) -> None:
    assert beyond({"config": config}) == ([], ["config"])


# -- what a class of somebody's own has written -----------------------------------------------------------------------
AWAY = "https://evil.example/v1"
Pair = namedtuple("Pair", ["first", "second"])


def within(value: Any, at: str = "") -> tuple[Any, list[tuple[str, list[str]]]]:
    """(what is taken, what was said to be left out and where)."""
    said: list[tuple[str, list[str]]] = []
    return harmless_within(value, CLASS, lambda where, _, left_out: said.append((where, left_out)), at), said


@pytest.mark.parametrize(
    "model", ["openai/m", "bedrock/m", "custom/m", "gpt-4o", "anthropic.claude-3-haiku-20240307-v1:0"]
)
@pytest.mark.parametrize("name", sorted(set(ELSEWHERE) - {"engine", "async_engine"}))
def test_a_mapping_that_dspy_would_load_as_an_lm_is_one(model: str, name: str) -> None:
    """Whatever left its class out, and all names that were known to be an LM's, led the call where it said."""
    state = {"model": model, "temperature": 0.5, name: ELSEWHERE[name] or [1]}
    assert within([{"asks": state}]) == ([{"asks": {"model": model, "temperature": 0.5}}], [("[0].asks", [name])])


@pytest.mark.parametrize(
    "model", ["oobabooga/http://evil.example", "HTTPS://evil.example", "custom/unix://x", "Golf://"]
)
@pytest.mark.parametrize("more", [{}, {"temperature": 1}, {CLASS: "dspy.clients.lm.LM"}, {CLASS: "dspy_prod.lm.LM"}])
def test_an_address_is_no_model_of_an_lm_within(model: str, more: dict[str, Any]) -> None:
    assert within({"judges": ({"model": model, **more},)}) == ({"judges": (more,)}, [("judges[0]", ["model"])])


@pytest.mark.parametrize(
    "data",
    [
        {"model": "Golf", "colour": "red"},
        {"model": "T-1000", "id": 5, "url": AWAY, "metadata": {"made": {"model": "Golf", "endpoint": AWAY}}},
        {"model": 5, "fallbacks": ["Polo"]},
        {"model": "gpt-4o"},
        {"model": "openai/m", "temperature": 0.5, "n": 2, "stop": None},
        {"cars": ({"model": "Golf", "colour": "red"}, [{"model": "Polo", "doors": 5}])},
        {"api_base": AWAY, "links": [AWAY]},
        OrderedDict(model="Golf", colour="red"),
        UserDict(model="Golf", colour="red"),
        Pair({"model": "Golf", "colour": "red"}, AWAY),
    ],
    ids=str,
)
def test_what_is_no_lm_is_the_very_same(data: Any) -> None:
    """Nobody serves a Golf; nothing is said, and nothing copied."""
    taken, said = within(data)
    assert taken is data
    assert said == []


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (({"model": "openai/m", "x": AWAY},), ({"model": "openai/m"},)),
        ([[{"a": [{"model": "openai/m", "x": AWAY}]}], 5], [[{"a": [{"model": "openai/m"}]}], 5]),
        (UserDict(a=UserDict(model="openai/m", x=AWAY)), {"a": {"model": "openai/m"}}),
        (Pair({"model": "openai/m", "x": AWAY}, 5), ({"model": "openai/m"}, 5)),
        ({"model": "a/m", "stop": [{"model": "a/m", "x": AWAY}]}, {"model": "a/m", "stop": [{"model": "a/m"}]}),
        ({"lm": [{"model": "Golf", "x": AWAY}]}, {"lm": [{"model": "Golf"}]}),
        ({"model": "Golf", "x": {"model": "openai/m", "x": AWAY}}, {"model": "Golf", "x": {"model": "openai/m"}}),
        ({"model": "openai/m", "ssl_verify": False}, {"model": "openai/m"}),
        ({"model": "openai/m", 5: AWAY}, {"model": "openai/m"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_lm_is_found_wherever_it_stands(value: Any, taken: Any) -> None:
    found, said = within(value)
    assert found == taken
    assert len(said) == 1


@pytest.mark.parametrize(
    "name",
    ["api_base", "azure", "custom_llm_provider", "deployment_id", "fallbacks", "model_list", "use_litellm_proxy"],
)
def test_a_key_that_leads_a_model_somewhere_makes_an_lm_of_a_golf(name: str) -> None:
    """LiteLLM asks whom such a key names, whatever the model is called."""
    assert within({"model": "Golf", name: AWAY}) == ({"model": "Golf"}, [("", [name])])


@pytest.mark.parametrize("none", [None, [], ()])
def test_no_fallbacks_are_nothing_left_out(none: Any) -> None:
    """As DSPy writes it of an LM that was given `fallbacks=None`."""
    assert within({CLASS: "dspy.LM", "model": "openai/m", "fallbacks": none})[1] == []


def test_fallbacks_of_an_lm_that_says_it_is_ours_are_judged_one_by_one() -> None:
    """Who reads the state decides what it is: DSPy's LM handed them to LiteLLM, with the addresses in them."""
    ours = {CLASS: "dspy_prod.lm.LM", "model": "openai/m"}
    fallbacks = ["openai/n", f"huggingface/{AWAY}", FALLBACK, {"api_base": AWAY}, {**ours, "fallbacks": [FALLBACK]}]
    taken, said = within({**ours, "fallbacks": fallbacks})
    kept = ["openai/n", {"model": "openai/m"}, {}, {**ours, "fallbacks": [{"model": "openai/m"}]}]
    assert taken == {**ours, "fallbacks": kept}
    assert [where for where, _ in said] == [
        ".fallbacks[1]", ".fallbacks[2]", ".fallbacks[3]", ".fallbacks[4].fallbacks[0]",
    ]  # fmt: skip


@pytest.mark.parametrize("fallbacks", [{"api_base": AWAY}, AWAY, [[{"api_base": AWAY}]], 5])
def test_fallbacks_that_are_no_calls_are_left_out(fallbacks: Any) -> None:
    ours = {CLASS: "dspy_prod.lm.LM", "model": "openai/m"}
    assert within({**ours, "fallbacks": fallbacks}) == (ours, [("", ["fallbacks"])])


@pytest.mark.parametrize(
    ("model", "served"),
    [("gpt-4o", True), ("text-embedding-3-small", True), ("claude-3", True), ("gemini-9", True), ("openai/m", True),
     ("Golf", False), ("T-1000", False), ("", False)],
)  # fmt: skip
def test_a_name_is_served_when_somebody_would_be_asked(model: str, served: bool) -> None:
    assert is_served(model) is served
