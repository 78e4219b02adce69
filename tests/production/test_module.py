"""`Production`: the last fallback, the report of a call, and what it delegates to its program."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError, LMAuthError, LMError, LMServerError

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, ConfigError, Price, Production, Retry, call_context, call_report
from dspy_prod.errors import (
    BudgetExceededError,
    CircuitOpenError,
    DeadlineExceededError,
    RateLimitedError,
    RejectedError,
    StoreUnavailableError,
    UnpricedModelError,
)
from dspy_prod.production.module import raising, reason_of
from dspy_prod.testing import ErrorInStream, Hang, Provider, ScriptedEngine, Status
from tests.logged import logged

MODEL = "openai/test-model"
PRICE = Price(input=1.0, output=2.0)
COST = (10 * 1.0 + 5 * 2.0) / 1e6  # of one answer of a ScriptedEngine
SORRY = "We will get back to you."

_names = itertools.count()


def said(**fields: Any) -> str:
    """An answer in the ChatAdapter's form."""
    return "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in fields.items()) + "[[ ## completed ## ]]"


def down() -> LMServerError:
    return LMServerError("the server had an error", model=MODEL, status=500)


def make_lm(*answers: Any, **policies: Any) -> tuple[dspy_prod.LM, ScriptedEngine]:
    """An LM on a script of answers, alone in its store, that tries once."""
    engine = ScriptedEngine(list(answers) or [said(answer="yes")])
    defaults: dict[str, Any] = {"retry": False, "breaker": False, "prices": {MODEL: PRICE}}
    lm = dspy_prod.LM(
        MODEL, engine=engine, async_engine=engine.asynchronous, store=f"memory://module-{next(_names)}",
        **{**defaults, **policies},
    )  # fmt: skip
    return lm, engine


class Triage(dspy.Module):  # type: ignore[misc]
    """Two predictors, one prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.label = dspy.Predict("question -> label")
        self.reply = dspy.ChainOfThought("question, label -> urgent: bool, reply")

    def forward(self, question: str) -> dspy.Prediction:
        label = self.label(question=question).label
        reply = self.reply(question=question, label=label)
        return dspy.Prediction(label=label, reply=reply.reply)


class Broken(dspy.Module):  # type: ignore[misc]
    """Raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self.error = error

    def forward(self, question: str) -> dspy.Prediction:
        raise self.error

    async def aforward(self, question: str) -> dspy.Prediction:
        raise self.error


def qa() -> dspy.Predict:
    return dspy.Predict("question -> answer")


EXAMPLES = [dspy.Example(question=f"q{i}", answer="yes").with_inputs("question") for i in range(6)]


def always_right(example: Any, prediction: Any, trace: Any = None) -> float:
    return 1.0


@pytest.fixture
def events() -> Iterator[list[dspy_prod.Event]]:
    seen: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(seen.append)
    yield seen
    remove()


# -- what the fallback answers ---------------------------------------------------------------------------------------
def test_a_healthy_program_answers_as_without_the_wrapper() -> None:
    """A Production returns the program's own Prediction, untouched but for its report."""
    lm, _ = make_lm(said(answer="yes"))
    with dspy.context(lm=lm):
        pred = Production(qa(), fallback_response=SORRY)(question="q")
    assert pred.toDict() == {"answer": "yes"}
    assert list(pred.keys()) == ["answer"]
    assert call_report(pred).status == "ok"


def test_a_string_fills_the_last_text_output_and_leaves_the_others_none() -> None:
    """A program with several outputs still has all its fields when the fallback answers."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm):
        pred = Production(dspy.ChainOfThought("question -> answer, score: float"), fallback_response=SORRY)(
            question="q"
        )
    assert pred.toDict() == {"reasoning": None, "answer": SORRY, "score": None}


def test_a_string_for_a_program_of_several_predictors_fills_the_last_text_of_all() -> None:
    """The outputs of a program without a signature of its own are those of all its predictors."""
    lm, _ = make_lm(said(label="bug"), down())
    with dspy.context(lm=lm):
        pred = Production(Triage(), fallback_response=SORRY)(question="q")
    assert pred.reply == SORRY
    assert pred.label is None


def test_a_dict_gives_the_outputs_and_each_call_its_own_copy() -> None:
    """A caller that changes a fallback's list does not change the next caller's."""
    lm, _ = make_lm(down())
    prod = Production(dspy.Predict("question -> tags: list[str], answer"), fallback_response={"tags": ["none"]})
    with dspy.context(lm=lm):
        first = prod(question="q")
        first.tags.append("changed")
        second = prod(question="q")
    assert second.toDict() == {"tags": ["none"], "answer": None}


def test_a_prediction_is_taken_as_it_is() -> None:
    """A forward that returns fields of its own is served by a Prediction, which nobody checks."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm):
        pred = Production(Triage(), fallback_response=dspy.Prediction(queue="manual"))(question="q")
    assert pred.toDict() == {"queue": "manual"}
    assert call_report(pred).status == "fallback"


def test_a_function_gets_the_inputs() -> None:
    """A computed fallback may use what was asked."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm):
        pred = Production(qa(), fallback_response=lambda question: f"later: {question}")(question="why?")
    assert pred.answer == "later: why?"


def test_a_function_that_gives_none_lets_the_error_pass() -> None:
    """A computed fallback may decline."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm), pytest.raises(LMServerError):
        Production(qa(), fallback_response=lambda question: None)(question="q")


def test_a_function_that_gives_nonsense_is_told_so_from_the_first_error() -> None:
    """A defect of the fallback does not hide what made it necessary."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm), pytest.raises(TypeError, match="gave a int") as caught:
        Production(qa(), fallback_response=lambda question: 7)(question="q")
    assert isinstance(caught.value.__cause__, LMServerError)


def test_an_async_function_answers_in_acall_and_names_the_remedy_in_a_plain_call() -> None:
    """An async fallback needs an async call."""

    async def later(question: str) -> str:
        return f"later: {question}"

    lm, _ = make_lm(down())
    prod = Production(qa(), fallback_response=later)
    with dspy.context(lm=lm):
        assert asyncio.run(prod.acall(question="q")).answer == "later: q"
        with pytest.raises(TypeError, match=r"await prod\.acall"):
            prod(question="q")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_module_runs_with_the_same_inputs_and_its_cost_counts(asynchronous: bool) -> None:
    """A cheaper program as fallback is paid for and named in the report."""
    lm, _ = make_lm(down())
    spare, _ = make_lm(said(answer="spare"))
    backup = qa()
    backup.set_lm(spare)
    prod = Production(qa(), fallback_response=backup)
    with dspy.context(lm=lm):
        pred = asyncio.run(prod.acall(question="q")) if asynchronous else prod(question="q")
    report = call_report(pred)
    assert pred.answer == "spare"
    assert (report.status, report.reason, report.attempts) == ("fallback", "upstream_error", 2)
    assert report.cost_usd == pytest.approx(COST)
    assert report.model == MODEL


def test_a_fallback_module_without_aforward_answers_acall_from_a_thread() -> None:
    """A synchronous fallback module serves an asynchronous program."""
    lm, _ = make_lm(down())

    class Plain(dspy.Module):  # type: ignore[misc]
        def forward(self, question: str) -> dspy.Prediction:
            return dspy.Prediction(answer=f"plain {question}")

    with dspy.context(lm=lm):
        assert asyncio.run(Production(qa(), fallback_response=Plain()).acall(question="q")).answer == "plain q"


def test_a_failing_fallback_module_raises_its_error_from_the_first() -> None:
    """Both errors are in the traceback when the fallback fails too."""
    lm, _ = make_lm(down())
    backup = qa()
    backup.set_lm(make_lm(LMAuthError("no", model=MODEL, status=401))[0])
    with dspy.context(lm=lm), pytest.raises(LMAuthError) as caught:
        Production(qa(), fallback_response=backup)(question="q")
    assert isinstance(caught.value.__cause__, LMServerError)


def test_without_a_fallback_response_the_error_is_raised() -> None:
    """There is nothing to answer with, and an invented answer would be worse."""
    lm, _ = make_lm(down())
    with dspy.context(lm=lm), pytest.raises(LMServerError):
        Production(qa())(question="q")


TABLE = {"upstream_error": "upstream", "triage": "by name", "default": "default"}


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("triage", down(), "upstream"),
        ("triage", CircuitOpenError("open"), "by name"),
        ("other", CircuitOpenError("open"), "default"),
    ],
)
def test_a_table_answers_by_reason_then_name_then_default(name: str, error: Exception, expected: str) -> None:
    """Several programs share one table, and the most telling entry wins."""
    assert Production(Broken(error), name, TABLE)(question="q").answer == expected


def test_a_table_without_a_fitting_entry_lets_the_error_pass() -> None:
    """A table for one reason answers for that reason alone."""
    prod = Production(Broken(down()), fallback_response={"budget_exceeded": SORRY})
    with pytest.raises(LMServerError):
        prod(question="q")


# -- refused at construction -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("signature", "response", "complaint"),
    [
        ("question -> score: float", "sorry", "no text output"),
        ("question -> answer", {"anser": "x"}, "'anser'"),
        ("question -> answer", {}, "empty"),
        ("question -> answer", 7, "takes a string"),
        ("question -> default", {"default": "x"}, "may mean outputs or a table"),
        ("question -> answer", {"circuit_opened": "x", "default": "y"}, "do you mean 'circuit_open'"),
        ("question -> answer", {"answer": "x", "default": "y"}, "'default'"),
        ("question -> answer", {"upstream_error": {"anser": "x"}}, "'anser'"),
    ],
)
def test_a_fallback_that_cannot_be_meant_is_refused_when_it_is_made(
    signature: str, response: Any, complaint: str
) -> None:
    """A mistake in the fallback shows at start-up, not in the first outage."""
    with pytest.raises(ConfigError, match=complaint):
        Production(dspy.Predict(signature), fallback_response=response)


@pytest.mark.parametrize(
    "arguments",
    [{"catch": "everything"}, {"deadline": 0}, {"deadline": -1}, {"priority": "urgent"}, {"name": ""}, {"tags": 3}],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any]) -> None:
    """Every impossible argument is a ConfigError."""
    with pytest.raises(ConfigError):
        Production(qa(), **arguments)


def test_only_a_module_can_be_wrapped() -> None:
    """A plain function is no program."""
    with pytest.raises(ConfigError, match=r"dspy\.Module"):
        Production(lambda question: "x")  # type: ignore[arg-type]


def test_the_remedy_for_an_ambiguous_mapping_works() -> None:
    """An output called `default` can be given as a Prediction, and the table by one more entry."""
    program = Broken(down())
    program.answer = dspy.Predict("question -> default")
    assert Production(program, fallback_response=dspy.Prediction(default="x"))(question="q").default == "x"
    table = {"default": "y", "upstream_error": "z"}
    assert Production(program, fallback_response=table)(question="q").default == "z"


# -- which errors ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CircuitOpenError("x"), "circuit_open"),
        (RateLimitedError("x"), "rate_limited"),
        (BudgetExceededError("x"), "budget_exceeded"),
        (DeadlineExceededError("x"), "deadline_exceeded"),
        (UnpricedModelError("x"), "unpriced_model"),
        (StoreUnavailableError("x"), "store_unavailable"),
        (RejectedError("x"), "upstream_error"),
        (down(), "upstream_error"),
        (LMAuthError("x"), "upstream_error"),
        (AdapterParseError("ChatAdapter", dspy.Signature("q -> a"), "secret words"), "parse_error"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_kind_of_unavailability_has_its_reason(error: Exception, reason: str, asynchronous: bool) -> None:
    """The report says why the fallback answered, in a call and in acall."""
    prod = Production(Broken(error), "triage", SORRY)
    pred = asyncio.run(prod.acall(question="q")) if asynchronous else prod(question="q")
    report = call_report(pred)
    assert pred.answer == SORRY
    assert (report.status, report.reason, report.program) == ("fallback", reason, "triage")
    assert report.error is not None
    assert report.error.startswith(type(error).__name__)
    assert "secret words" not in report.error


def test_a_defect_of_the_program_raises_unless_everything_is_caught(caplog: pytest.LogCaptureFixture) -> None:
    """`catch="all"` answers for a defect too, and logs its traceback."""
    with pytest.raises(KeyError):
        Production(Broken(KeyError("x")), fallback_response=SORRY)(question="q")
    with caplog.at_level(logging.ERROR, "dspy_prod"):
        pred = Production(Broken(KeyError("x")), fallback_response=SORRY, catch="all")(question="q")
    assert call_report(pred).reason == "unexpected_error"
    assert logged(caplog)[0].exc_info is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), asyncio.CancelledError(), GeneratorExit()])
def test_interruption_always_passes(error: BaseException) -> None:
    """Neither Ctrl-C nor a cancellation is ever answered by a fallback."""
    with pytest.raises(type(error)):
        Production(Broken(error), fallback_response=SORRY, catch="all")(question="q")


def test_a_cancelled_task_is_cancelled() -> None:
    """A timeout around acall works as around the bare program."""

    class Slow(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.wait_for(Production(Slow(), fallback_response={"x": 1}, catch="all").acall(), 0.01)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())


def test_a_group_of_lm_errors_counts_as_the_first_of_them() -> None:
    """A program that runs tasks in a group fails with a group."""

    class Group(Exception):
        exceptions = (CircuitOpenError("x"), down())

    class Mixed(Exception):
        exceptions = (CircuitOpenError("x"), KeyError("x"))

    assert reason_of(Group()) == "circuit_open"
    assert reason_of(Mixed()) == "unexpected_error"


def test_acall_of_a_program_without_aforward_names_the_remedy_even_when_everything_is_caught() -> None:
    """A program that cannot run at all is a mistake, not an outage."""
    with pytest.raises(TypeError, match="asyncify"):
        asyncio.run(Production(Triage(), fallback_response=SORRY, catch="all").acall(question="q"))


def test_an_open_circuit_is_answered_without_a_request() -> None:
    """The policies' own refusals reach the fallback through a real program."""
    lm, engine = make_lm(down(), breaker=CircuitBreaker(failure_threshold=1, recovery_timeout=60))
    prod = Production(qa(), fallback_response=SORRY)
    with dspy.context(lm=lm):
        reports = [call_report(prod(question=f"q{i}")) for i in range(3)]
    assert [report.reason for report in reports] == ["upstream_error", "circuit_open", "circuit_open"]
    assert engine.calls == 1
    assert reports[1].cost_usd == 0
    assert reports[1].attempts == 0
    assert reports[1].model is None


def test_an_empty_budget_is_answered_and_costs_nothing() -> None:
    """A refused call is free, and says so."""
    lm, engine = make_lm(budget=Budget(usd=1e-6), max_tokens=100)
    with dspy.context(lm=lm):
        report = call_report(Production(qa(), fallback_response=SORRY)(question="q"))
    assert report.reason == "budget_exceeded"
    assert report.cost_usd == 0
    assert engine.calls == 0


def test_an_unparsable_answer_is_paid_for() -> None:
    """What the model said in the wrong form is not shown, but its price is."""
    lm, _ = make_lm("no fields here")
    with dspy.context(lm=lm):
        report = call_report(Production(qa(), fallback_response=SORRY)(question="q"))
    assert report.reason == "parse_error"
    assert report.error is not None
    assert "no fields here" not in report.error
    assert "[answer]" in report.error
    assert report.cost_usd is not None
    assert report.cost_usd >= COST


# -- conditions ------------------------------------------------------------------------------------------------------
def test_the_deadline_of_a_production_ends_its_program_but_not_its_fallback_module() -> None:
    """The fallback has the caller's time, which is why it can still answer."""
    with Provider(faults=Hang()) as provider:
        lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="x", store="memory://deadline")
        backup = qa()
        backup.set_lm(make_lm(said(answer="spare"))[0])
        prod = Production(qa(), fallback_response=backup, deadline=0.2)
        with dspy.context(lm=lm):
            pred = prod(question="q")
            with call_context(deadline=0.1), pytest.raises(DeadlineExceededError) as caught:
                prod(question="other")
    report = call_report(pred)
    assert pred.answer == "spare"
    assert report.reason == "deadline_exceeded"
    assert 0.15 < report.latency < 1.5
    assert isinstance(caught.value.__cause__, DeadlineExceededError)


def test_the_ledger_names_program_priority_and_tags() -> None:
    """What a Production was made with is in each record; a caller's tags stay, its user too."""
    lm, _ = make_lm()
    prod = Production(qa(), "triage", priority="low", tags={"feature": "faq", "team": "a"})
    with dspy.context(lm=lm), call_context(user="u1", priority="high", tags={"team": "b", "x": "y"}):
        prod(question="q")
    record = lm.ledger.records()[0]
    assert (record.program, record.user, record.priority) == ("triage", "u1", "low")
    assert dict(record.tags) == {"feature": "faq", "team": "a", "x": "y"}


def test_without_a_name_the_class_of_the_program_is_recorded() -> None:
    """Two programs are kept apart in the ledger even if nobody named them."""
    assert Production(Triage()).name == "Triage"


# -- the report ------------------------------------------------------------------------------------------------------
def test_the_report_sums_all_attempts_of_all_calls() -> None:
    """Retries and both predictors are in the cost; the model that answered last is named."""
    lm, _ = make_lm(down(), said(label="bug"), said(reasoning="r", urgent=True, reply="hi"), retry=Retry(attempts=2))
    with dspy.context(lm=lm), call_context(variant="cot", trace_id="t1"):
        report = call_report(Production(Triage())(question="q"))
    assert report.status == "ok"
    assert report.attempts == 3
    assert report.cost_usd == pytest.approx(2 * COST)
    assert (report.usage.input_tokens, report.usage.output_tokens) == (20, 10)
    assert (report.model, report.route, report.variant, report.trace_id) == (MODEL, "primary", "cot", "t1")
    assert len(report.call_ids) == 2
    assert report.error is None


def test_a_model_fallback_is_an_ordinary_answer_of_another_model() -> None:
    """The report tells which route gave the answer."""
    spare = ScriptedEngine(said(answer="spare"))
    other = dspy.LM("openai/other", engine=spare, async_engine=spare.asynchronous)
    lm, _ = make_lm(down(), fallbacks=[other])
    with dspy.context(lm=lm):
        report = call_report(Production(qa(), fallback_response=SORRY)(question="q"))
    assert (report.status, report.model, report.route) == ("ok", "openai/other", "openai/other")


def test_a_call_answered_from_the_cache_is_free_and_marked() -> None:
    """`cached` means that no LM call went upstream."""
    lm, _ = make_lm()
    prod = Production(qa())
    with dspy.context(lm=lm):
        prod(question="q")
        report = call_report(prod(question="q"))
    assert (report.status, report.cost_usd, report.attempts, report.model) == ("cached", 0, 0, MODEL)


def test_a_partly_cached_call_is_ok() -> None:
    """One upstream request is enough not to be `cached`."""
    lm, _ = make_lm(said(label="bug"), said(reasoning="r", urgent=True, reply="hi"), said(label="bug"))
    program = Triage()
    with dspy.context(lm=lm):
        program.label(question="q")
        report = call_report(Production(program)(question="q"))
    assert (report.status, report.attempts) == ("ok", 1)


def test_an_unknown_price_makes_the_cost_unknown() -> None:
    """Unknown is never zero."""
    lm, _ = make_lm(prices={})
    with dspy.context(lm=lm):
        assert call_report(Production(qa())(question="q")).cost_usd is None


def test_a_plain_dspy_lm_is_seen_through_the_history() -> None:
    """A program that partly runs on a plain dspy.LM is not reported as free."""
    engine = ScriptedEngine(said(answer="yes"))
    lm = dspy.LM(MODEL, engine=engine, async_engine=engine.asynchronous, cache=False)
    with dspy.context(lm=lm):
        report = call_report(Production(qa())(question="q"))
    assert report.cost_usd is None
    assert (report.status, report.attempts, report.model, report.route) == ("ok", 1, MODEL, None)
    assert report.usage.input_tokens == 10


def test_a_program_without_lm_calls_is_free() -> None:
    """A program that asks no model costs nothing, and that is known."""

    class Constant(dspy.Module):  # type: ignore[misc]
        def forward(self) -> dspy.Prediction:
            return dspy.Prediction(answer="42")

    report = call_report(Production(Constant())())
    assert (report.status, report.cost_usd, report.usage.input_tokens, report.model) == ("ok", 0, None, None)


def test_a_production_within_a_production_is_counted_by_both() -> None:
    """The inner call has its own report; the outer one's includes it."""
    lm, _ = make_lm(said(label="bug"), down())

    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.label = dspy.Predict("question -> label")
            self.inner = Production(qa(), "inner", SORRY)
            self.reports: list[dspy_prod.CallReport] = []

        def forward(self, question: str) -> dspy.Prediction:
            self.label(question=question)
            pred = self.inner(question=question)
            self.reports.append(call_report(pred))
            return dspy.Prediction(answer=pred.answer)

    program = Outer()
    with dspy.context(lm=lm):
        outer = call_report(Production(program, "outer")(question="q"))
    inner = program.reports[0]
    assert (outer.status, inner.status) == ("ok", "fallback")
    assert (outer.attempts, inner.attempts) == (2, 1)
    assert [record.program for record in lm.ledger.records()].count("inner") == 1


def test_reports_of_concurrent_calls_do_not_mix() -> None:
    """Each of many threads sees the records of its own call."""
    lm, _ = make_lm(lambda request: said(answer="yes") if "q3" not in str(request.messages) else down())
    prod = Production(qa(), fallback_response=SORRY)
    with dspy.context(lm=lm):
        preds = prod.batch(EXAMPLES, num_threads=4, disable_progress_bar=True)
    reports = [call_report(pred) for pred in preds]
    assert [report.status for report in reports] == ["ok", "ok", "ok", "fallback", "ok", "ok"]
    assert [report.attempts for report in reports] == [1] * 6


def test_calls_in_parallel_threads_of_the_program_are_in_its_report() -> None:
    """A program that uses dspy.Parallel inside is reported whole."""
    lm, _ = make_lm()

    class Fan(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.qa = qa()

        def forward(self) -> dspy.Prediction:
            parallel = dspy.Parallel(num_threads=3, disable_progress_bar=True)
            return dspy.Prediction(answers=parallel([(self.qa, example) for example in EXAMPLES]))

    with dspy.context(lm=lm):
        report = call_report(Production(Fan())())
    assert report.attempts == 6
    assert report.cost_usd == pytest.approx(6 * COST)


def test_a_report_is_no_part_of_the_prediction() -> None:
    """Keys, equality and copies of a Prediction know nothing of the report; a pickle keeps it."""
    pred = Production(Broken(down()), fallback_response=SORRY)(question="q")
    assert pred == dspy.Prediction(answer=SORRY)
    assert list(pred.keys()) == ["answer"]
    assert "report" not in repr(pred)
    assert call_report(pickle.loads(pickle.dumps(pred))) == call_report(pred)
    with pytest.raises(ValueError, match="not a copy"):
        call_report(pred.copy())


@pytest.mark.parametrize("stranger", [dspy.Prediction(answer="x"), "text", None])
def test_what_no_production_returned_has_no_report(stranger: Any) -> None:
    """The error says how to get a report."""
    with pytest.raises(ValueError, match=r"dspy_prod\.Production"):
        call_report(stranger)


def test_a_report_cannot_be_changed() -> None:
    """Reports are facts."""
    pred = Production(Broken(down()), fallback_response=SORRY)(question="q")
    with pytest.raises(ValueError):
        call_report(pred).status = "ok"


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-abcdef1234567890.",
        "401 for https://user:hunter22@proxy/v1",
        "Authorization: Bearer abcdefgh",
        "unknown key my-very-own-key",
        "request with abcdefABCDEF0123456789abcdef failed",
    ],
)
def test_no_secret_gets_into_a_report(text: str) -> None:
    """A provider that echoes the key does not make it public."""
    secrets = ("sk-proj-abcdef1234567890", "hunter22", "abcdefgh", "my-very-own-key", "abcdefABCDEF0123456789abcdef")
    with Provider() as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini",
            api_base=provider.url,
            api_key="my-very-own-key",
            retry=False,
            store="memory://module-keys",
        )
        provider.faults = Status(401, message=text)
        with dspy.context(lm=lm):
            report = call_report(Production(qa(), fallback_response=SORRY)(question="q"))
    assert report.error is not None
    assert report.error.startswith("LMAuthError 401: ")
    assert not any(secret in report.model_dump_json() for secret in secrets)
    assert "***" in report.error


