"""`BudgetedOptimizer` against a provider with a bill: what it may spend, what ends it, what it returns."""

from __future__ import annotations

import _thread
import copy
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest

import dspy_prod
from benchmarks.subjects import optimizers
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer, ConfigError
from dspy_prod.testing import Status

EXAMPLES = 16


def budgeted(optimizer: Any, store: str, **options: Any) -> BudgetedOptimizer:
    return BudgetedOptimizer(optimizer, store=store, view=None, **options)


def search(world: World, programs: int = 3, **more: Any) -> Any:
    return dspy.BootstrapFewShotWithRandomSearch(
        metric=world.metric, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=programs,
        num_threads=4, **more,
    )  # fmt: skip


def both(world: World) -> dict[str, Any]:
    return {"trainset": world.trainset, "valset": world.valset}


# -- money -------------------------------------------------------------------------------------------------------------
def test_a_run_that_completes_returns_what_the_optimizer_returns(world: World, asked: Any, store: str) -> None:
    """The report is on the program, the ledger is the bill, and the given program was measured first."""
    best = budgeted(search(world), store, budget_usd=1.0, name="whole").compile(world.program(), **both(world))
    report = best.optimization
    assert report.stopped_by == "completed"
    assert report.spent_usd == pytest.approx(world.bill_usd, abs=1e-9)
    assert report.calls == len(world.calls)
    assert report.baseline.score == report.candidates[0].score
    assert report.best_score == max(each.score for each in report.candidates if each.score is not None)
    assert report.best_score >= report.baseline.score
    assert {each.status for each in report.candidates} == {"complete"}
    assert report.selection.size == len(world.valset)
    assert set(report.phases) == {"baseline", "search"}
    assert sum(spent.usd for spent in report.spent_by.values()) == pytest.approx(report.spent_usd)


@pytest.mark.parametrize(
    ("cap", "reason"),
    [({"budget_usd": 0.004}, "budget"), ({"max_calls": 60}, "calls"), ({"max_tokens": 18_000}, "tokens")],
)
def test_no_cap_is_exceeded_and_the_best_comes_back(
    cap: dict[str, Any], reason: str, world: World, asked: Any, store: str
) -> None:
    """By the provider's bill; nothing is called afterwards."""
    best = budgeted(search(world, 8), store, **cap).compile(world.program(), **both(world))
    calls = len(world.calls)
    report = best.optimization
    assert report.stopped_by == reason
    assert world.bill_usd <= cap.get("budget_usd", 1e9)
    assert calls <= cap.get("max_calls", 1e9)
    assert report.tokens <= cap.get("max_tokens", 1e9)
    used = {"budget": report.spent_usd / 0.004, "calls": calls / 60, "tokens": report.tokens / 18_000}[reason]
    assert used > 0.85
    assert report.best_score >= report.baseline.score
    with dspy.context(lm=world.lm()):
        best(**world.testset[0].inputs())  # it is not bound to the run
    assert len(world.calls) == calls + 1


def test_all_lms_count(world: World, asked: Any, store: str) -> None:
    """Those of the program, of the optimizer, plain ones among them; each under its role. They are given back."""
    plain = world.prompt_lm(plain=True)
    optimizer = dspy.COPRO(prompt_model=plain, metric=world.metric, breadth=2, depth=2)
    refused = budgeted(optimizer, store, budget_usd=1.0).compile(
        world.program(), trainset=world.trainset, eval_kwargs={"num_threads": 4}
    )
    assert refused.optimization.stopped_by == "failed"
    assert "unpriced_model" in refused.optimization.detail
    assert optimizer.prompt_model is plain
    before = len(world.calls)
    best = budgeted(optimizer, store, max_calls=500).compile(
        world.program(), trainset=world.trainset, eval_kwargs={"num_threads": 4}
    )
    report = best.optimization
    assert optimizer.prompt_model is plain
    assert report.calls == len(world.calls) - before
    assert {name.partition("/")[0] for name in report.spent_by} == {"task", "prompt"}


