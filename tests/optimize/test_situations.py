"""What people bring to `BudgetedOptimizer`: metrics that fail, odd optimizers, programs that swallow errors."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter

import dspy_prod
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer, ConfigError
from dspy_prod.context.current import current, use
from dspy_prod.optimize.session import Session
from dspy_prod.optimize.states import key_of
from dspy_prod.runtime.clock import Moment
from dspy_prod.testing import FakeClock
from tests.optimize.conftest import LARGER

EXAMPLES = 16


def budgeted(optimizer: Any, store: str, **options: Any) -> BudgetedOptimizer:
    return BudgetedOptimizer(optimizer, store=store, view=None, **{"budget_usd": 1.0, **options})


def search(world: World, programs: int = 1, **more: Any) -> Any:
    return dspy.BootstrapFewShotWithRandomSearch(
        **{"metric": world.metric, "max_bootstrapped_demos": 2, "max_labeled_demos": 2, "num_threads": 4,
           "num_candidate_programs": programs, **more}
    )  # fmt: skip


def both(world: World) -> dict[str, Any]:
    return {"trainset": world.trainset, "valset": world.valset}


def is_odd(example: Any) -> bool:
    return int(example.message.split()[1]) % 5 == 0


# -- metrics -----------------------------------------------------------------------------------------------------------
def _raises() -> Any:
    raise KeyError("label")


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        (lambda: None, "told None"),
        (lambda: float("nan"), "told nan"),
        (lambda: "good", "told 'good'"),
        (_raises, "raised KeyError"),
    ],
)
def test_where_a_metric_tells_no_score_it_is_zero_and_said(
    instead: Callable[[], Any], told: str, world: World, asked: Any, store: str
) -> None:
    """An evaluation is complete all the same, and nothing is lost by one example that the metric does not like."""
    world.valset.sort(key=is_odd)
    odd = [place for place, each in enumerate(world.valset) if is_odd(each)]
    assert odd
    assert odd[0] > 0

    def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
        return instead() if is_odd(example) else world.metric(example, prediction)

    best = budgeted(search(world, metric=metric), store).compile(world.program(), **both(world))
    report = best.optimization
    assert report.stopped_by == "completed"
    assert {each.status for each in report.candidates} == {"complete"}
    assert [report.baseline.scores[place] for place in odd] == [0.0] * len(odd)
    assert any(told in each and "count as 0" in each for each in report.warnings)


@pytest.mark.parametrize("how", ["compile", "forecast"])
def test_a_metric_that_tells_no_number_at_the_first_example_is_refused(
    how: str, world: World, asked: Any, store: str
) -> None:
    optimizer = budgeted(search(world, metric=lambda *_: None), store)
    with pytest.raises(ConfigError, match=r"metric: it told None.*has to tell a number"):
        getattr(optimizer, how)(world.program(), **both(world))
    assert len(world.calls) <= 16


def test_a_metric_that_cannot_be_called_as_evaluations_do_is_refused_for_nothing(
    world: World, asked: Any, store: str
) -> None:
    def metric(example: Any, prediction: Any, trace: Any) -> float:
        return 1.0

    with pytest.raises(ConfigError, match=r"metric: .*'trace'.*a default"):
        budgeted(search(world, metric=metric), store).compile(world.program(), **both(world))
    assert len(world.calls) == 0


@pytest.mark.parametrize("kind", ["method", "static", "inherited"])
def test_a_metric_of_the_optimizers_class_is_found_and_given_back(
    kind: str, world: World, asked: Any, store: str
) -> None:
    """`self.metric` is where DSPy's own keep it; a class of one's own may as well define it."""

    class Method(Teleprompter):
        def metric(self, example: Any, prediction: Any, trace: Any = None) -> float:
            return float(world.metric(example, prediction))

        def compile(self, student: Any, *, trainset: Any, valset: Any) -> Any:
            for number in range(3):
                candidate = student.deepcopy()
                candidate.classify.demos = trainset[number : number + 2]
                dspy.Evaluate(devset=valset, metric=self.metric, num_threads=4)(candidate)
            return student

    class Static(Method):
        metric = staticmethod(world.metric)  # type: ignore[assignment]

    class Inherited(Method):
        pass

    optimizer = {"method": Method, "static": Static, "inherited": Inherited}[kind]()
    report = budgeted(optimizer, store).compile(world.program(), **both(world)).optimization
    assert (report.stopped_by, len(report.candidates)) == ("completed", 4)
    assert all(each.status == "complete" for each in report.candidates)
    assert "metric" not in vars(optimizer)


def test_what_a_metric_says_of_demonstrations_is_no_score(world: World, asked: Any, store: str) -> None:
    """With a trace it may be stricter, as many are."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return world.metric(example, prediction) if trace is None else 0.0

    class Bootstraps(Teleprompter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.metric = metric

        def compile(self, student: Any, *, trainset: list[Any]) -> Any:
            program = student.deepcopy()
            program.classify.demos = list(world.testset[:3])
            for example in trainset:
                self.metric(example, program(**example.inputs()), [])
            return program

    best = budgeted(Bootstraps(), store).compile(world.program(), trainset=world.trainset)
    tried = best.optimization.candidates[-1]
    assert tried.origin == "returned by the optimizer"
    assert tried.score == pytest.approx(world.accuracy(best.optimization.program(tried.index), world.trainset))
    assert tried.score > 0


# -- examples and arguments --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("valset", [{"message": "m"}], r"valset: takes dspy\.Example, got dict at 0"),
        ("valset", [dspy.Example(message="m", label="l")], r"valset: .* at 0 .*with_inputs\('message'\)"),
        ("testset", [dspy.Example(message="m", label="l")], r"testset: .* at 0 .*with_inputs\('message'\)"),
        ("trainset", "train.json", "trainset: takes a list of dspy.Example, got str"),
        ("trainset", None, "missing a required argument: 'trainset'"),
        ("budget_usd", None, "give it a cap"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_paid(
    name: str, given: Any, told: str, world: World, asked: Any, store: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        budgeted(search(world), store).compile(world.program(), **{**both(world), name: given})
    assert len(world.calls) == 0


def test_examples_may_come_from_any_iterable(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world), store).compile(world.program(), **{k: iter(v) for k, v in both(world).items()})
    assert best.optimization.stopped_by == "completed"
    assert best.optimization.selection.size == len(world.valset)


@LARGER
def test_a_program_that_was_compiled_before_can_be_compiled_again(world: World, asked: Any, store: str) -> None:
    """Some optimizers refuse what another one has made. The caller's stays compiled."""
    optimizer = budgeted(search(world), store)
    first = optimizer.compile(world.program(), **both(world))
    forecast = optimizer.forecast(first, **both(world))
    assert not forecast.warnings
    again = optimizer.compile(first, **both(world)).optimization
    assert again.stopped_by == "completed", again.detail
    assert again.best_score >= first.optimization.best_score
    assert first._compiled


def test_demonstrations_need_no_inputs(world: World, asked: Any, store: str) -> None:
    """Nobody is asked them; a forecast passes them by too."""
    given = [dspy.Example(**each) for each in world.trainset]
    optimizer = budgeted(dspy.LabeledFewShot(k=2), store, metric=world.metric)
    assert optimizer.forecast(world.program(), trainset=given, valset=world.valset).usd > 0
    best = optimizer.compile(world.program(), trainset=given, valset=world.valset)
    assert best.optimization.stopped_by == "completed"


def test_without_an_lm_it_says_so(world: World, store: str) -> None:
    with dspy.context(lm=None), pytest.raises(ConfigError, match=r"has no LM: dspy\.configure"):
        budgeted(search(world), store).compile(world.program(), **both(world))


def test_a_program_with_an_lm_of_its_own_needs_no_other(world: World, store: str) -> None:
    """Also with optimizers that take it from their copies."""
    program = world.program()
    program.set_lm(world.lm())
    with dspy.context(lm=None):
        best = budgeted(search(world), store).compile(program, **both(world))
    assert best.optimization.stopped_by == "completed"
    assert {each.status for each in best.optimization.candidates} == {"complete"}
    assert best.classify.lm is program.classify.lm


def test_examples_that_differ_in_other_things_than_text_are_told_apart() -> None:
    one, other = (dspy.Example(day=dt.date(2026, 1, day), raw=b"x").with_inputs("day") for day in (1, 2))
    assert key_of(one) != key_of(other)
    assert key_of(dspy.Example(raw=b"x")) != key_of(dspy.Example(raw=b"y"))
    assert key_of(dspy.Example(what=object())) == key_of(dspy.Example(what=object()))  # no addresses


def test_a_production_of_a_class_of_ones_own_is_looked_into(world: World, asked: Any, store: str) -> None:
    class Ours(dspy_prod.Production):  # type: ignore[misc]
        pass

    inner = world.program()
    best = budgeted(search(world), store).compile(Ours(inner, name="support"), **both(world))
    assert type(best) is type(inner)


# -- optimizers of one's own -------------------------------------------------------------------------------------------
class Returns(Teleprompter):  # type: ignore[misc]
    """Returns what a function makes of the student."""

    def __init__(self, metric: Any, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.metric, self.make = metric, make

    def compile(self, *, student: Any, trainset: Any = None, valset: Any = None) -> Any:
        return self.make(student)


class Around(dspy.Module):  # type: ignore[misc]
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, message: str) -> Any:
        return self.inner(message=message)


class Knob(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> label")
        self.never = False

    def forward(self, message: str) -> Any:
        return dspy.Prediction(label="never") if self.never else self.classify(message=message)


def test_a_result_that_is_no_program_does_not_lose_the_rest(world: World, asked: Any, store: str) -> None:
    best = budgeted(Returns(world.metric, lambda student: (student, 1)), store).compile(world.program(), **both(world))
    assert best.optimization.best_score == best.optimization.baseline.score
    assert any("returned a tuple, which is no program" in each for each in best.optimization.warnings)


@LARGER
def test_a_result_of_another_class_is_evaluated(world: World, asked: Any, store: str) -> None:
    demos = list(world.trainset[:4])

    def make(student: Any) -> Any:
        student.classify.demos = demos
        return Around(student)

    best = budgeted(Returns(world.metric, make), store).compile(world.program(), **both(world))
    tried = best.optimization.candidates[-1]
    assert tried.status == "complete"
    assert tried.score > best.optimization.baseline.score
    assert type(best) is Around
    assert tried.score == pytest.approx(world.accuracy(best))


@pytest.mark.parametrize("returns", [True, False])
def test_an_optimizer_may_change_its_student_in_place(returns: bool, world: World, asked: Any, store: str) -> None:
    """The caller's is another one, and the given program stays what it was."""
    program = world.program()

    def make(student: Any) -> Any:
        student.classify.demos = list(world.trainset[:4])
        return student if returns else None

    best = budgeted(Returns(world.metric, make), store).compile(program, **both(world), testset=world.testset)
    assert program.classify.demos == []
    assert len(best.classify.demos) == 4
    assert best.optimization.test.given == pytest.approx(world.accuracy(program, world.testset))


def test_what_an_optimizer_changes_beside_the_state_is_evaluated_too(world: World, asked: Any, store: str) -> None:
    """Two programs that differ in an attribute alone are not the same candidate."""

    def make(student: Any) -> Any:
        student.never = True
        return student

    best = budgeted(Returns(world.metric, make), store).compile(Knob(), **both(world))
    assert best.optimization.candidates[-1].score == 0.0
    assert best.never is False


def test_an_asynchronous_compile_is_refused(world: World, asked: Any, store: str) -> None:
    class Later(Returns):
        async def compile(self, student: Any, *, trainset: Any) -> Any:
            return student

    with pytest.raises(ConfigError, match=r"Later\.compile is asynchronous"):
        budgeted(Later(world.metric, lambda student: student), store).compile(world.program(), trainset=world.trainset)


def test_plain_lms_in_a_list_of_an_optimizer_count(world: World, asked: Any, store: str) -> None:
    class Asks(Returns):
        def compile(self, student: Any, *, trainset: Any) -> Any:
            with dspy.context(lm=self.models[0]):
                student(**trainset[0].inputs())
            return student

    optimizer, plain = Asks(world.metric, lambda student: student), world.lm(plain=True)
    optimizer.models = [plain]
    best = budgeted(optimizer, store, budget_usd=None, max_calls=100).compile(world.program(), trainset=world.trainset)
    assert best.optimization.calls == len(world.calls)
    assert optimizer.models == [plain]


# -- programs ----------------------------------------------------------------------------------------------------------
class Swallows(dspy.Module):  # type: ignore[misc]
    """Answers whatever happens."""

    def __init__(self, what: type[BaseException]) -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> label")
        self.what = what

    def forward(self, message: str) -> Any:
        try:
            return self.classify(message=message)
        except self.what:
            return dspy.Prediction(label="unknown")


@LARGER
@pytest.mark.parametrize("what", [Exception, BaseException])
def test_what_a_program_answers_when_the_run_refuses_its_call_is_no_answer(
    what: type[BaseException], world: World, asked: Any, store: str
) -> None:
    """Else the given program would get a score of 0 wherever the money was gone."""
    best = budgeted(search(world), store, budget_usd=None, max_calls=20).compile(Swallows(what), **both(world))
    report = best.optimization
    assert report.stopped_by == "calls"
    assert report.baseline is not None
    assert report.baseline.status != "complete"
    assert report.baseline.examples <= 20
    assert report.best is None


@pytest.mark.parametrize("how", ["compile", "forecast"])
def test_a_program_that_calls_from_a_pool_that_was_there_before_is_refused(how: str, world: World, store: str) -> None:
    """Its threads may belong to others; but the program makes no call of its own."""
    with ThreadPoolExecutor(1) as pool:

        class Pooled(dspy.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.classify = dspy.Predict("message -> label")

            def forward(self, message: str) -> Any:
                return pool.submit(self.classify, message=message).result()

        dspy.configure(lm=world.lm())
        try:
            Pooled()(message="hello")
            with pytest.raises(ConfigError, match="threads of its own"):
                getattr(budgeted(search(world), store), how)(Pooled(), **both(world))
            # The first that ends is noticed; the other three threads may have handed theirs to the pool by then.
            least, most = {"compile": (2, 5), "forecast": (17, 17)}[how]
            assert least <= len(world.calls) <= most
        finally:
            dspy.configure(lm=None)


@pytest.mark.parametrize("how", ["compile", "forecast"])
def test_threads_of_a_program_are_noticed_without_a_metric_and_in_a_forecast(
    how: str, world: World, store: str
) -> None:
    class OwnThreads(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.classify = dspy.Predict("message -> label")

        def forward(self, message: str) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.classify, message=message).result()

    dspy.configure(lm=world.lm())
    try:
        optimizer = budgeted(dspy.BootstrapFewShot(metric=None), store)
        with pytest.raises(ConfigError, match="threads of its own"):
            getattr(optimizer, how)(OwnThreads(), trainset=world.trainset)
        assert len(world.calls) == 0
    finally:
        dspy.configure(lm=None)


def test_programs_of_a_class_that_compares_by_content_are_told_apart(world: World, asked: Any, store: str) -> None:
    """They can be no keys of a dictionary."""

    class Equal(type(world.program())):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return type(self) is type(other)

        __hash__ = None

    best = budgeted(search(world), store).compile(Equal(), **both(world))
    assert {each.status for each in best.optimization.candidates} == {"complete"}
    assert len(best.optimization.candidates) > 2


# -- at the same time --------------------------------------------------------------------------------------------------
def test_two_runs_of_one_program_do_not_meet(world: World, store: str) -> None:
    """Its plain LM is put under the caps of each, on copies; also where it is its own teacher."""
    program = world.program()
    plain = world.lm(plain=True)
    program.set_lm(plain)

    def run(number: int) -> Any:
        made = budgeted(search(world, 1 + number), f"{store}{number}", budget_usd=None, max_calls=900)
        return made.compile(program, teacher=program, **both(world)).optimization

    with ThreadPoolExecutor(2) as pool:
        for report in pool.map(run, range(2)):
            assert report.stopped_by == "completed", report.detail
            assert {each.status for each in report.candidates} == {"complete"}
    assert program.classify.lm is plain


def test_one_optimizer_compiles_one_thing_at_a_time(world: World, asked: Any, store: str) -> None:
    inner = search(world)
    metric, refused = inner.metric, []

    def make(student: Any) -> Any:
        with pytest.raises(ConfigError, match="compiling something in another thread"):
            again.compile(world.program(), **both(world))
        refused.append(True)
        return student

    inner = Returns(metric, make)
    again = budgeted(inner, store + "again")
    budgeted(inner, store).compile(world.program(), **both(world))
    assert refused
    assert inner.metric == metric
    inner.make = lambda student: student
    assert again.compile(world.program(), **both(world)).optimization.stopped_by == "completed"


# -- how it ends -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", [{"stop_at": 0.55}, {"patience": 1}])
def test_what_is_good_enough_is_still_compared_on_the_test_set(
    option: dict[str, Any], world: World, asked: Any, store: str
) -> None:
    best = budgeted(search(world, 8), store, **option).compile(world.program(), **both(world), testset=world.testset)
    report = best.optimization
    assert report.stopped_by == ("target" if "stop_at" in option else "stopped")
    assert report.test.n == len(world.testset)
    assert "finals" not in report.phases


def test_a_given_program_that_is_good_enough_is_not_searched_from(world: World, asked: Any, store: str) -> None:
    best = budgeted(search(world), store, stop_at=0.1).compile(world.program(), **both(world))
    assert best.optimization.stopped_by == "target"
    assert best.optimization.best.index == 0
    assert len(world.calls) == len(world.valset)


def test_a_second_interrupt_leaves_a_report_that_says_so(
    world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waited for what was in flight: else the run would count as completed, and be begun anew."""

    def interrupted(self: Any, outcome: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_settle", interrupted)
    optimizer = budgeted(Returns(world.metric, lambda student: interrupted(0, 0)), store, name="twice")
    with pytest.raises(KeyboardInterrupt):
        optimizer.compile(world.program(), **both(world))
    assert optimizer.report.stopped_by == "interrupted"
    assert optimizer.report.best_score is not None


def test_an_error_of_ours_leaves_a_report_that_says_failed(
    world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Session, "_phases", broken)
    optimizer = budgeted(search(world), store)
    with pytest.raises(RuntimeError, match="a defect"):
        optimizer.compile(world.program(), **both(world))
    assert (optimizer.report.stopped_by, optimizer.report.detail) == ("failed", "RuntimeError: a defect")


def test_a_gate_of_a_phase_before_ends_no_later_one(
    world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimizer leaves in its threads is refused there, and says nothing of the finals."""
    sessions: list[Session] = []
    go = Session.go
    monkeypatch.setattr(Session, "go", lambda self: (sessions.append(self), go(self))[1])
    old: list[Any] = []
    renew = Session.renew_gate

    def renewed(self: Session) -> Any:
        old.append(self.gate)
        gate = renew(self)
        old[-1].close("budget", "a straggler of the search")
        return gate

    monkeypatch.setattr(Session, "renew_gate", renewed)
    best = budgeted(dspy.LabeledFewShot(k=3), store, metric=world.metric).compile(
        world.program(), **{**both(world), "testset": world.testset}
    )
    assert best.optimization.stopped_by == "completed"
    assert best.optimization.candidates[-1].score is not None
    assert best.optimization.test is not None


@pytest.mark.parametrize("shows", [0.0, 1e9])
def test_a_deadline_of_another_clock_is_as_far_away_as_there(
    shows: float, world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was compared with the machine's clock: over at once, or never, whatever that one shows."""
    sessions: list[Session] = []
    go = Session.go
    monkeypatch.setattr(Session, "go", lambda self: (sessions.append(self), go(self))[1])
    clock = FakeClock()
    clock.advance(shows)
    with use(current()._replace(deadline=Moment.of(clock, clock.monotonic() + 300.0))):
        best = budgeted(dspy.LabeledFewShot(k=3), store, metric=world.metric).compile(world.program(), **both(world))
    assert best.optimization.stopped_by == "completed"
    [session] = sessions
    assert session.ends is not None
    assert 0.0 < session.ends - time.monotonic() < 301.0


def test_a_stop_between_two_phases_is_heard(
    world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the gate of the one is closed, and that of the next one is not up yet."""
    optimizer = budgeted(search(world, 8), store, budget_usd=None, max_calls=60)
    drain = Session.drain

    def stopped(self: Session) -> int:
        optimizer.stop()
        return drain(self)

    monkeypatch.setattr(Session, "drain", stopped)
    report = optimizer.compile(world.program(), **both(world), testset=world.testset).optimization
    assert report.stopped_by == "stopped"
    assert set(report.phases) == {"baseline", "search"}


def test_a_forecast_belongs_to_its_run_alone(world: World, asked: Any, store: str) -> None:
    optimizer = budgeted(search(world), store)
    optimizer.forecast(world.program(), **both(world))
    assert optimizer.compile(world.program(), **both(world)).optimization.forecast is not None
    fewer = {name: examples[:8] for name, examples in both(world).items()}
    assert optimizer.compile(world.program(), **fewer).optimization.forecast is None


def test_others_may_call_lms_while_the_first_example_is_looked_at(world: World, asked: Any, store: str) -> None:
    """A call of another run, in a thread that is new, is not the program's."""
    lm, began, over = world.lm(), threading.Event(), threading.Event()

    def other() -> None:
        with dspy_prod.call_context(run=dspy_prod.Run("other", calls=99, store=store)):
            lm("hello")
            over.set()

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        if not began.is_set():
            began.set()
            threading.Thread(target=other).start()
            over.wait(5)
        return world.metric(example, prediction)

    best = budgeted(search(world, metric=metric), store).compile(world.program(), **both(world))
    assert over.is_set()
    assert best.optimization.stopped_by == "completed"