def test_a_fallback_is_an_event(events: list[dspy_prod.Event]) -> None:
    """Whoever watches the events sees each canned answer."""
    with call_context(user="u1"):
        Production(Broken(down()), "triage", SORRY)(question="q")
    data = dict(events[-1].data)
    assert events[-1].name == "fallback_response"
    assert (data["program"], data["reason"], data["user"]) == ("triage", "upstream_error", "u1")


# -- scoring ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_threads", [1, 4])
def test_evaluate_never_scores_a_canned_answer(num_threads: int) -> None:
    """With a dead model every row fails, whatever the metric thinks of the fallback's text."""
    lm, _ = make_lm(down())
    prod = Production(qa(), fallback_response=SORRY, catch="all")
    evaluate = dspy.Evaluate(devset=EXAMPLES, metric=always_right, num_threads=num_threads, max_errors=100)
    with dspy.context(lm=lm):
        assert evaluate(prod).score == 0.0
        assert prod(question="q").answer == SORRY  # and afterwards it answers again


def test_a_program_with_threads_of_its_own_raises_inside_evaluate_too() -> None:
    """The rule follows DSPy into nested threads."""
    lm, _ = make_lm(down())

    class Fan(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.prod = Production(qa(), fallback_response=SORRY)

        def forward(self, question: str) -> dspy.Prediction:
            parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True, max_errors=1)
            return parallel([(self.prod, dspy.Example(question=question).with_inputs("question"))])[0]

    evaluate = dspy.Evaluate(devset=EXAMPLES, metric=always_right, num_threads=2, max_errors=100)
    with dspy.context(lm=lm):
        assert evaluate(Fan()).score == 0.0