def test_what_the_optimizer_changes_about_lms_and_metrics_is_given_back(world: World, asked: Any, store: str) -> None:
    """SIMBA writes a roll into the teacher's arguments."""
    teacher = world.lm()
    metric = world.metric
    optimizer = dspy.SIMBA(
        metric=metric, bsize=8, num_candidates=2, max_steps=1, prompt_model=world.prompt_lm(), num_threads=4,
        teacher_settings={"lm": teacher},
    )  # fmt: skip
    before = dict(teacher.kwargs)
    best = budgeted(optimizer, store, budget_usd=1.0).compile(world.program(), trainset=world.trainset)
    assert best.optimization.stopped_by == "completed"
    assert teacher.kwargs == before
    assert optimizer.metric == metric
    assert optimizer.teacher_settings["lm"] is teacher


# -- what ends it ------------------------------------------------------------------------------------------------------
def test_a_target_that_is_met_ends_it(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world, 8), store, budget_usd=1.0, stop_at=0.1).compile(world.program(), **both(world))
    assert best.optimization.stopped_by == "target"
    assert "stop_at=0.1" in best.optimization.detail


def test_patience_ends_it(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world, 8), store, budget_usd=1.0, patience=1).compile(world.program(), **both(world))
    assert best.optimization.stopped_by == "stopped"
    assert "no better" in best.optimization.detail


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_whoever_ends_it_gets_the_best_so_far(how: str, world: World, asked: Any, store: str) -> None:
    """While the provider hangs: nothing in flight is waited for."""
    optimizer = budgeted(search(world, 8), store, budget_usd=1.0)
    world.break_from(60, "hang")
    hanging = threading.Event()

    def end() -> None:
        while len(world.calls) < 62 and not hanging.wait(0.02):
            pass
        if how == "stop":
            optimizer.stop()
        else:
            _thread.interrupt_main()

    thread = threading.Thread(target=end)
    thread.start()
    best = optimizer.compile(world.program(), **both(world))
    hanging.set()
    thread.join()
    calls = len(world.calls)
    assert best.optimization.stopped_by == {"stop": "stopped", "interrupt": "interrupted"}[how]
    assert best.optimization.baseline.score is not None
    assert len(world.calls) == calls
    world.provider.stop()


class Dies:
    """Ctrl-C comes while it is taken apart."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It interrupts, also where the tests were begun in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_it_too(world: World, asked: Any, store: str) -> None:
    """Raised within a destructor, `KeyboardInterrupt` is printed and forgotten."""

    class Endless(dspy.teleprompt.Teleprompter):
        def __init__(self) -> None:
            super().__init__()
            self.metric = world.metric

        def compile(self, student: Any, *, trainset: Any) -> Any:
            Dies()
            for number in range(3000):
                student(message=f"message {number}")
            return student

    before = signal.getsignal(signal.SIGINT)
    best = budgeted(Endless(), store, budget_usd=1.0).compile(world.program(), trainset=world.trainset)
    assert best.optimization.stopped_by == "interrupted"
    assert best.optimization.baseline.score is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_time_ends_it_although_the_provider_hangs(world: World, asked: Any, store: str) -> None:
    world.break_from(60, "hang")
    best = budgeted(search(world, 8), store, max_time=2.0).compile(world.program(), **both(world))
    assert best.optimization.stopped_by == "time"
    assert best.optimization.seconds < 4.0
    assert best.optimization.best_score is not None


def test_an_outage_ends_it_as_failed_and_is_never_a_score(world: World, asked: Any, store: str) -> None:
    """No row of a candidate is 0 because nobody answered."""
    world.break_from(60, "500")
    best = budgeted(search(world, 8), store, budget_usd=1.0, patience_outage=0.5).compile(
        world.program(), **both(world)
    )
    report = best.optimization
    assert report.stopped_by == "failed"
    assert "outage" in report.detail
    assert all(each.score > 0.2 for each in report.candidates if each.score is not None)


def test_an_outage_that_ends_is_waited_out(world: World, store: str) -> None:
    """As soon as its circuit lets a probe through."""
    world.break_from(60, Status(500))
    threading.Timer(1.0, world.mend).start()
    with dspy.context(lm=world.lm(breaker=dspy_prod.CircuitBreaker(recovery_timeout=0.5))):
        best = budgeted(search(world, 1), store, budget_usd=1.0, patience_outage=60).compile(
            world.program(), **both(world)
        )
    assert best.optimization.stopped_by == "completed"
    assert all(each.status == "complete" for each in best.optimization.candidates)


def test_one_dear_call_that_cannot_be_covered_does_not_end_it(world: World, asked: Any, store: str) -> None:
    """GEPA's reflections are refused; its evaluations go on, and the report names the model and the remedy."""
    dear = world.prompt_lm(max_tokens=20_000)
    optimizer = dspy.GEPA(metric=world.feedback_metric, max_metric_calls=80, reflection_lm=dear, num_threads=4, seed=0)
    best = budgeted(optimizer, store, budget_usd=0.009).compile(world.program(), **both(world))
    report = best.optimization
    assert report.stopped_by == "completed"
    assert any("max_tokens" in each and "world-proposer" in each for each in report.warnings)
    assert world.bill_usd <= 0.009


