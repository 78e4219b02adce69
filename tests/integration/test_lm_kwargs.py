"""`lm.kwargs` is what a plain `dspy.LM` has: every setting can be read and set there, and holds from the next call."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import dspy
import pytest

import dspy_prod
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import fresh_memory, make_lm


def test_an_address_that_is_set_later_is_called(serve: MakeProvider) -> None:
    """`lm.launch()` points an LM at the server it has started; the calls, with the key, went to the old address."""
    old, new = serve(answer="old"), serve(answer="new")
    lm = make_lm(old.url, cache=True)
    assert (lm("q"), lm.kwargs["api_base"], lm.kwargs["api_key"]) == (["old"], old.url, "test")
    lm.kwargs["api_base"], lm.kwargs["api_key"] = new.url, "local"
    assert lm("q") == asyncio.run(lm.acall("q")) == ["new"]
    assert new.calls[0].headers["authorization"] == "Bearer local"
    lm.kwargs["api_base"] = old.url
    assert lm("q") == ["old"]
    assert (len(old.calls), len(new.calls)) == (1, 1)


def test_a_header_that_is_changed_in_place_is_sent(serve: MakeProvider) -> None:
    """A token was renewed in `lm.kwargs["headers"]`; the old one went on to be sent."""
    provider = serve()
    lm = make_lm(provider.url, headers={"x-token": "old"})
    lm("q")
    lm.kwargs["headers"]["x-token"] = "new"
    lm("q")
    assert [call.headers["x-token"] for call in provider.calls] == ["old", "new"]


def test_what_only_liteLLM_knows_is_read_and_set_there_too(serve: MakeProvider) -> None:
    """`lm.kwargs["extra_body"]` was a KeyError, and setting it an error of every call."""
    provider = serve()
    lm = make_lm(provider.url, extra_body={"a": 1})
    assert lm.kwargs["extra_body"] == {"a": 1}
    lm("q")
    lm.kwargs["extra_body"] = {"a": 2}
    lm("q")
    del lm.kwargs["extra_body"]
    lm("q")
    assert [call.body.get("a") for call in provider.calls] == [1, 2, None]


def test_copies_have_their_own(serve: MakeProvider) -> None:
    """What is set on a copy, of whatever kind, does not reach the LM it was made of."""
    old, new = serve(answer="old"), serve(answer="new")
    lm = make_lm(old.url)
    for twin in (lm.copy(temperature=0.5), copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert twin.kwargs["api_base"] == old.url
        twin.kwargs["api_base"] = new.url
        assert (twin("q"), lm("q")) == (["new"], ["old"])
    assert lm.copy(api_base=new.url).kwargs["api_base"] == new.url


def test_a_copy_has_what_was_set_before_it(serve: MakeProvider) -> None:
    """Also when no call came between."""
    old, new = serve(answer="old"), serve(answer="new")
    lm = make_lm(old.url)
    lm.kwargs["api_base"] = new.url
    assert lm.copy(temperature=0.1)("q") == lm.copy(retry=False)("q") == pickle.loads(pickle.dumps(lm))("q") == ["new"]
    state = {**json.loads(json.dumps(lm.dump_state())), "api_key": "x"}
    assert dspy_prod.LM.load_state(state, allow_custom_lm_class=True)("q") == ["new"]


def test_another_model_is_asked_when_it_is_set() -> None:
    """`lm.model = ...` changed what DSPy showed, and not what was asked."""
    engine = dspy_prod.testing.ScriptedEngine("x")
    lm = dspy_prod.LM("openai/a", engine=engine, store=fresh_memory(), cache=True)
    lm("q")
    lm.model = "openai/b"
    lm("q")
    assert [request.model for request in engine.requests] == ["openai/a", "openai/b"]


def test_no_secret_shows() -> None:
    """`kwargs` holds the key, as in a plain LM; its repr, the state and the history do not."""
    lm = dspy_prod.LM("openai/a", api_key="sk-hidden-1", headers={"x": "hidden-2"}, store=fresh_memory())
    assert lm.kwargs["api_key"] == "sk-hidden-1"
    assert "hidden" not in repr(lm.kwargs) + repr(vars(lm)) + json.dumps(lm.dump_state())
    assert b"hidden" not in pickle.dumps(lm)


def test_the_engine_is_told_as_a_plain_lm_tells_it() -> None:
    """`lm.engine` was an engine of ours, whatever had been asked for."""
    for given in ("auto", "lm15", "litellm"):
        assert dspy_prod.LM("openai/a", engine=given, store=fresh_memory()).engine == given
    engine = dspy_prod.testing.ScriptedEngine("x")
    assert dspy_prod.LM("openai/a", engine=engine, store=fresh_memory()).engine is engine
    lm, plain = dspy_prod.LM("openai/gpt-4o-mini", store=fresh_memory()), dspy.LM("openai/gpt-4o-mini")
    for name in ("supports_function_calling", "supports_reasoning", "supports_response_schema", "supported_params"):
        assert getattr(lm, name) == getattr(plain, name)


def test_a_cache_for_prompts_is_checked_when_a_copy_is_made() -> None:
    """`lm.copy(prompt_cache="x")` failed at the first call."""
    with pytest.raises(TypeError, match="prompt_cache"):
        dspy_prod.LM("openai/a", store=fresh_memory()).copy(prompt_cache="x")


def test_forward_is_a_call_too(serve: MakeProvider) -> None:
    """The older entry point has the same settings, extras and cache."""
    provider = serve()
    lm: Any = make_lm(provider.url, extra_body={"a": 1}, cache=True)
    first = lm.forward(prompt="q")
    assert first.choices[0]["message"]["content"] == lm.forward(prompt="q").choices[0].message.content == "ok"
    assert asyncio.run(lm.aforward(prompt="q")).choices[0].message.content == "ok"
    assert [call.body["a"] for call in provider.calls] == [1]


def test_dspy_s_switch_of_all_caches_holds_here_too(serve: MakeProvider) -> None:
    """After `dspy.configure_cache(False, False)` nothing was asked anew."""
    provider = serve()
    lm = make_lm(provider.url, cache=True)
    before = dspy.cache
    try:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
        assert lm("q") == lm("q") == ["ok"]
    finally:
        dspy.cache = before
    assert len(provider.calls) == 2
    assert lm("q") == lm("q")
    assert len(provider.calls) == 3


def test_an_optimizer_that_asks_for_a_cache_is_told_of_ours() -> None:
    """`dspy.teleprompt.reanchor` refused, as no cache kept the answers."""
    from dspy.teleprompt.reanchor.calibrate import caches

    predict = dspy.Predict("question -> answer")
    for cached in (True, False):
        predict.lm = dspy_prod.LM("openai/a", store=fresh_memory(), cache=cached)
        assert caches(predict) is cached


def test_dspy_s_own_cache_is_not_made_for_being_looked_at() -> None:
    """It is made under a lock and on disk: a child forked meanwhile by a busy parent waited for that lock for ever."""
    script = (
        "import dspy, dspy_prod; from dspy_prod.testing import ScriptedEngine; "
        "lm = dspy_prod.LM('openai/m', engine=ScriptedEngine('ok'), store='memory://'); lm('q'); lm('q'); "
        "assert 'cache' not in vars(dspy)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
