"""DSPy's own modules run on `dspy_prod.LM` as they do on `dspy.LM`; the provider sees what they really send."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import dspy
import pytest
from dspy.streaming import StreamListener, StreamResponse

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, CircuitOpenError, Price, call_context
from dspy_prod.testing import Provider
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import fresh_memory, records

KNOWN = "openai/gpt-4o-mini"
"""A model whose abilities DSPy knows: schemas and tools."""


class Triage(dspy.Signature):
    """Route a customer's message."""

    message: str = dspy.InputField()
    team: Literal["billing", "support"] = dspy.OutputField()
    urgency: int = dspy.OutputField()


@pytest.fixture
def provider(serve: MakeProvider) -> Provider:
    """A provider that answers whatever an adapter asks for."""
    return serve(prices={KNOWN: (0.15, 0.60)})


@pytest.fixture
def lm(provider: Provider, connect: MakeLM) -> Iterator[Any]:
    """The LM under test, in force for DSPy."""
    lm = connect(provider, model=KNOWN, max_tokens=500, cache=True)
    with dspy.context(lm=lm):
        yield lm


def test_predict_and_chain_of_thought(lm: Any, provider: Provider) -> None:
    """The plain modules give typed outputs, and ask the provider once each."""
    triage = dspy.Predict(Triage)(message="My card was charged twice.")
    assert (triage.team, triage.urgency) == ("billing", 1)
    thought = dspy.ChainOfThought(Triage)(message="My card was charged twice.")
    assert thought.reasoning
    assert len(provider.calls) == 2


def test_json_adapter_sends_the_schema(lm: Any, provider: Provider) -> None:
    """JSONAdapter reads our abilities, so that its schema reaches the provider as a strict response format."""
    with dspy.context(adapter=dspy.JSONAdapter()):
        triage = dspy.Predict(Triage)(message="My card was charged twice.")
        again = dspy.Predict(Triage)(message="My card was charged twice.")
    assert triage.team == again.team == "billing"
    (call,) = provider.calls
    assert call.response_format["type"] == "json_schema"
    assert set(call.response_format["schema"]["properties"]) == {"team", "urgency"}


def test_react_calls_its_tools(lm: Any, provider: Provider) -> None:
    """An agent thinks, calls a tool with arguments, sees the observation, finishes and answers."""
    called = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        called.append((a, b))
        return a + b

    steps = iter([("add", '{"a": 2, "b": 3}'), ("finish", "{}")])

    def answer(call: Any) -> str | None:
        if "next_tool_name" not in call.last_message:
            return None
        name, arguments = next(steps)
        fields = {"next_thought": "hm", "next_tool_name": name, "next_tool_args": arguments, "completed": ""}
        return "\n\n".join(f"[[ ## {field} ## ]]\n{value}" for field, value in fields.items())

    provider.answer = answer
    prediction = dspy.ReAct("question -> answer", tools=[add])(question="2 + 3?")
    assert called == [(2, 3)]
    assert prediction.trajectory["observation_0"] == 5
    assert "observation_0" in provider.calls[-1].prompt
    assert [record.outcome for record in records(lm)] == ["ok"] * 3


