"""`dspy_prod.LM` beside `dspy.LM`: what programs, callbacks, histories and trackers see of a call."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import LMServerError, LMUnsupportedFeatureError

import dspy_prod
from dspy_prod.testing import ScriptedEngine, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, fresh_memory, records


def plain(url: str, **options: Any) -> dspy.LM:
    """DSPy's own LM in front of the same provider."""
    return dspy.LM(MODEL, **{"api_key": "test", "api_base": url, "max_tokens": 100, "cache": False, **options})


class Heard(BaseCallback):
    """What DSPy tells its callbacks of LM calls."""

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.starts.append((instance, inputs))

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        self.ends.append((outputs, exception))


# -- calling ---------------------------------------------------------------------------------------------------------
def test_a_typed_request_gives_a_typed_response(serve: MakeProvider, connect: MakeLM) -> None:
    """`dspy.lm15.Request` goes in and `Response` comes out, with real usage at first and none from the cache."""
    provider = serve(usage=(7, 3))
    lm = connect(provider, cache=True)
    request = Request(MODEL, (Message.user("hi"),), config=Config(temperature=0.3))
    first, again = lm(request), asyncio.run(lm.acall(request))
    assert isinstance(first, Response)
    assert (first.text, first.usage.input_tokens, first.usage.output_tokens) == ("ok", 7, 3)
    assert (again.text, again.usage.input_tokens) == ("ok", None)
    assert provider.calls[0].body["temperature"] == 0.3
    assert len(provider.calls) == 1


def test_a_responses_model_speaks_the_responses_api(serve: MakeProvider, connect: MakeLM) -> None:
    """`model_type="responses"` goes through the native engine to /responses; its hits look like its answers."""
    provider = serve()
    lm = connect(provider, model_type="responses", cache=True)
    twin = plain(provider.url, model_type="responses")
    assert lm("hi") == lm("hi") == twin("hi")
    assert [call.api for call in provider.calls] == ["responses", "responses"]


def test_a_text_model_speaks_the_completions_api(serve: MakeProvider, connect: MakeLM) -> None:
    """`model_type="text"` goes through LiteLLM to /completions, with the same prompt as in plain DSPy."""
    provider = serve()
    lm = connect(provider, model_type="text", cache=True)
    twin = plain(provider.url, model_type="text")
    assert lm("hi") == lm("hi") == asyncio.run(lm.acall("hi")) == twin("hi") == ["ok"]
    assert [call.api for call in provider.calls] == ["completions", "completions"]
    assert provider.calls[0].prompt == provider.calls[1].prompt


def test_candidates_and_rollouts_are_kept_apart(serve: MakeProvider, connect: MakeLM) -> None:
    """`n=3` gives three answers, a `rollout_id` another one, and each of them is found again."""
    provider = serve(answer=lambda call: f"answer {call.index}")
    lm = connect(provider, cache=True, temperature=1.0)
    asked = [lm("q", n=3), lm("q", rollout_id=1), lm("q", rollout_id=2), lm("q")]
    assert sorted(text for answers in asked for text in answers) == [f"answer {index}" for index in range(6)]
    assert [lm("q", n=3), lm("q", rollout_id=1), lm("q", rollout_id=2), lm("q")] == asked
    assert all("rollout_id" not in call.body for call in provider.calls)


def test_parts_that_no_request_can_say_are_refused_by_name_where_liteLLM_is_not_allowed(
    serve: MakeProvider, connect: MakeLM
) -> None:
    """With `engine="lm15"` a part with `cache_control` is refused as by a plain LM, and nothing is sent."""
    provider = serve()
    lm = connect(provider, engine="lm15")
    part = {"type": "text", "text": "long document", "cache_control": {"type": "ephemeral"}}
    with pytest.warns(DeprecationWarning, match="messages="):
        with pytest.raises(LMUnsupportedFeatureError, match="cache_control"):
            lm(messages=[{"role": "user", "content": [part]}])
    assert provider.calls == []


def test_a_plain_lm_to_fall_back_to_runs_without_its_cache_and_retries(serve: MakeProvider, connect: MakeLM) -> None:
    """A `dspy.LM` as a fallback lends its engine and its settings; attempts are made and kept in one layer, ours."""
    dead, alive = serve(faults=Status(500)), serve(faults=[Status(500)])
    lm = connect(dead, fallbacks=[dspy.LM(CHEAP, api_key="own", api_base=alive.url, cache=True, temperature=0.7)])
    with pytest.raises(LMServerError):
        lm("q")
    assert lm("q") == lm("q") == ["ok"]
    assert (len(dead.calls), len(alive.calls)) == (3, 3)
    assert {call.headers["authorization"] for call in alive.calls} == {"Bearer own"}
    assert {(call.body["temperature"], call.max_tokens) for call in alive.calls} == {(0.7, 100)}


# -- what is told of a call ------------------------------------------------------------------------------------------
def test_the_history_has_the_real_cost(serve: MakeProvider, connect: MakeLM) -> None:
    """An entry's cost is the provider's bill, retries and all; a hit costs 0.0, is marked, and has no usage."""
    provider = serve(usage=(1000, 50))
    lm = connect(provider, cache=True)
    lm("q")
    lm("q")
    asyncio.run(lm.acall("q"))
    paid, hit, ahit = lm.history
    assert paid["cost"] == provider.bill.usd > 0
    assert paid["cached"] is False
    assert paid["usage"]["prompt_tokens"] == 1000
    for entry in (hit, ahit):
        assert (entry["cost"], entry["cached"], dict(entry["usage"])) == (0.0, True, {})
    assert hit["outputs"] == paid["outputs"] == ["ok"]
    assert {*plain(provider.url).history, *paid} >= {"prompt", "messages", "outputs", "model", "timestamp", "uuid"}


