"""Whose answer is whose: each setting that changes what is sent, or who answers, tells calls and limits apart."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import RateLimit
from dspy_prod.pipeline.upstream.destination import destination, fingerprint, variables
from dspy_prod.testing import Provider
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import fresh_memory, make_lm

SETTINGS: dict[str, tuple[Any, Any]] = {
    "extra_headers": ({"x-tenant": "a"}, {"x-tenant": "b"}),
    "headers": ({"x-tenant": "a"}, {"x-tenant": "b"}),
    "organization": ("org-a", "org-b"),
    "project": ("project-a", "project-b"),
    "api_version": ("2025-01-01", "2026-01-01"),
    "extra_query": ({"t": "a"}, {"t": "b"}),
    "aws_region_name": ("eu-west-1", "us-east-1"),
}
"""Settings, and two values of each."""


def counting(serve: MakeProvider) -> Provider:
    """A provider none of whose answers equals another one."""
    return serve(answer=lambda call: f"answer {call.index}")


@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_gets_another_answer(name: str, store: str, serve: MakeProvider, sqlite_url: str) -> None:
    """`lm("q", extra_headers={"x-tenant": "b"})` was given the answer of tenant a."""
    provider = counting(serve)
    first, second = SETTINGS[name]
    lm = make_lm(provider.url, cache=True, store=fresh_memory() if store == "memory" else sqlite_url)
    asked = {"a": first, "b": second}
    answers = {who: lm("q", **{name: value}) for who, value in asked.items()}
    assert answers["a"] != answers["b"]
    for who, value in asked.items():
        assert asyncio.run(lm.acall("q", **{name: value})) == answers[who], "the same setting finds its answer again"
        assert lm.copy(**{name: value})("q") == answers[who], "a copy is told apart as a call is"
    assert len(provider.calls) == 2


@pytest.mark.parametrize(
    ("variable", "model", "provider"),
    [
        ("OPENAI_BASE_URL", "openai/e2e", None),
        ("OPENAI_API_BASE", "openai/e2e", None),
        ("FIREWORKS_API_BASE", "fireworks_ai/e2e", None),
        ("LLAMA_API_BASE", "meta_llama/e2e", None),
        ("FRIENDLI_API_BASE", "friendliai/e2e", None),
        ("HOSTED_VLLM_API_BASE", "e2e", "hosted_vllm"),
    ],
)
def test_the_environment_may_put_another_server_there(
    variable: str, model: str, provider: str | None, serve: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway named by the environment was given the answers of the one before it, until the process ended."""
    one, other = serve(answer="one"), serve(answer="other")
    store = fresh_memory()

    def made() -> Any:
        return dspy_prod.LM(
            model, api_key="k", cache=True, store=store, namespace="env", retry=False, custom_llm_provider=provider
        )

    monkeypatch.setenv(variable, one.url)
    lm = made()
    assert lm("q") == ["one"]
    monkeypatch.setenv(variable, other.url)
    assert made()("q") == ["other"]
    assert lm("q") == ["other"], "an LM follows the environment, as a plain one does"
    monkeypatch.setenv(variable, one.url)
    assert lm("q") == ["one"]
    assert (len(one.calls), len(other.calls)) == (1, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_server_that_litellm_finds_in_the_environment_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM calls them by the provider, by a word of its name or by another one: no rule of ours may miss one."""
    import litellm

    source = Path(litellm.__file__).parent
    files = [source / "litellm_core_utils/get_llm_provider_logic.py", *source.glob("llms/*/chat/*transformation.py")]
    names = {name for file in files for name in re.findall(r"\"([A-Z0-9_]+_(?:API_BASE|BASE_URL))\"", file.read_text())}
    assert len(names) > 50
    for name in names:
        monkeypatch.setenv(name, f"http://{name.lower()}/v1")
    missed = {}
    for each in litellm.provider_list:
        provider = str(getattr(each, "value", each))
        try:
            server = litellm.get_llm_provider("m", provider)[3] or ""
        except Exception:  # it asks a credential first
            continue
        name = server.removeprefix("http://").partition("/")[0].upper()
        if name in names and name not in variables({}, f"{provider}/m"):
            missed[provider] = name
    assert missed == {}


def test_an_organization_of_the_environment_may_change(serve: MakeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LM went on to give the answers of the organization that was there when it was made."""
    provider = serve(answer=lambda call: call.headers["openai-organization"])
    lm = make_lm(provider.url, cache=True, engine="litellm")
    for name in ("org-a", "org-b", "org-a"):
        monkeypatch.setenv("OPENAI_ORGANIZATION", name)
        assert lm("q") == [name]
    assert len(provider.calls) == 2


def test_calls_of_two_tenants_do_not_fly_together(serve: MakeProvider) -> None:
    """Identical prompts at the same time made one upstream call, and both tenants got its answer."""
    provider = serve(latency=0.2, answer=lambda call: call.headers["x-tenant"])
    lm = make_lm(provider.url, cache=True)

    async def both() -> list[Any]:
        return await asyncio.gather(*[lm.acall("q", extra_headers={"x-tenant": who}) for who in "abab"])

    assert asyncio.run(both()) == [["a"], ["b"], ["a"], ["b"]]
    assert len(provider.calls) == 2


def test_streams_are_told_apart_too(serve: MakeProvider) -> None:
    """A stream fills the cache of its own tenant."""
    provider = serve(answer=lambda call: "[[ ## answer ## ]]\n" + call.headers["x-tenant"])

    async def streamed(lm: Any) -> str:
        program = dspy.streamify(dspy.Predict("question -> answer"))
        with dspy.context(lm=lm):
            found = [each async for each in program(question="q") if isinstance(each, dspy.Prediction)]
        return str(found[-1].answer)

    lm = make_lm(provider.url, cache=True)
    tenants = [lm.copy(extra_headers={"x-tenant": who}) for who in "ab"]
    assert [asyncio.run(streamed(each)) for each in tenants] == ["a", "b"]
    with dspy.context(lm=tenants[1]):
        assert dspy.Predict("question -> answer")(question="q").answer == "b"
    assert len(provider.calls) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_limits_and_breakers_are_told_apart(name: str) -> None:
    """A breaker that another organization's region had opened refused everybody's calls."""
    lm = dspy_prod.LM("openai/e2e", api_key="k", store=fresh_memory(), limit=RateLimit(rpm=10))
    first, second = (lm.copy(**{name: value}) for value in SETTINGS[name])
    assert first.pipeline.primary.limit_key != second.pipeline.primary.limit_key
    assert first.breaker is not second.breaker
    assert first.pipeline.primary.breaker is not second.pipeline.primary.breaker


def test_keys_and_timeouts_do_not_change_an_answer(serve: MakeProvider) -> None:
    """The answer is the same whoever pays for it and however long they would have waited."""
    provider = counting(serve)
    lm = make_lm(provider.url, cache=True)
    answer = lm("q")
    assert lm("q", timeout=7) == lm("q", api_key="another") == lm.copy(timeout=9, api_key="third")("q") == answer
    assert len(provider.calls) == 1


def test_a_destination_shows_no_secret() -> None:
    """It is the name of a limiter, which the store writes."""
    clients = {"extra_headers": {"authorization": "Bearer sk-hidden-1"}, "api_key": "sk-hidden-2"}
    told = destination(clients, "openai/m", {"aws_region_name": "eu-1"}) + fingerprint(clients)
    assert "hidden" not in told
    assert "eu-1" not in told
    assert destination({}, "openai/m") == "openai", "nothing is added where nothing was set"
