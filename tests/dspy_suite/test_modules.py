"""DSPy's modules, adapters, streams and tasks on the LM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel

from dspy_prod.testing import Provider, Status
from tests.dspy_suite.conftest import Make


def fields(**texts: str) -> str:
    """An answer in the form that ChatAdapter asks for."""
    return "".join(f"[[ ## {name} ## ]]\n{text}\n\n" for name, text in texts.items()) + "[[ ## completed ## ]]"


CHAT = fields(answer="blue")


class City(BaseModel):
    """A value."""

    name: str
    people: int


def test_predict_and_chain_of_thought(lm: Any) -> None:
    with dspy.context(lm=lm):
        assert dspy.Predict("question -> answer")(question="?").answer
        thought = dspy.ChainOfThought("question -> answer")(question="?")
    assert thought.reasoning
    assert thought.answer


def test_types_are_asked_for_and_read(lm: Any) -> None:
    class Which(dspy.Signature):
        """Tell."""

        question: str = dspy.InputField()
        count: int = dspy.OutputField()
        sure: bool = dspy.OutputField()
        kind: Literal["a", "b"] = dspy.OutputField()
        city: City = dspy.OutputField()

    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        with dspy.context(lm=lm, adapter=adapter):
            found = dspy.Predict(Which)(question="?")
        assert isinstance(found.count, int)
        assert isinstance(found.city, City)
        assert found.kind in ("a", "b")


def test_an_answer_in_the_wrong_form_is_asked_for_again_as_json(make: Make, provider: Provider) -> None:
    """ChatAdapter falls back to JSONAdapter, which sends a schema."""
    provider.answer = lambda call: '{"answer": "blue"}' if "response_format" in call.body else "what?"
    with dspy.context(lm=make()):
        assert dspy.Predict("question -> answer")(question="?").answer == "blue"
    assert [("response_format" in call.body) for call in provider.calls] == [False, True]


def test_candidates_become_completions(make: Make, provider: Provider) -> None:
    provider.answer = [{"content": CHAT}, {"content": CHAT.replace("blue", "red")}, {"content": CHAT}]
    with dspy.context(lm=make(temperature=1.0)):
        found = dspy.Predict("question -> answer", n=3)(question="?")
    assert len(found.completions.answer) == 3


def test_configuration_reaches_the_call(lm: Any, provider: Provider) -> None:
    with dspy.context(lm=lm):
        dspy.Predict("question -> answer", temperature=0.2)(question="?", config={"max_tokens": 9})
    sent = provider.calls[-1].body
    assert sent["temperature"] == 0.2
    assert 9 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))


def test_react_calls_a_tool(make: Make, provider: Provider) -> None:
    seen: list[str] = []

    def look(what: str) -> str:
        """Look it up."""
        seen.append(what)
        return "blue"

    steps = iter(
        [
            fields(next_thought="hm", next_tool_name="look", next_tool_args='{"what": "sky"}'),
            fields(next_thought="so", next_tool_name="finish", next_tool_args="{}"),
            fields(reasoning="seen", answer="blue"),
        ]
    )
    provider.answer = lambda call: next(steps)
    with dspy.context(lm=make(), adapter=dspy.ChatAdapter()):
        found = dspy.ReAct("question -> answer", tools=[look])(question="?")
    assert (found.answer, seen) == ("blue", ["sky"])


def test_best_of_n_and_refine_try_again(make: Make, provider: Provider) -> None:
    words = iter(["red", "blue", "red", "blue", "red", "blue"] * 3)
    provider.answer = lambda call: CHAT.replace("blue", next(words)) if "reward" not in str(call.body) else None
    with dspy.context(lm=make(temperature=1.0)):
        best = dspy.BestOfN(
            dspy.Predict("question -> answer"), N=3, reward_fn=lambda _, p: float(p.answer == "blue"), threshold=1.0
        )
        assert best(question="?").answer == "blue"
    assert len(provider.calls) == 2


def test_parallel_and_batch(lm: Any, provider: Provider) -> None:
    program = dspy.Predict("question -> answer")
    examples = [dspy.Example(question=str(number)).with_inputs("question") for number in range(6)]
    with dspy.context(lm=lm):
        assert len(program.batch(examples, num_threads=3)) == 6
        assert len(dspy.Parallel(num_threads=3)([(program, example) for example in examples])) == 6
    assert len(provider.calls) == 6


def test_evaluate(lm: Any) -> None:
    examples = [dspy.Example(question=str(n), answer="x").with_inputs("question") for n in range(4)]
    with dspy.context(lm=lm):
        result = dspy.Evaluate(devset=examples, metric=lambda *_: 1.0, num_threads=2)(
            dspy.Predict("question -> answer")
        )
    assert result.score == 100.0


def test_a_teleprompter_compiles(lm: Any) -> None:
    examples = [dspy.Example(question=str(n), answer="x").with_inputs("question") for n in range(4)]
    with dspy.context(lm=lm):
        compiled = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=2).compile(
            dspy.Predict("question -> answer"), trainset=examples
        )
    assert len(compiled.demos) > 0


def test_a_program_is_saved_and_loaded(lm: Any, tmp_path: Path) -> None:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    assert program.get_lm() is lm
    program.save(tmp_path / "program.json")
    assert "sk-test" not in (tmp_path / "program.json").read_text()
    fresh = dspy.ChainOfThought("question -> answer")
    fresh.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert type(fresh.predict.lm) is type(lm)


def test_a_copied_program_keeps_its_lm(lm: Any, provider: Provider) -> None:
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program.deepcopy()(question="?")
    assert program.reset_copy().lm is None
    assert len(provider.calls) == 1


# -- tasks and streams -----------------------------------------------------------------------------------------------
def test_tasks_run_beside_each_other(lm: Any, provider: Provider) -> None:
    async def many() -> list[Any]:
        with dspy.context(lm=lm):
            program = dspy.Predict("question -> answer")
            return await asyncio.gather(*(program.acall(question=str(number)) for number in range(5)))

    assert len(asyncio.run(many())) == 5
    assert len(provider.calls) == 5


def test_asyncify(lm: Any) -> None:
    async def one() -> Any:
        with dspy.context(lm=lm):
            return await dspy.asyncify(dspy.Predict("question -> answer"))(question="?")

    assert asyncio.run(one()).answer


def streamed(program: Any, listeners: list[Any], **inputs: Any) -> tuple[dict[str, str], Any]:
    """(text by field, prediction) of a stream."""

    async def listen() -> tuple[dict[str, str], Any]:
        said: dict[str, str] = {}
        prediction = None
        async for each in dspy.streamify(program, stream_listeners=listeners)(**inputs):
            if isinstance(each, dspy.streaming.StreamResponse):
                said[each.signature_field_name] = said.get(each.signature_field_name, "") + each.chunk
            elif isinstance(each, dspy.Prediction):
                prediction = each
        return said, prediction

    return asyncio.run(listen())


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.XMLAdapter])
def test_fields_are_streamed_as_they_come(make: Make, provider: Provider, adapter: Any) -> None:
    texts = {
        dspy.ChatAdapter: fields(reasoning="because of the sky", answer="a deep blue"),
        dspy.XMLAdapter: "<reasoning>\nbecause of the sky\n</reasoning>\n<answer>\na deep blue\n</answer>",
    }
    provider.answer, provider.chunks = texts[adapter], 20
    listeners = [dspy.streaming.StreamListener(name) for name in ("reasoning", "answer")]
    with dspy.context(lm=make(), adapter=adapter()):
        said, prediction = streamed(dspy.ChainOfThought("question -> answer"), listeners, question="?")
    assert {name: text.strip().strip('"') for name, text in said.items()} == {
        "reasoning": "because of the sky", "answer": "a deep blue",
    }  # fmt: skip
    assert prediction.answer == "a deep blue"
    assert provider.calls[-1].body["stream"] is True


def test_a_stream_without_tasks(make: Make, provider: Provider) -> None:
    provider.answer = CHAT
    with dspy.context(lm=make()):
        program = dspy.streamify(
            dspy.Predict("question -> answer"),
            stream_listeners=[dspy.streaming.StreamListener("answer")], async_streaming=False,
        )  # fmt: skip
        found = list(program(question="?"))
    assert isinstance(found[-1], dspy.Prediction)
    assert "".join(each.chunk for each in found[:-1]).strip() == "blue"


def test_a_cached_answer_is_not_lost_by_a_stream(make: Make, provider: Provider) -> None:
    provider.answer = CHAT
    with dspy.context(lm=make()):
        program = dspy.Predict("question -> answer")
        first = program(question="?")
        _, second = streamed(program, [dspy.streaming.StreamListener("answer")], question="?")
    assert first.answer == second.answer == "blue"


def test_a_stream_that_fails_raises(make: Make, provider: Provider) -> None:
    provider.faults = Status(400)
    with dspy.context(lm=make()), pytest.raises(BaseException) as caught:
        streamed(dspy.Predict("question -> answer"), [dspy.streaming.StreamListener("answer")], question="?")
    error: Any = caught.value
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]
    assert error.status == 400


def test_an_answer_in_the_wrong_form_raises_its_own_error(make: Make, provider: Provider) -> None:
    provider.answer = "nothing of the sort"
    with dspy.context(lm=make()), pytest.raises(AdapterParseError):
        dspy.Predict("question -> answer")(question="?")