def test_usage_tracking_counts_what_was_used(serve: MakeProvider, connect: MakeLM) -> None:
    """`dspy.track_usage` sees a call as in plain DSPy, and nothing at all for a hit."""
    provider = serve(usage=(10, 5))
    lm, twin = connect(provider, cache=True), plain(provider.url)
    totals = []
    for each in (twin, lm, lm):
        with dspy.track_usage() as tracker:
            each("q")
        totals.append(tracker.get_total_tokens())
    assert totals[1] == totals[0] != {}
    assert totals[2] == {}


def test_a_prediction_tells_its_usage(serve: MakeProvider, connect: MakeLM) -> None:
    """With `track_usage=True` a prediction carries its tokens, and an empty usage when the cache answered."""
    lm = connect(serve(usage=(10, 5)), cache=True)
    with dspy.context(lm=lm, track_usage=True):
        program = dspy.Predict("question -> answer")
        usages = [program(question="q").get_lm_usage() for _ in range(2)]
    assert usages[0][MODEL]["prompt_tokens"] == 10
    assert not usages[1]


def test_callbacks_hear_of_each_call_once(serve: MakeProvider, connect: MakeLM) -> None:
    """Start and end fire once per call, hit or not, sync or not, with the inputs that plain DSPy tells."""
    provider = serve()
    told: dict[str, Heard] = {}
    for name, lm in (("ours", connect(provider, cache=True)), ("plain", plain(provider.url))):
        told[name] = Heard()
        lm.callbacks = [told[name]]
        lm("q", temperature=0.5)
        lm("q", temperature=0.5)
        asyncio.run(lm.acall("q", temperature=0.5))
        assert [instance for instance, _ in told[name].starts] == [lm] * 3
    assert [inputs for _, inputs in told["ours"].starts] == [inputs for _, inputs in told["plain"].starts]
    assert told["ours"].ends == told["plain"].ends == [(["ok"], None)] * 3


def test_callbacks_hear_of_a_refusal(serve: MakeProvider, connect: MakeLM) -> None:
    """A call that a policy refuses ends with that error, once."""
    heard = Heard()
    lm = connect(serve(), callbacks=[heard])
    lm.pipeline.primary.breaker.force_open()
    with pytest.raises(dspy_prod.CircuitOpenError) as caught:
        lm("q")
    assert heard.ends == [(None, caught.value)]


# -- abilities -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("openai/gpt-4o-mini", {}),
        ("openai/gpt-4o-mini", {"model_type": "responses"}),
        ("openai/o3-mini", {}),
        ("openai/nobody-knows", {}),
        ("anthropic/claude-haiku-4-5", {}),
        ("gemini/gemini-2.5-flash", {}),
        ("openai/gpt-4o-mini", {"engine": "litellm"}),
        ("bedrock/anthropic.claude-3-haiku-20240307-v1:0", {"aws_region_name": "eu-central-1"}),
    ],
)
def test_a_model_can_do_what_dspy_says_it_can(model: str, options: dict[str, Any]) -> None:
    """Adapters read the same abilities off our LM as off DSPy's, whichever engine carries it."""
    ours, theirs = dspy_prod.LM(model, store=fresh_memory(), **options), dspy.LM(model, **options)
    for name in ("supports_function_calling", "supports_reasoning", "supports_response_schema", "supported_params"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_an_engine_object_says_for_itself() -> None:
    """What an engine declares is passed on, what it does not declare is not there, and a copy says the same."""
    engine = ScriptedEngine()
    lm = dspy_prod.LM("any/model", engine=engine, store=fresh_memory())
    for each in (lm, lm.copy(), lm.copy(temperature=0.5)):
        assert each.supports_function_calling
        assert each.supports_response_schema
        assert not each.supports_reasoning
        assert each.supported_params == engine.supported_params


# -- warnings --------------------------------------------------------------------------------------------------------
def test_nothing_of_ours_is_deprecated(serve: MakeProvider, connect: MakeLM) -> None:
    """Building, calling, copying and streaming raise no DeprecationWarning out of this library's code."""
    home = str(Path(dspy_prod.__file__).parent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = connect(serve(), cache=True)
        with dspy.context(lm=lm):
            program = dspy.ChainOfThought("question -> answer")
            program(question="q")
            program(question="q")
            asyncio.run(program.acall(question="a"))
            program.deepcopy()(question="b")
        lm.copy(temperature=0.1)("c")
        list(lm._engine_spec.stream(Request(MODEL, (Message.user("d"),))))
        lm.dump_state()
    ours = [w for w in caught if w.filename.startswith(home)]
    assert [str(warning.message) for warning in ours if issubclass(warning.category, DeprecationWarning)] == []


def test_a_deprecated_argument_is_told_to_who_gave_it(serve: MakeProvider, connect: MakeLM) -> None:
    """`messages=` warns as in DSPy, on the line of the caller; typed parts come out as text all the same."""
    lm = connect(serve())
    with pytest.warns(DeprecationWarning, match="messages=") as caught:
        assert lm(messages=[{"role": "user", "content": "hi"}]) == ["ok"]
    assert [warning.filename for warning in caught] == [__file__]
    assert lm(Request(MODEL, (Message.user([TextPart("hi")]),))).text == "ok"
    assert len(records(lm)) == 2