# -- what cannot be capped ---------------------------------------------------------------------------------------------
class OwnThreads(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> label")

    def forward(self, message: str) -> dspy.Prediction:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.classify, message=message).result()


def test_a_program_that_calls_from_threads_of_its_own_is_refused_before_its_first_call(
    world: World, store: str
) -> None:
    """Those threads know nothing of DSPy's settings, so only what is configured for all threads answers there."""
    dspy.configure(lm=world.lm())
    try:
        with pytest.raises(ConfigError, match=r"threads of its own.*foreign='allow'"):
            budgeted(search(world), store, budget_usd=1.0).compile(OwnThreads(), **both(world))
        assert len(world.calls) == 0
    finally:
        dspy.configure(lm=None)


def test_a_judge_that_a_metric_hides_is_refused_before_its_first_call(world: World, asked: Any, store: str) -> None:
    judge = world.lm(plain=True)

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        with dspy.context(lm=judge):
            dspy.Predict("message -> label")(message=example.message)
        return world.metric(example, prediction)

    optimizer = search(world)
    optimizer.metric = metric
    with pytest.raises(ConfigError, match=r"no cap of this run.*foreign='allow'"):
        budgeted(optimizer, store, budget_usd=1.0).compile(world.program(), **both(world))
    assert len(world.calls) == 1
    assert optimizer.metric is metric


def test_a_judge_under_the_caps_counts(world: World, asked: Any, store: str) -> None:
    judge = world.lm(temperature=0.1)

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        with dspy.context(lm=judge):
            dspy.Predict("message -> label")(message=example.message)
        return world.metric(example, prediction)

    best = budgeted(dspy.BootstrapFewShot(metric=metric), store, budget_usd=1.0).compile(
        world.program(), trainset=world.trainset
    )
    report = best.optimization
    assert report.spent_usd == pytest.approx(world.bill_usd, abs=1e-9)
    assert report.spent_by["metric/openai/world-task"].calls > 0