class _Copro(dspy.COPRO):  # type: ignore[misc]
    """COPRO with its extra argument filled in."""

    def compile(self, student: Any, *, trainset: Any) -> Any:
        return super().compile(student, trainset=trainset, eval_kwargs={"num_threads": 2})


class _Mipro(dspy.MIPROv2):  # type: ignore[misc]
    """MIPROv2 with its extra arguments filled in."""

    def compile(self, student: Any, *, trainset: Any) -> Any:
        return super().compile(student, trainset=trainset, valset=trainset, num_trials=2, minibatch=False)


def optimizers(prompts: Any) -> dict[str, Callable[[], Any]]:
    """DSPy's optimizers, with an LM that proposes prompts."""
    bootstrap: dict[str, Any] = {"metric": always_right, "max_errors": 100}
    threads = {"num_threads": 2}
    return {
        "BootstrapFewShot": lambda: dspy.BootstrapFewShot(**bootstrap),
        "BootstrapFewShotWithRandomSearch": lambda: dspy.BootstrapFewShotWithRandomSearch(
            num_candidate_programs=2, **bootstrap
        ),
        "COPRO": lambda: _Copro(metric=always_right, prompt_model=prompts, breadth=2, depth=1),
        "MIPROv2": lambda: _Mipro(auto=None, num_candidates=2, prompt_model=prompts, **bootstrap, **threads),
        "SIMBA": lambda: dspy.SIMBA(metric=always_right, bsize=2, num_candidates=2, max_steps=1, **threads),
        "GEPA": lambda: dspy.GEPA(
            metric=lambda gold, pred, trace=None, pred_name=None, pred_trace=None: 1.0,
            max_metric_calls=4, reflection_lm=prompts, **threads,
        ),
    }  # fmt: skip


