"""An LM's saved state is JSON, holds no key, and gives the same LM back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.clients.base_lm import BaseLM
from dspy.lm15 import CacheConfig, Request, Response
from pydantic import BaseModel

import dspy_prod
from dspy_prod import Budget, Cache, CircuitBreaker, ConfigError, Price, RateLimit, Retry
from dspy_prod.privacy.names import bare_url, is_secret, public, without_secrets
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import Provider, ScriptedEngine
from tests.logged import logged

MODEL = "openai/gpt-4o-mini"
CLASS = "_dspy_lm_class"


class SavedEngine:
    """An engine that follows DSPy's rule for being saved."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def complete(self, request: Request) -> Response:
        return ScriptedEngine(self.greeting).complete(request)

    def dump_state(self) -> dict[str, Any]:
        return {"greeting": self.greeting}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> SavedEngine:
        return cls(**state)


class AsyncSavedEngine(SavedEngine):
    """Its asynchronous twin."""

    async def complete(self, request: Request) -> Response:
        return ScriptedEngine(self.greeting).complete(request)


def make(model: str = MODEL, **arguments: Any) -> dspy_prod.LM:
    """An LM that keeps its state to this process."""
    return dspy_prod.LM(model, **{"store": "memory://state", "namespace": "state", **arguments})


def again(lm: dspy_prod.LM) -> dspy_prod.LM:
    """The LM after a trip through JSON, as DSPy makes it."""
    loaded = BaseLM.load_state(json.loads(json.dumps(lm.dump_state())), allow_custom_lm_class=True)
    assert isinstance(loaded, dspy_prod.LM)
    return loaded


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "generation": {"temperature": 0.7, "max_tokens": 55, "top_p": 0.5, "stop": ["x"], "rollout_id": 3, "n": 2},
    "text model": {"model_type": "text"},
    "no cache": {"cache": False},
    "cache": {"cache": Cache(ttl=60, shared=True)},
    "retry": {"retry": Retry(attempts=7, backoff=0.1, budget=None)},
    "no retry": {"retry": False},
    "num_retries": {"num_retries": 5},
    "breaker": {"breaker": CircuitBreaker(failure_threshold=2, failure_rate=None, slow_call_duration=3)},
    "no breaker": {"breaker": False},
    "limit": {"limit": RateLimit(rpm=100, tpm=5000, concurrency=3, burst=2, fair_by="tenant")},
    "budgets": {
        "budget": [
            Budget(usd=5, per="day"),
            Budget(usd=1, scope="tag:team", soft=0.5, degrade_to="openai/gpt-4.1-nano"),
        ]
    },
    "prices": {"prices": {MODEL: Price(input=1, output=2, cached_input=0.5)}},
    "connection": {"api_base": "https://gateway.example/v1", "timeout": 9.5, "organization": "acme"},
    "litellm": {"engine": "litellm", "aws_region_name": "eu-central-1", "num_ctx": 4096, "extra_body": {"a": [1]}},
    "native": {"engine": "lm15", "prompt_cache": CacheConfig(retention="long")},
    "training": {"finetuning_model": "openai/base", "train_kwargs": {"epochs": 2}, "use_developer_role": True},
    "fallbacks": {"fallbacks": ["anthropic/claude-haiku-4-5", "openai/gpt-4.1-nano"]},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_state_gives_the_same_lm_back(arguments: dict[str, Any]) -> None:
    """Arguments, policies, identity and store are those of the original, and so is the state of the copy."""
    lm = make(**arguments)
    twin = again(lm)
    assert (twin.model, twin.model_type, twin.kwargs, twin.cache) == (lm.model, lm.model_type, lm.kwargs, lm.cache)
    assert twin.settings == lm.settings
    assert (twin.finetuning_model, twin.train_kwargs, twin.use_developer_role) == (
        lm.finetuning_model,
        lm.train_kwargs,
        lm.use_developer_role,
    )
    assert twin.pipeline.store is lm.pipeline.store
    assert twin.pipeline.primary.state is lm.pipeline.primary.state
    assert twin.dump_state() == lm.dump_state()


def test_a_state_reads_like_the_constructor_call() -> None:
    """Only what differs from the defaults is written, by its argument's name."""
    state = make(temperature=0.1, budget=Budget(usd=5, per="day"), limit={"rpm": 60}, api_key="sk-1").dump_state()
    assert state == {
        CLASS: "dspy_prod.lm.LM",
        "model": MODEL,
        "model_type": "chat",
        "temperature": 0.1,
        "max_tokens": None,
        "cache": True,
        "namespace": "state",
        "store": "memory://state",
        "limit": {"rpm": 60.0},
        "budget": [{"usd": 5.0, "per": "day"}],
    }