def test_a_run_without_policies_is_refused(
    world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    with pytest.raises(ConfigError, match="DSPY_PROD_DISABLED"):
        budgeted(search(world), store, budget_usd=1.0).compile(world.program(), **both(world))


def test_lms_of_two_stores_share_one_cap(world: World, asked: Any, store: str, tmp_path: Any) -> None:
    other = world.prompt_lm(store=f"sqlite:///{tmp_path}/other.db")
    optimizer = dspy.COPRO(prompt_model=other, metric=world.metric, breadth=3, depth=3)
    best = budgeted(optimizer, store, max_calls=50).compile(
        world.program(), trainset=world.trainset, eval_kwargs={"num_threads": 4}
    )
    assert best.optimization.stopped_by == "calls"
    assert len(world.calls) <= 50


# -- what it is given --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give it a cap: budget_usd"),
        ({"budget_usd": -1}, "BudgetedOptimizer: budget_usd: .*greater than 0"),
        ({"budget_usd": 1, "racing": 1.5}, "BudgetedOptimizer: racing"),
        ({"budget_usd": 1, "patience": 0}, "BudgetedOptimizer: patience"),
        ({"budget_usd": 1, "paticence": 3}, "did you mean 'patience'"),
        ({"budget_usd": 1, "foreign": "ignore"}, "BudgetedOptimizer: foreign"),
        ({"budget_usd": 1, "name": ""}, "BudgetedOptimizer: name"),
        ({"budget_usd": 1, "publish": 3}, "BudgetedOptimizer: publish"),
        ({"budget_usd": 1, "metric": "accuracy"}, "BudgetedOptimizer: metric"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], told: str, world: World) -> None:
    with pytest.raises(ConfigError, match=told):
        BudgetedOptimizer(search(world), **options)


def test_unknown_arguments_of_compile_are_named(world: World, asked: Any, store: str) -> None:
    with pytest.raises(ConfigError, match=r"num_trials: .* does not take it; it takes teacher, trainset"):
        budgeted(search(world), store, budget_usd=1).compile(world.program(), **both(world), num_trials=3)


def test_what_is_kept_back_is_said(world: World, asked: Any, store: str) -> None:
    """SIMBA takes no valset: it selects the result."""
    optimizer = dspy.SIMBA(
        metric=world.metric, bsize=8, num_candidates=2, max_steps=1, prompt_model=world.prompt_lm(), num_threads=4
    )
    best = budgeted(optimizer, store, budget_usd=1).compile(world.program(), **both(world))
    report = best.optimization
    assert "valset is not used by SIMBA; it selects the result" in report.warnings
    assert report.selection.source == "valset"
    assert report.best.examples == len(world.valset)


def test_caps_of_this_time(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world), store, budget_usd=1).compile(world.program(), **both(world), max_calls=30)
    assert best.optimization.max_calls == 30
    assert len(world.calls) <= 30


def test_a_production_is_looked_into(world: World, asked: Any, store: str) -> None:
    inner = world.program()
    best = budgeted(search(world, 1), store, budget_usd=1).compile(
        dspy_prod.Production(inner, name="support"), **both(world)
    )
    assert type(best) is type(inner)
    assert best.optimization.stopped_by == "completed"


# -- what it returns ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["LabeledFewShot", "BootstrapFewShot", "KNNFewShot", "ReAnchor"])
def test_optimizers_that_evaluate_nothing_are_evaluated(name: str, world: World, asked: Any, store: str) -> None:
    """What they return is compared with the given program on the selection set, and the better one comes back."""
    subject = optimizers(world)[name]
    arguments = subject.arguments
    if name == "ReAnchor":  # it answers each example hundreds of times from the cache
        arguments = {key: examples[:6] for key, examples in arguments.items()}
    best = budgeted(subject.optimizer, store, budget_usd=1, metric=world.metric).compile(subject.student, **arguments)
    report = best.optimization
    assert report.stopped_by == "completed", report.detail
    assert report.baseline.score is not None
    if name != "ReAnchor":  # which may find nothing better, and returns what it was given
        assert report.candidates[-1].origin == "returned by the optimizer"
    assert report.candidates[-1].score is not None
    assert report.best_score == max(report.baseline.score, report.candidates[-1].score)


def test_without_any_metric_the_result_comes_back_as_it_is(world: World, asked: Any, store: str) -> None:
    best = budgeted(dspy.LabeledFewShot(k=2), store, budget_usd=1).compile(world.program(), trainset=world.trainset)
    assert [len(predictor.demos) for predictor in best.predictors()] == [2]
    assert best.optimization.best_score is None
    assert "give BudgetedOptimizer a metric=" in best.optimization.warnings[0]


