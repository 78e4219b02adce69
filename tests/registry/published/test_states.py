"""A predictor's state is taken whole or not at all."""

from __future__ import annotations

import json
import re
from typing import Any

import dspy
import pytest
from dspy.clients.base_lm import LM_CLASS_STATE_KEY

from dspy_prod.registry import RegistryError
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import put_into
from dspy_prod.registry.published.manifest import Manifest, PredictorEntry, sha256
from dspy_prod.registry.published.signatures import fields_of
from dspy_prod.registry.published.states import dumped

ELSEWHERE = "http://elsewhere.invalid/v1"
PLAIN = {
    LM_CLASS_STATE_KEY: "dspy.clients.lm.LM", "model": "openai/m", "model_type": "chat", "cache": False,
    "num_retries": 0, "max_tokens": 10,
}  # fmt: skip


class Telling(dspy.Predict):  # type: ignore[misc]
    """A predictor that saves more than DSPy does."""

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {**super().dump_state(json_mode), "note": getattr(self, "note", None), "config": self.config}


class Noting(dspy.Predict):  # type: ignore[misc]
    """A predictor that has something more to save now and then."""

    note: Any = None
    endpoint = "http://here.invalid"

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = super().dump_state(json_mode)
        return state if self.note is None else {**state, "note": self.note}


def put(program: Any, change: dict[str, Any], **more: Any) -> None:
    """Load what somebody made of the program's own state."""
    text = dumped("self", program)
    entry = PredictorEntry("self", None, None, sha256(text), fields_of(program.signature))
    manifest = Manifest("d", (entry,), None, "ChatAdapter")
    put_into(program, Release("triage", 1, manifest, {"self": json.dumps({**json.loads(text), **change})}), **more)


@pytest.mark.parametrize("instructions", [None, 5, ["answer"], {}])
def test_a_state_whose_instructions_are_no_text_is_refused(instructions: Any) -> None:
    """The program was changed, and failed when it was called or saved next."""
    program = dspy.Predict("question -> answer")
    signature = {**json.loads(dumped("self", program))["signature"], "instructions": instructions}
    before = dict(vars(program))
    with pytest.raises(RegistryError, match="self"):
        put(program, {"signature": signature})
    assert vars(program) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"api_base": ELSEWHERE}}, "config.api_base"),
        ({"config": {"temperature": 1, "extra_headers": {}}}, "config.extra_headers"),
        ({"config": {"fallbacks": [{"model": "openai/m", "api_base": ELSEWHERE}]}}, "config.fallbacks"),
        ({"config": "x"}, "config"),
        ({"forward": "x"}, "forward"),
        ({"callbacks": []}, "callbacks"),
    ],
    ids=str,
)
def test_a_state_that_says_more_than_was_published_is_refused(change: dict[str, Any], named: str) -> None:
    """The key of the environment and the prompt went to the address in `config`; `forward` broke each call."""
    program = dspy.Predict("question -> answer")
    before = dict(vars(program))
    with pytest.raises(RegistryError, match=rf"predictor 'self' of triage/1 .*\b{re.escape(named)}\b"):
        put(program, change)
    assert vars(program) == before


def test_whom_one_trusts_may_say_with_what_is_called() -> None:
    """Arguments hold then; what is no attribute of a predictor is one for nobody."""
    program = dspy.Predict("question -> answer")
    put(program, {"config": {"api_base": ELSEWHERE}}, allow_unsafe_lm_state=True)
    assert program.config == {"api_base": ELSEWHERE}
    with pytest.raises(RegistryError, match="forward"):
        put(program, {"forward": "x"}, allow_unsafe_lm_state=True)


def test_a_predictor_that_saves_more_gets_it_back() -> None:
    """Its class says which keys those are; what its calls carry is judged all the same."""
    program = Telling("question -> answer", temperature=1)
    put(program, {"note": "kept"})
    assert (program.note, program.config) == ("kept", {"temperature": 1})
    with pytest.raises(RegistryError, match=r"config\.api_base"):
        put(program, {"config": {"api_base": ELSEWHERE}})