def test_a_reasoning_model_keeps_its_output_limit() -> None:
    """DSPy renames `max_tokens` for it; the state says it in the constructor's words."""
    lm = make("openai/gpt-5-mini", max_tokens=20_000, temperature=1.0)
    assert lm.dump_state()["max_tokens"] == 20_000
    assert again(lm).kwargs == lm.kwargs


def test_fallback_lms_are_saved_with_their_own_state() -> None:
    """Both kinds of LM come back as what they were, without keys."""
    lm = make(
        fallbacks=[
            dspy.LM("openai/gpt-4.1", api_key="sk-1", temperature=0.2, extra_headers={"Authorization": "Bearer sk-2"}),
            make("openai/gpt-4.1-mini", api_key="sk-3", limit=RateLimit(rpm=5)),
            "openai/gpt-4.1-nano",
        ]
    )
    assert "sk-" not in json.dumps(lm.dump_state())
    plain, ours, name = again(lm).settings.fallbacks
    assert (type(plain), plain.model, plain.kwargs["temperature"]) == (dspy.LM, "openai/gpt-4.1", 0.2)
    assert (type(ours), ours.model, ours.settings.limit) == (dspy_prod.LM, "openai/gpt-4.1-mini", RateLimit(rpm=5))
    assert name == "openai/gpt-4.1-nano"


def test_an_engine_object_is_saved_by_dspys_own_rule() -> None:
    """Class path and state, imported only from files one trusts."""
    lm = make("unit/m", engine=SavedEngine("hello"), async_engine=AsyncSavedEngine("hello"))
    twin = again(lm)
    assert twin("q") == ["hello"]
    assert isinstance(twin.settings.async_engine, AsyncSavedEngine)
    with pytest.raises(ValueError, match="allow_unsafe_lm_state=True"):
        dspy_prod.LM.load_state(lm.dump_state())
    with pytest.raises(TypeError, match="cannot be saved"):
        make("unit/m", engine=ScriptedEngine("hi")).dump_state()


class Schema(BaseModel):
    """Not JSON."""

    answer: str


@pytest.mark.parametrize(
    ("name", "value"),
    [("response_format", Schema), ("custom_thing", object()), ("extra_body", {"at": {1, 2}}), ("top_p", float("nan"))],
)
def test_what_is_not_json_is_refused_by_name(name: str, value: Any) -> None:
    """Half an LM is never written."""
    with pytest.raises(TypeError, match=f"{name}=.*cannot be saved"):
        make(**{name: value}).dump_state()


def test_loading_refuses_foreign_classes_unless_trusted() -> None:
    """DSPy's own switch applies to the LM, its engine and its fallbacks."""
    state = make().dump_state()
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        BaseLM.load_state(state)
    assert dspy_prod.LM.load_state(state).model == MODEL
    custom = {CLASS: "os.path.Evil", "model": "x"}
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        dspy_prod.LM.load_state({**state, "fallbacks": [custom]})
    with pytest.raises(ConfigError, match="saved fallback"):
        dspy_prod.LM.load_state({**state, "fallbacks": [3]})


def test_a_state_with_another_budget_of_the_same_name_does_not_raise_it() -> None:
    """Loading must not change what a budget allows."""
    lm = make(budget=Budget(usd=5, name="loaded"))
    state = lm.dump_state()
    state["budget"][0]["usd"] = 50
    dspy_prod.LM.load_state(state)
    assert [rule.options.usd for rule in lm.pipeline.budgets] == [5]


# -- stores ----------------------------------------------------------------------------------------------------------


def test_the_default_store_is_not_pinned_to_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program saved on one machine finds its state file on another; a store that was named is named again."""
    monkeypatch.delenv("DSPY_PROD_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    lm = dspy_prod.LM(MODEL)
    assert "store" not in lm.dump_state()
    assert make(store=f"sqlite:///{tmp_path}/x.db").dump_state()["store"] == f"sqlite:///{tmp_path}/x.db"
    assert make(store=MemoryStore("m")).dump_state()["store"] == "memory://"
    lm.close()


def test_a_store_password_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state has the bare URL; where the environment's store is the same one, its password is used."""
    opened: list[str] = []

    def open_store(url: str, namespace: str, **_: Any) -> MemoryStore:
        opened.append(url)
        return MemoryStore(namespace)

    monkeypatch.setattr("dspy_prod.lm.assembling.open_store", open_store)
    lm = make(store="redis://:hunter2@db.example/0")
    state = lm.dump_state()
    assert state["store"] == "redis://db.example/0"
    monkeypatch.setenv("DSPY_PROD_STORE", "redis://:other@db.example/0")
    dspy_prod.LM.load_state(state, allow_custom_lm_class=True)
    monkeypatch.setenv("DSPY_PROD_STORE", "redis://:other@elsewhere.example/0")
    dspy_prod.LM.load_state(state, allow_custom_lm_class=True)
    assert opened == ["redis://:hunter2@db.example/0", "redis://:other@db.example/0", "redis://db.example/0"]