def test_native_tools_are_offered_and_called(lm: Any, provider: Provider) -> None:
    """With native function calling the tools travel in the request and their calls come back typed, hits included."""
    provider.call_tools = True

    def weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    signature = dspy.Signature("question, tools: list[dspy.Tool] -> calls: dspy.ToolCalls")
    with dspy.context(adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        for _ in range(2):
            calls = dspy.Predict(signature)(question="weather?", tools=[dspy.Tool(weather)]).calls
            assert [call.name for call in calls.tool_calls] == ["weather"]
    (call,) = provider.calls
    assert [tool["name"] for tool in call.tools] == ["weather"]


def test_parallel_and_evaluate_carry_the_context_into_their_threads(lm: Any, provider: Provider) -> None:
    """Worker threads of DSPy find user and tags of the call context; scores and answers are those of the program."""
    program = dspy.Predict("question -> answer")
    with call_context(user="u1", tags={"feature": "qa"}):
        answers = dspy.Parallel(num_threads=4, disable_progress_bar=True)(
            [(program, dspy.Example(question=f"q{i}").with_inputs("question")) for i in range(8)]
        )
    assert [each.answer for each in answers] == ["answer text"] * 8
    assert {(record.user, record.tags) for record in records(lm)} == {("u1", (("feature", "qa"),))}
    devset = [dspy.Example(question=f"e{i}", answer="answer text").with_inputs("question") for i in range(8)]
    with call_context(user="u2"):
        result = dspy.Evaluate(devset=devset, metric=dspy.evaluate.answer_exact_match, num_threads=4)(program)
    assert result.score == 100.0
    assert len([record for record in records(lm) if record.user == "u2"]) == 8
    assert len(provider.calls) == 16


def test_best_of_n_finds_the_best(lm: Any, provider: Provider) -> None:
    """BestOfN gets different answers with the cache on, stops at the first that is good enough, and returns it."""
    provider.answer = lambda call: f"[[ ## answer ## ]]\n{call.index}\n\n[[ ## completed ## ]]"
    module = dspy.BestOfN(
        dspy.Predict("question -> answer"), N=5, reward_fn=lambda args, pred: float(pred.answer == "2"), threshold=1.0
    )
    assert module(question="which?").answer == "2"
    assert len(provider.calls) == 3


def test_refine_gives_advice(lm: Any, provider: Provider) -> None:
    """Refine runs its module again with advice from the model, within one set of policies."""
    module = dspy.Refine(dspy.Predict("question -> answer"), N=2, reward_fn=lambda args, pred: 0.0, threshold=1.0)
    assert module(question="which?").answer
    assert len(records(lm)) == len(provider.calls) == 3


# -- asynchronous ----------------------------------------------------------------------------------------------------
def test_acall_and_asyncify(lm: Any, provider: Provider) -> None:
    """The asynchronous ways into a program reach the same cache and keep the call context."""

    async def run() -> list[str]:
        program = dspy.Predict("question -> answer")
        with dspy.context(lm=lm), call_context(user="u1"):
            first = await program.acall(question="q")
            second = await dspy.asyncify(program)(question="q")
        return [first.answer, second.answer]

    assert asyncio.run(run()) == ["answer text"] * 2
    assert len(provider.calls) == 1
    assert [(record.outcome, record.user) for record in records(lm)] == [("ok", "u1"), ("cached", "u1")]


def streamed(lm: Any, **options: Any) -> list[Any]:
    """Everything that a streaming program yields."""

    async def run() -> list[Any]:
        program = dspy.streamify(dspy.Predict("question -> answer"), **options)
        with dspy.context(lm=lm):
            return [item async for item in program(question="why?")]

    return asyncio.run(run())


TOLD = "one two three four five six"


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
@pytest.mark.parametrize("hit", [False, True], ids=["upstream", "hit"])
def test_streamify_delivers_chunks(lm: Any, provider: Provider, hit: bool, adapter: Any) -> None:
    """A listener hears the field piece by piece, from the provider and from the cache alike."""
    chat = type(adapter) is dspy.ChatAdapter  # JSONAdapter is one, too
    provider.chunks = 20
    provider.answer = f"[[ ## answer ## ]]\n{TOLD}\n\n[[ ## completed ## ]]" if chat else {"answer": TOLD}
    with dspy.context(adapter=adapter):
        if hit:
            streamed(lm)
        *chunks, prediction = streamed(lm, stream_listeners=[StreamListener(signature_field_name="answer")])
    assert len(provider.calls) == 1
    assert provider.calls[0].stream
    assert len(chunks) > 3
    assert all(isinstance(chunk, StreamResponse) for chunk in chunks)
    heard = "".join(chunk.chunk for chunk in chunks)
    assert (heard if chat else heard.strip('"')) == prediction.answer == TOLD  # DSPy leaves JSON its quotes


def test_a_streamed_call_costs_what_the_provider_bills(lm: Any, provider: Provider) -> None:
    """Usage is asked for in streams too, so that the ledger knows their price."""
    streamed(lm)
    (record,) = records(lm)
    assert record.cost_nano == provider.bill.nano > 0
    assert not record.estimated


# -- programs --------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:max_tokens=:UserWarning")
def test_a_copied_program_shares_budget_and_breaker(serve: MakeProvider, connect: MakeLM) -> None:
    """What optimizers deep-copy keeps drawing on the same money, and notices the same outage."""
    provider = serve(usage=(0, 100), prices={"openai/e2e": (0, 100)})
    lm = connect(
        provider, budget=Budget(usd=0.02), breaker=CircuitBreaker(failure_threshold=1),
        prices={"openai/e2e": (0, 100)},
    )  # fmt: skip
    program = dspy.Predict("question -> answer")
    program.lm = lm
    twins = [program.deepcopy() for _ in range(3)]
    answers = []
    for number, twin in enumerate(twins):
        assert twin.lm is not lm
        try:
            answers.append(twin(question=f"q{number}").answer)
        except dspy_prod.BudgetExceededError as refusal:
            answers.append(refusal.reason)
    assert answers == ["answer text", "answer text", "budget_exceeded"]
    twins[0].lm.pipeline.primary.breaker.force_open()
    with pytest.raises(CircuitOpenError):
        twins[1](question="q")


@pytest.mark.filterwarnings("ignore:max_tokens=:UserWarning")
def test_wrap_puts_policies_around_anybody_s_lm(serve: MakeProvider) -> None:
    """`wrap` keeps model, key, address and arguments, replaces cache and retries by ours, and leaves the LM alone."""
    provider = serve(usage=(0, 100), prices={"openai/e2e": (0, 100)})
    plain = dspy.LM("openai/e2e", api_key="test", api_base=provider.url, temperature=0.5, max_tokens=100)
    lm = dspy_prod.wrap(
        plain, budget=Budget(usd=0.01), prices={"openai/e2e": Price(input=0, output=100)}, store=fresh_memory()
    )
    assert lm("q") == lm("q") == ["ok"]
    with pytest.raises(dspy_prod.BudgetExceededError):
        lm("another")
    (call,) = provider.calls
    assert call.body["temperature"] == 0.5
    assert call.max_tokens == 100
    assert call.headers["authorization"] == "Bearer test"
    assert plain("yet another") == ["ok"], "the wrapped LM itself has no budget"


def test_wrap_takes_a_dummy_and_refuses_what_it_would_bypass() -> None:
    """DSPy's DummyLM keeps its script; an LM with a `forward` of its own is refused, with the way out."""
    dummy = dspy_prod.wrap(dspy.utils.DummyLM([{"answer": "scripted"}]), store="memory://dummy")
    with dspy.context(lm=dummy):
        assert dspy.Predict("question -> answer")(question="q").answer == "scripted"

    class Own(dspy.LM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("never called")

    with pytest.raises(dspy_prod.ConfigError, match=r"forward.*implement an engine"):
        dspy_prod.wrap(Own("openai/own"))