NEEDS = {"SIMBA": ["numpy"], "MIPROv2": ["numpy", "optuna"], "GEPA": ["gepa"]}
PROPOSAL = said(
    proposed_instruction="x", proposed_prefix_for_output_field="y", observations="o", summary="s",
    program_description="d", module_description="m",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(optimizers(None)))
def test_optimizers_see_errors_instead_of_canned_answers(name: str, events: list[dspy_prod.Event]) -> None:
    """With a dead model no optimizer is given a single canned answer."""
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    lm, engine = make_lm(down(), cache=False)
    prod = Production(qa(), fallback_response=SORRY, catch="all")
    with dspy.context(lm=lm, max_errors=100):
        with contextlib.suppress(LMError):  # some raise the model's error in the end, some give a program
            optimizers(make_lm(PROPOSAL)[0])[name]().compile(prod, trainset=EXAMPLES)
    assert engine.calls > 0
    assert not [event for event in events if event.name == "fallback_response"]


def test_bootstrap_few_shot_compiles_a_production() -> None:
    """The demos land in the program's predictor, and the result is a Production with the same fallback."""
    lm, _ = make_lm()
    prod = Production(dspy.ChainOfThought("question -> answer"), "triage", SORRY)
    lm, _ = make_lm(said(reasoning="r", answer="yes"))
    with dspy.context(lm=lm):
        best = dspy.BootstrapFewShot(metric=always_right, max_bootstrapped_demos=2).compile(prod, trainset=EXAMPLES)
    assert isinstance(best, Production)
    assert best.name == "triage"
    assert [demo.augmented for demo in best.program.predict.demos[:2]] == [True, True]
    assert prod.program.predict.demos == []
    assert best.program._compiled
    assert not prod.program._compiled
    with dspy.context(lm=make_lm(down())[0]):
        assert best(question="q").answer == SORRY