# -- DSPy programs ---------------------------------------------------------------------------------------------------


def test_a_program_saves_and_loads_its_predictors_lm(tmp_path: Path) -> None:
    """`program.save("x.json")` and `load(..., allow_unsafe_lm_state=True)` keep the LM, on the same budget."""
    lm = make(api_key="sk-1", api_base="https://gateway.example/v1", budget=Budget(usd=5, name="saved"), max_tokens=9)
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    program.save(tmp_path / "x.json")
    assert "sk-1" not in (tmp_path / "x.json").read_text()
    fresh = dspy.ChainOfThought("question -> answer")
    fresh.load(tmp_path / "x.json", allow_unsafe_lm_state=True)
    loaded = fresh.predictors()[0].lm
    assert isinstance(loaded, dspy_prod.LM)
    assert loaded.pipeline.budgets[0] is lm.pipeline.budgets[0]
    assert loaded.settings.clients == {"api_base": "https://gateway.example/v1"}
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        dspy.ChainOfThought("question -> answer").load(tmp_path / "x.json")


def test_an_lm_of_the_whole_process_needs_no_word_to_load(tmp_path: Path) -> None:
    """ "Refusing to import custom serialized LM class": the guide says when that is met, what to do, and how it is
    not."""
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=make()):
        program.save(tmp_path / "x.json")
        dspy.ChainOfThought("question -> answer").load(tmp_path / "x.json")
    guide = " ".join((Path(__file__).parents[2] / "docs" / "guide" / "from-dspy-lm.md").read_text("utf-8").split())
    for words in (
        'program.load("triage.json", allow_unsafe_lm_state=True)',
        "Nothing has to be said where the LM comes from `dspy.configure(lm=lm)`",
    ):
        assert words in guide


def test_what_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Headers and cloud credentials may be secret: they are named in the log, never shown, and a key goes unsaid."""
    lm = make(extra_headers={"X-Team": "a"}, aws_secret_access_key="sk-aws", api_key="sk-1", num_ctx=5)
    with caplog.at_level(logging.WARNING, logger="dspy_prod"):
        state = lm.dump_state()
    (message,) = [record.getMessage() for record in logged(caplog)]
    assert "aws_secret_access_key, extra_headers may hold secrets and are not saved" in message
    assert "sk-" not in message
    assert state["num_ctx"] == 5
    assert not {"extra_headers", "aws_secret_access_key", "api_key"} & state.keys()


# -- redaction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["api_key", "api-key", "apikey", "x-api-key", "Authorization", "aws_secret_access_key", "aws_session_token",
     "hf_token", "azure_ad_token", "azure_ad_token_provider", "vertex_credentials", "client_secret", "password",
     "passwd", "token", "Cookie", "private_key", "headers", "extra_headers", "aws_access_key_id", "OPENAI_API_KEY",
     "key"],
)  # fmt: skip
def test_secret_names_are_known(name: str) -> None:
    """By the words providers and LiteLLM use."""
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "max_completion_tokens", "prompt_cache_key", "top_k", "tokenizer", "input_tokens", "api_base",
     "monkey", "keyword", "author", "model", "namespace", "tpm", "budget_tokens", "key_terms"],
)  # fmt: skip
def test_ordinary_names_are_not_secret(name: str) -> None:
    """A setting must not get lost for a resemblance."""
    assert not is_secret(name)


def test_nested_secrets_are_taken_out_and_the_rest_is_kept() -> None:
    """At any depth, in mappings and lists; a value without a secret is the same object."""
    clean = {"a": [{"b": 1}], "c": (1, 2)}
    assert without_secrets(clean) is clean
    assert without_secrets({"a": [{"token": "t", "b": 1}], "c": ({"password": "p"},)}) == {"a": [{"b": 1}], "c": ({},)}
    assert public({"api_key": "k", "api_base": "https://u:p@h/v1", "extra_body": {"auth": {"token": 1}, "x": 2}}) == {
        "api_base": "https://h/v1",
        "extra_body": {"x": 2},
    }


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("redis://user:pa@ss@host:6379/0", "redis://host:6379/0"),
        ("redis://host/0?password=x&db=1", "redis://host/0?db=1"),
        ("redis://host/0?password=x", "redis://host/0"),
        ("sqlite:////a/b@c.db?synchronous=FULL", "sqlite:////a/b@c.db?synchronous=FULL"),
        ("memory://", "memory://"),
    ],
)
def test_a_bare_url_has_no_password(url: str, bare: str) -> None:
    """User name, password and secret options go; everything else stays as it was."""
    assert bare_url(url) == bare


class Derived(dspy_prod.LM):  # type: ignore[misc]
    """A user's own."""