def test_a_plain_lm_is_rebuilt_without_what_leads_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """`fallbacks` of DSPy's LM are calls of LiteLLM: one went to the address in them, with key and prompt."""
    fallbacks = [{"model": "openai/m", "api_base": ELSEWHERE}]
    program = dspy.Predict("question -> answer")
    put(program, {"lm": {**PLAIN, "temperature": 0.5, "fallbacks": fallbacks, "limit": {"rpm": 1}}})
    assert program.lm.kwargs == {"temperature": 0.5, "max_tokens": 10}
    assert "fallbacks, limit" in caplog.text
    assert ELSEWHERE not in caplog.text
    trusting = dspy.Predict("question -> answer")
    put(trusting, {"lm": {**PLAIN, "fallbacks": fallbacks}}, allow_unsafe_lm_state=True)
    assert trusting.lm.kwargs["fallbacks"] == fallbacks


def test_a_plain_lm_is_rebuilt_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """DSPy writes down that an LM was given no arguments to launch or train with."""
    program = dspy.Predict("question -> answer")
    put(program, {"lm": dspy.LM("openai/m", temperature=0.5).dump_state()})
    assert program.lm.kwargs["temperature"] == 0.5
    assert caplog.text == ""


def test_a_predictor_that_saves_more_now_and_then_gets_it_back() -> None:
    """Its own publication was refused, with "publish the program again", for a new predictor has no such key."""
    published = Noting("question -> answer")
    published.note = "found"
    program = Noting("question -> answer")
    put(program, json.loads(dumped("self", published)))
    assert program.note == "found"


@pytest.mark.parametrize("key", ["forward", "callbacks", "__class__"])
@pytest.mark.parametrize("trusted", [False, True])
def test_no_state_replaces_what_every_predictor_has(key: str, trusted: bool) -> None:
    program = Noting("question -> answer")
    with pytest.raises(RegistryError, match=rf"\b{key}\b in its state, which Noting does not write"):
        put(program, {key: "x"}, allow_unsafe_lm_state=trusted)


@pytest.mark.parametrize("key", ["endpoint", "fact 1"])
def test_a_class_that_saves_more_gets_any_key_of_its_own_from_whom_one_trusts(key: str) -> None:
    program = Noting("question -> answer")
    with pytest.raises(RegistryError, match=rf"\b{key}\b.* or load\(\.\.\., allow_unsafe_lm_state=True\)"):
        put(program, {key: "x"})
    put(program, {key: "x"}, allow_unsafe_lm_state=True)
    assert vars(program)[key] == "x"


def test_an_lm_in_a_key_of_a_class_is_rebuilt_without_what_leads_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    program = Noting("question -> answer")
    lm = {**PLAIN, "extra_headers": {"x": "y"}}
    put(program, {"note": {"judge": lm}})
    assert program.note == {"judge": PLAIN}
    assert "extra_headers" in caplog.text
    put(program, {"note": {"judge": lm}}, allow_unsafe_lm_state=True)
    assert program.note == {"judge": lm}


def test_an_lm_of_which_only_the_model_tells_is_rebuilt(caplog: pytest.LogCaptureFixture) -> None:
    """DSPy loads what names no class as its own LM; the token in the file went with the prompt to the address."""
    program = Noting("question -> answer")
    lm = {"model": "bedrock/m", "aws_bedrock_runtime_endpoint": ELSEWHERE, "aws_web_identity_token": "/etc/passwd"}
    put(program, {"note": [lm, {"model": "Golf", "colour": "red"}]})
    assert program.note == [{"model": "bedrock/m"}, {"model": "Golf", "colour": "red"}]
    assert "aws_bedrock_runtime_endpoint, aws_web_identity_token" in caplog.text
    assert ELSEWHERE not in caplog.text
    put(program, {"note": lm}, allow_unsafe_lm_state=True)
    assert program.note == lm


def test_an_address_as_a_model_is_refused_wherever_it_stands() -> None:
    program = Noting("question -> answer")
    before = dict(vars(program))
    lm = {"model": f"oobabooga/{ELSEWHERE}"}
    with pytest.raises(RegistryError, match=r"predictor 'self' of triage/1 has an address .* note\[0\]"):
        put(program, {"note": [lm]})
    assert vars(program) == before
    put(program, {"note": [lm]}, allow_unsafe_lm_state=True)
    assert program.note == [lm]