def test_raising_serves_scoring_loops_of_ones_own() -> None:
    """Inside `raising()` a Production raises, and afterwards it does not."""
    prod = Production(Broken(down()), fallback_response=SORRY)
    with raising(), pytest.raises(LMServerError):
        prod(question="q")
    assert prod(question="q").answer == SORRY


def test_evaluations_that_overlap_leave_nothing_behind() -> None:
    """An evaluation in one thread makes nobody else raise."""
    prod = Production(Broken(down()), fallback_response=SORRY)

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    evaluate = dspy.Evaluate(devset=EXAMPLES, metric=metric, num_threads=2, max_errors=100)

    async def main() -> list[Any]:
        return await asyncio.gather(asyncio.to_thread(evaluate, prod), asyncio.to_thread(prod, question="q"))

    result, pred = asyncio.run(main())
    assert result.score == 0.0
    assert pred.answer == SORRY


# -- delegation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [qa, Triage, lambda: dspy.ChainOfThought("question -> answer")])
def test_predictors_and_state_are_those_of_the_program(make: Callable[[], dspy.Module], tmp_path: Path) -> None:
    """A saved Production loads into the bare program, and the other way round."""
    program = make()
    prod = Production(program)
    assert [name for name, _ in prod.named_predictors()] == [name for name, _ in program.named_predictors()]
    assert prod.predictors() == program.predictors()
    assert prod.parameters() == program.parameters()
    assert prod.dump_state() == program.dump_state()
    program.predictors()[0].demos = [dspy.Example(question="q", answer="a")]
    prod.save(tmp_path / "prod.json")
    bare = make()
    bare.load(tmp_path / "prod.json")
    bare.save(tmp_path / "bare.json")
    again = Production(make())
    again.load(tmp_path / "bare.json")
    assert again.predictors()[0].demos[0]["question"] == "q"
    assert again.dump_state() == prod.dump_state()