def test_a_feedback_metric_serves_every_optimizer(world: World, asked: Any, store: str) -> None:
    """To those that do not know of feedback it is a number: a wrong answer is no demonstration."""

    def wrong(example: Any, prediction: Any, trace: Any = None, *_: Any) -> dspy.Prediction:
        return dspy.Prediction(score=0.0, feedback="never right")

    best = budgeted(
        dspy.BootstrapFewShot(metric=wrong, max_labeled_demos=0, max_bootstrapped_demos=4), store, budget_usd=1
    ).compile(world.program(), trainset=world.trainset)
    tried = best.optimization.candidates[-1]
    assert tried.demos == {"classify": 0}


def test_the_best_is_compared_on_untouched_examples(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world), store, budget_usd=1).compile(world.program(), **both(world), testset=world.testset)
    test = best.optimization.test
    assert test.n == len(world.testset)
    assert test.given == pytest.approx(world.accuracy(world.program(), world.testset))
    assert test.best == pytest.approx(world.accuracy(best, world.testset))


def test_what_the_test_set_needs_is_kept_back(world: World, asked: Any, store: str) -> None:
    """Although the search and the finals use up all the rest of the cap."""
    best = budgeted(search(world, 8), store, max_calls=150).compile(
        world.program(), **both(world), testset=world.testset
    )
    report = best.optimization
    assert report.stopped_by == "calls"
    assert report.test is not None, report.warnings
    assert report.phases["test"].calls > 0
    assert len(world.calls) <= 150


def test_candidates_can_be_had_again(world: World, asked: Any, store: str) -> None:
    """Each candidate's program scores what the report says; copies of the best carry the report along."""
    best = budgeted(search(world), store, budget_usd=1).compile(world.program(), **both(world))
    report = best.optimization
    for candidate in report.candidates:
        assert world.accuracy(report.program(candidate.index)) == pytest.approx(candidate.score)
    assert world.accuracy(report.cheapest(within=1.0)) <= report.best_score
    assert copy.deepcopy(best).optimization is report
    assert best.dump_state() == best.deepcopy().dump_state()


def test_racing_saves_evaluations_and_says_so(world: World, asked: Any, store: str) -> None:
    """The incumbent is kept; a raced candidate has no score, but what the race expected of it."""
    best = budgeted(search(world, 10), store, budget_usd=1, racing=0.9).compile(world.program(), **both(world))
    report = best.optimization
    raced = [each for each in report.candidates if each.status == "raced"]
    assert report.racing.saved == sum(len(world.valset) - each.examples for each in raced)
    assert all(each.score is None and each.predicted <= report.best_score for each in raced)
    assert report.best.status == "complete"


def _is_odd(message: str) -> bool:
    return int(message.split()[1]) % 5 == 0


class Picky(dspy.Module):
    """Fails at some messages by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> label")

    def forward(self, message: str) -> dspy.Prediction:
        if _is_odd(message):
            raise ValueError("not this customer, please")
        return self.classify(message=message)


def test_an_example_at_which_the_program_fails_is_scored_zero(world: World, asked: Any, store: str) -> None:
    """It is the program's fault, so that the evaluation is complete all the same."""
    failing = [each for each in world.valset if _is_odd(each.message)]
    assert failing
    best = budgeted(dspy.BootstrapFewShot(metric=world.metric), store, budget_usd=1).compile(
        Picky(), trainset=world.trainset, valset=world.valset
    )
    given = best.optimization.baseline
    assert given.status == "complete"
    places = [place for place, each in enumerate(world.valset) if each in failing]
    assert [given.scores[place] for place in places] == [0.0] * len(places)


def test_evaluations_under_a_user_deadline_end_as_time(world: World, asked: Any, store: str) -> None:
    """A deadline around `compile` holds as `max_time` does."""
    world.break_from(40, "hang")
    with dspy_prod.call_context(deadline=1.5):
        best = budgeted(search(world, 8), store, budget_usd=1.0, patience_outage=30).compile(
            world.program(), **both(world)
        )
    assert best.optimization.baseline is not None
    assert best.optimization.stopped_by == "time"
    assert best.optimization.seconds < 6