def test_a_derived_class_loads_a_fallback_of_its_base() -> None:
    """An LM derived from ours, with an ordinary one to fall back to, refused its own saved state."""
    lm = Derived(MODEL, fallbacks=[dspy_prod.LM("openai/other", store="memory://derived")], store="memory://derived")
    loaded = Derived.load_state(lm.dump_state())
    assert type(loaded) is Derived
    assert [route.model for route in loaded.pipeline.fallbacks] == ["openai/other"]


def test_a_state_that_nobody_vouches_for_sends_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The key in the environment and the prompt went to a fallback's address, and no word was needed for that."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    with Provider() as evil:
        poisoned = {
            **make(temperature=0.5).dump_state(), "api_base": evil.url, "extra_headers": {"x": "y"},
            "fallbacks": [
                {CLASS: "dspy.clients.lm.LM", "model": "openai/m", "api_base": evil.url},
                {CLASS: "dspy_prod.lm.LM", "model": "openai/n", "base_url": evil.url, "prices": {}},
            ],
        }  # fmt: skip
        lm = dspy_prod.LM.load_state(poisoned)
        assert lm.kwargs["temperature"] == 0.5
        for route in lm.pipeline.every_route():
            assert not route.upstream.clients.keys() & {"api_base", "base_url", "extra_headers"}
            assert evil.url not in route.limit_key
        told = caplog.text
        assert all(name in told for name in ("api_base", "extra_headers", "base_url"))
        assert evil.url not in told
        with pytest.raises(ConfigError, match="is an address"):
            dspy_prod.LM.load_state({**make().dump_state(), "fallbacks": [f"huggingface/{evil.url}"]})
        trusted = dspy_prod.LM.load_state(poisoned, allow_custom_lm_class=True)
        assert [route.upstream.clients.get("api_base") for route in trusted.pipeline.every_route()][:2] == [
            evil.url
        ] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"model": ...}, {"fallbacks": None}, {"fallbacks": 5},
        {"max_tokens": float("inf")}, {"extra_body": {"x": [float("nan")]}}, {"extra_body": {(1, 2): 3}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_is_refused_as_such(change: dict[str, Any]) -> None:
    """A saved program that somebody had changed by hand ended in a bare TypeError."""
    state = {**dspy_prod.LM("openai/m", store="memory://no-state").dump_state(), **change}
    state = {name: value for name, value in state.items() if value is not ...}
    with pytest.raises(ConfigError):
        dspy_prod.LM.load_state(state)


def test_half_a_character_in_a_setting_is_no_error() -> None:
    """An LM whose settings hold one could not be made: `TypeError: str is not valid UTF-8`."""
    one, other = (dspy_prod.LM("openai/m", store="memory://half", x_option=half) for half in ("\ud800", "\ud801"))
    assert one.identity != other.identity
    assert dspy_prod.LM("openai/\ud800", store="memory://half").identity != one.identity
    assert dspy_prod.LM("a\ud800day/m", engine=ScriptedEngine(), store="memory://half").identity != one.identity


def test_a_key_where_a_name_belongs_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error and log line that named the LM showed it, and so did what was saved of it."""
    monkeypatch.setenv("TEAM_KEY", "sk-team-0123456789abcdef")
    with pytest.raises(ConfigError, match="known as a key"):
        dspy_prod.LM.load_state({"model": "openai/sk-team-0123456789abcdef", "store": "memory://shown"})
    lm = dspy_prod.LM("sk-team-0123456789abcdef", store="memory://shown")
    with pytest.raises(ConfigError, match="known as a key"):
        lm.dump_state()
    for shown in (repr(lm), repr(lm._engine_spec)):
        assert "sk-team" not in shown