def test_a_compiled_program_keeps_its_predictors() -> None:
    """DSPy hides the predictors of a compiled submodule; a wrapper is not a level of its own."""
    program = Triage()
    program._compiled = True
    prod = Production(program)
    assert prod._compiled
    assert len(prod.predictors()) == 2


def test_lms_are_set_and_found_through_the_wrapper() -> None:
    """set_lm and get_lm reach the program's predictors."""
    lm, _ = make_lm()
    prod = Production(Triage())
    prod.set_lm(lm)
    assert prod.get_lm() is lm
    assert all(predictor.lm is lm for predictor in prod.program.predictors())


@pytest.mark.parametrize("make", [qa, Triage])
def test_predictors_can_be_replaced_through_the_wrapper(make: Callable[[], dspy.Module]) -> None:
    """map_named_predictors changes the program, also when that is one predictor."""
    prod = Production(make())
    prod.map_named_predictors(lambda predictor: dspy.Predict(predictor.signature, temperature=0.5))
    assert all(predictor.config == {"temperature": 0.5} for predictor in prod.predictors())
    assert prod.predictors() == prod.program.predictors()


def test_copies_are_independent_but_share_the_fallback() -> None:
    """deepcopy and reset_copy copy the program; a fallback that cannot be copied does not matter."""
    guard: Iterator[int] = iter(range(9))  # generators and the like cannot be copied
    prod = Production(Triage(), "triage", lambda question: f"{SORRY}{type(guard).__name__}", deadline=5)
    prod.program.label.demos = [dspy.Example(question="q")]
    twin, reset = prod.deepcopy(), prod.reset_copy()
    assert twin.program is not prod.program
    assert twin.program.label.demos == prod.program.label.demos
    assert reset.program.label.demos == []
    assert twin.name == reset.name == "triage"
    with dspy.context(lm=make_lm(down())[0]):
        assert twin(question="q").reply.startswith(SORRY)


def test_a_whole_production_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """save_program writes the wrapper with its fallback."""
    Production(Triage(), "triage", SORRY).save(tmp_path / "whole", save_program=True)
    prod = dspy.load(str(tmp_path / "whole"), allow_pickle=True)
    with dspy.context(lm=make_lm(down())[0]):
        assert prod(question="q").reply == SORRY


def test_the_history_of_a_production_is_that_of_its_calls(capsys: pytest.CaptureFixture[str]) -> None:
    """inspect_history works on the wrapper."""
    lm, _ = make_lm()
    prod = Production(qa())
    with dspy.context(lm=lm):
        prod(question="what?")
    prod.inspect_history()
    assert "what?" in capsys.readouterr().out


def test_usage_tracking_of_dspy_goes_on() -> None:
    """A Production's prediction tells its usage in DSPy's own way too."""
    lm, _ = make_lm()
    with dspy.context(lm=lm, track_usage=True):
        pred = Production(qa())(question="q")
    assert pred.get_lm_usage()[MODEL]["prompt_tokens"] == 10


def test_what_is_not_a_prediction_is_returned_as_it_is() -> None:
    """A program may return anything; only a Prediction carries a report."""

    class Text(dspy.Module):  # type: ignore[misc]
        def forward(self) -> str:
            return "text"

    assert Production(Text())() == "text"


# -- streaming -------------------------------------------------------------------------------------------------------
def streamed(prod: Any, **options: Any) -> list[Any]:
    """Everything a streamified program yields."""

    async def main() -> list[Any]:
        return [value async for value in dspy.streamify(prod, **options)(question="q")]

    return asyncio.run(main())


@pytest.mark.parametrize("is_async_program", [False, True])
def test_a_streamed_answer_ends_in_a_prediction_with_a_report(is_async_program: bool) -> None:
    """Chunks come as from the bare program, then the Prediction."""
    with Provider(answer=said(answer="one two three four")) as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="x", store=f"memory://stream-{is_async_program}"
        )
        listeners = [dspy.streaming.StreamListener(signature_field_name="answer")]
        with dspy.context(lm=lm):
            values = streamed(
                Production(qa(), fallback_response=SORRY), stream_listeners=listeners, is_async_program=is_async_program
            )
    assert "".join(value.chunk for value in values[:-1]) == "one two three four"
    assert values[-1].answer == "one two three four"
    assert call_report(values[-1]).status == "ok"
    assert call_report(values[-1]).attempts == 1


@pytest.mark.parametrize("is_async_program", [False, True])
def test_a_stream_that_fails_before_its_first_chunk_is_answered_by_the_fallback(is_async_program: bool) -> None:
    """Nothing was shown, so the fallback contradicts nothing. Status messages are not part of an answer."""

    class Asking(dspy.streaming.StatusMessageProvider):  # type: ignore[misc]
        def lm_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str:
            return "asking"

    lm, _ = make_lm(down())
    with dspy.context(lm=lm):
        values = streamed(
            Production(qa(), fallback_response=SORRY),
            is_async_program=is_async_program,
            status_message_provider=Asking(),
        )
    assert [type(value).__name__ for value in values] == ["StatusMessage", "Prediction"]
    assert values[-1].answer == SORRY
    assert call_report(values[-1]).reason == "upstream_error"


@pytest.mark.parametrize("is_async_program", [False, True])
def test_a_stream_that_fails_after_its_first_chunk_raises(is_async_program: bool) -> None:
    """Half an answer was shown; a second one would contradict it."""
    with Provider(answer=said(answer="one two three four"), faults=ErrorInStream()) as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="x", store=f"memory://broken-{is_async_program}"
        )
        with dspy.context(lm=lm), pytest.raises(LMError):
            streamed(Production(qa(), fallback_response=SORRY), is_async_program=is_async_program)
