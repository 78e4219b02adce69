"""A forecast: the optimizer is rehearsed on answers that cost nothing; a provider's bill says how good it was."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.teleprompt import Teleprompter
from dspy.utils.callback import BaseCallback

import dspy_prod
from benchmarks.subjects import Subject, optimizers
from benchmarks.world import World
from dspy_prod.optimize.invented import share, varied
from dspy_prod.optimize.live import quiet
from dspy_prod.optimize.pilot import Pilot, recording
from dspy_prod.optimize.rehearsal import Forecast, rehearse
from dspy_prod.optimize.samples import Samples
from dspy_prod.optimize.stage import Stage

_numbers = itertools.count()


@pytest.fixture
def world() -> Iterator[World]:
    """A small one."""
    with World(3, train=16, val=20, test=4, latency=0.0) as small:
        yield small


class Case:
    """A world, its LMs, and an optimizer in it."""

    def __init__(self, world: World, name: str = "BootstrapFewShotWithRandomSearch", **lm: Any) -> None:
        store = f"memory://rehearsal-{next(_numbers)}"
        self.world = world
        self.lm, self.proposer = world.lm(store=store, **lm), world.prompt_lm(store=store, **lm)
        self.subject: Subject = optimizers(world, lm=self.lm, prompt_lm=self.proposer, threads=1)[name]
        if name == "GEPA":
            self.subject.optimizer.max_metric_calls = 80

    def pilot(self) -> Pilot:
        evaluate = dspy.Evaluate(devset=self.world.valset, metric=self.world.metric, num_threads=1)
        with dspy.context(lm=self.lm), quiet(), recording(self.subject.student, self.world.valset) as pilot:
            result = evaluate(self.subject.student)
        pilot.scored(result.results)
        return pilot

    def forecast(self, pilot: Pilot, **more: Any) -> Forecast:
        subject = self.subject
        with dspy.context(lm=self.lm):
            return rehearse(subject.optimizer, subject.student, subject.arguments, pilot, num_threads=1, **more)

    def bill(self) -> tuple[float, int]:
        """What the optimizer itself is billed: dollars and calls."""
        usd, calls = self.world.bill_usd, len(self.world.calls)
        with dspy.context(lm=self.lm), quiet():
            self.subject.optimizer.compile(self.subject.student, **self.subject.arguments)
        return self.world.bill_usd - usd, len(self.world.calls) - calls


@pytest.mark.parametrize(
    "name",
    ["BootstrapFewShotWithRandomSearch", "MIPROv2", "GEPA", "COPRO", "InferRules", "Guesses", "KNNFewShot"],
)
def test_the_bill_lies_in_the_range_of_its_forecast(world: World, name: str) -> None:
    """Of one draw; how often it does is what `benchmarks.forecast` measures."""
    random.seed(1)
    case = Case(world, name)
    pilot = case.pilot()
    paid = world.bill_usd
    forecast = case.forecast(pilot)
    usd, calls = case.bill()
    assert forecast.warnings == ()
    assert forecast.usd_low <= usd + paid <= forecast.usd_high
    assert forecast.calls_low <= calls + len(world.valset) <= forecast.calls_high
    assert forecast.usd == pytest.approx(sum(forecast.by.values()), rel=0.05)


@pytest.mark.slow
def test_the_rollouts_of_simba_differ_enough_that_it_goes_on() -> None:
    """Answers that were all alike would end its steps at once; those of this world differ less than the rehearsed."""
    with World(2, latency=0.0) as world:
        case = Case(world, "SIMBA")
        pilot = case.pilot()
        paid = world.bill_usd
        forecast = case.forecast(pilot)
        usd, _ = case.bill()
    assert forecast.usd_low <= usd + paid <= forecast.usd_high
    assert forecast.usd == pytest.approx(usd + paid, rel=0.3)


def test_fields_that_want_more_than_their_labels_are_answered() -> None:
    """ReAnchor's choices have probabilities beside the value that a label is, and are written otherwise than read."""
    with World(3, train=8, val=10, test=4, latency=0.0) as world:
        case = Case(world, "ReAnchor")
        pilot = case.pilot()
        paid = world.bill_usd
        forecast = case.forecast(pilot, seeds=1)
        usd, calls = case.bill()
    assert forecast.warnings == ()
    assert forecast.usd_low <= usd + paid <= forecast.usd_high
    assert forecast.calls_low <= calls + len(world.valset) <= forecast.calls_high


def test_a_thread_that_outlives_a_rehearsal_asks_nobody(world: World) -> None:
    """As after Ctrl-C: what an optimizer left running meets LMs that are themselves again, and they cost money."""
    going_on, threads = threading.Event(), []

    class Leaves(Teleprompter):
        def compile(self, student: Any, *, trainset: list[Any], **_: Any) -> Any:
            def late() -> None:
                going_on.wait(10)
                with contextlib.suppress(BaseException):
                    student(**trainset[0].inputs())

            threads.append(threading.Thread(target=contextvars.copy_context().run, args=(late,)))
            threads[-1].start()
            return student

    case = Case(world, cache=False)
    pilot = case.pilot()
    sent = len(world.calls)
    with dspy.context(lm=case.lm):
        rehearse(Leaves(), case.subject.student, {"trainset": world.trainset}, pilot, seeds=1)
    going_on.set()
    for thread in threads:
        thread.join()
    assert len(world.calls) == sent


def test_how_far_it_is_can_be_shown(world: World) -> None:
    """The first rehearsal does not know how many calls there will be; the next ones do."""
    case, told = Case(world), []

    @contextlib.contextmanager
    def shown(text: str, total: int | None, unit: str) -> Iterator[Any]:
        steps = itertools.count()
        yield lambda: next(steps)
        told.append((text, total, next(steps), unit))

    forecast = case.forecast(case.pilot(), shown=shown)
    assert [(text, unit) for text, _, _, unit in told] == [(f"rehearsal {n} of 3", "call") for n in (1, 2, 3)]
    assert [total for _, total, _, _ in told] == [None, told[0][2], told[0][2]]
    assert told[0][2] >= forecast.calls_low


def test_it_costs_nothing_where_nobody_may_be_asked(world: World) -> None:
    case = Case(world, "MIPROv2")
    pilot = case.pilot()
    sent, paid = len(world.calls), world.bill_usd
    forecast = case.forecast(pilot, ask=False, seeds=1)
    assert len(world.calls) == sent
    assert world.bill_usd == paid
    assert forecast.pilot_usd == pytest.approx(paid)
    assert forecast.usd > paid


def test_a_proposer_is_asked_a_few_times_and_told_as_part_of_the_pilot(world: World) -> None:
    case = Case(world, "COPRO")
    pilot = case.pilot()
    sent = len(world.calls)
    forecast = case.forecast(pilot)
    assert 1 <= len(world.calls) - sent <= 10
    assert forecast.pilot_usd == pytest.approx(world.bill_usd)
    assert set(forecast.by) == {"task/openai/world-task", "prompt/openai/world-proposer"}


def test_neither_the_optimizer_nor_the_program_is_changed(world: World) -> None:
    case = Case(world, "GEPA")
    pilot = case.pilot()
    before = dict(vars(case.subject.optimizer))
    state = case.subject.student.dump_state()
    case.forecast(pilot, seeds=1)
    assert vars(case.subject.optimizer) == before
    assert case.subject.student.dump_state() == state
    assert dspy.LM.__call__ is dspy.BaseLM.__call__
    assert "answered" not in dspy_prod.LM.__call__.__qualname__


def test_where_a_model_is_and_who_asks_changes_no_forecast() -> None:
    """What was answered right was drawn by the address too, so that every server had a forecast of its own."""
    found = []
    for key in ("one", "another"):
        with World(3, train=16, val=20, test=4, latency=0.0) as each:  # at a port of its own
            case = Case(each, "InferRules", api_key=key)
            found.append(case.forecast(case.pilot(), seeds=2))
    assert (found[0].calls, found[0].usd) == (found[1].calls, found[1].usd)


def test_callbacks_history_and_usage_see_nothing_of_it(world: World) -> None:
    case = Case(world)
    pilot = case.pilot()
    seen: list[Any] = []

    class Watches(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            seen.append(instance)

    before = len(case.lm.history)
    with dspy.context(callbacks=[Watches()]), dspy.track_usage() as usage:
        case.forecast(pilot, seeds=1)
    assert seen == []
    assert len(case.lm.history) == before
    assert usage.get_total_tokens() == {}


def test_what_the_cache_answers_is_free(world: World) -> None:
    """The same evaluation again costs nothing where there is a cache, and everything where there is none."""

    class Twice(Teleprompter):
        def compile(self, student: Any, *, trainset: list[Any], **_: Any) -> Any:
            for example in [*trainset, *trainset]:
                student(**example.inputs())
            return student

    found = []
    for cache in (True, False):
        case = Case(world, cache=cache)
        pilot = case.pilot()
        with dspy.context(lm=case.lm):
            found.append(rehearse(Twice(), case.subject.student, {"trainset": world.trainset}, pilot))
    cached, uncached = found
    assert (cached.calls, cached.cached) == (20 + 16, 16)
    assert (uncached.calls, uncached.cached) == (20 + 32, 0)


def test_a_judge_in_the_metric_is_not_asked(world: World) -> None:
    """Whatever LM is called from wherever, a rehearsal answers."""
    case = Case(world)
    judge = dspy.Predict("message, label -> good: bool")
    judge.lm = case.proposer

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(judge(message=example.message, label=str(prediction.label)).good)

    case.subject.optimizer.metric = metric
    pilot = case.pilot()
    sent = len(world.calls)
    forecast = case.forecast(pilot, ask=False, seeds=1)
    assert len(world.calls) == sent
    assert forecast.by["prompt/openai/world-proposer"] > 0


def test_an_optimizer_that_fails_leaves_a_forecast_with_a_warning(world: World) -> None:
    class Fails(Teleprompter):
        def compile(self, student: Any, *, trainset: list[Any], **_: Any) -> Any:
            student(**trainset[0].inputs())
            raise RuntimeError("not today")

    case = Case(world)
    pilot = case.pilot()
    with dspy.context(lm=case.lm):
        forecast = rehearse(Fails(), case.subject.student, {"trainset": world.trainset}, pilot)
    assert forecast.calls == 21
    assert "ended early with RuntimeError: not today" in forecast.warnings[0]
    assert "warning: the rehearsal ended early" in str(forecast)


def test_a_model_without_a_price_is_named(world: World) -> None:
    case = Case(world, prices={})
    forecast = case.forecast(case.pilot(), seeds=1)
    assert "no price is known for openai/world-task" in forecast.warnings[-1]
    assert forecast.usd == 0
    assert forecast.calls > 20


def test_what_is_really_asked_counts_in_the_run_and_stops_with_it(world: World) -> None:
    case = Case(world, "COPRO")
    pilot = case.pilot()
    run = dspy_prod.Run("forecast", calls=1, store=f"memory://rehearsal-{next(_numbers)}")
    sent = len(world.calls)
    with dspy_prod.call_context(run=run):
        forecast = case.forecast(pilot, seeds=1)
    assert len(world.calls) - sent == 1
    assert run.used().calls == 1
    assert any("could not be asked for real (BudgetExceededError" in each for each in forecast.warnings)


def test_rollouts_differ_and_repeats_do_not(world: World) -> None:
    """SIMBA looks for examples on which its rollouts differ: answers that are all alike end it early."""
    case = Case(world)
    pilot = case.pilot()
    stage = Stage(pilot, Samples(pilot, None), world.valset, 0, lambda lm: None, lambda lm: True)
    program = case.subject.student

    def labels(rollout: int) -> list[str]:
        lm = case.lm.copy(rollout_id=rollout, temperature=1.0)
        with dspy.context(lm=lm, callbacks=[stage]):
            from dspy_prod.compat.rehearsing import answered_by

            with answered_by(stage, (dspy_prod.LM,)):
                return [program(message=example.message).label for example in world.valset]

    first, again, other = labels(1), labels(1), labels(2)
    assert first == again
    assert first != other
    right = [sum(a == b.label for a, b in zip(each, world.valset, strict=True)) for each in (first, other)]
    assert all(0 < each < 20 for each in right)


def test_the_accuracy_and_the_lengths_are_those_of_the_pilot(world: World) -> None:
    case = Case(world)
    pilot = case.pilot()
    assert len(pilot.played) == 20
    assert pilot.accuracy == pytest.approx(
        sum(each.score or 0 for each in pilot.played.values()) / 20,
    )
    assert pilot.usd == pytest.approx(world.bill_usd)
    measured = pilot.models["openai/world-task"]
    assert measured.tokens(measured.chars_in // measured.calls) == pytest.approx(
        sum(call.input_tokens for call in world.calls) / 20, rel=0.05
    )


def test_scores_of_another_range_are_right_and_wrong_as_well(world: World) -> None:
    """A metric from 0 to 100 makes the forecast of one from 0 to 1."""
    case = Case(world)
    pilot = case.pilot()
    accuracy, forecast = pilot.accuracy, case.forecast(pilot, ask=False, seeds=1)
    for played in pilot.played.values():
        played.score = 100 * (played.score or 0.0)
    assert pilot.accuracy == accuracy < 1
    again = case.forecast(pilot, ask=False, seeds=1)
    assert (again.calls, again.cached, again.tokens) == (forecast.calls, forecast.cached, forecast.tokens)
    pilot.scored([(world.valset[0], None, float("nan"))])
    assert pilot.accuracy <= accuracy


def test_it_reads_as_a_sentence() -> None:
    forecast = Forecast(
        3.104, 2.7, 3.6, 5900, 5000, 7000, seconds=1500, pilot_usd=0.0123, warnings=("the metric is slow",)
    )
    assert str(forecast) == (
        "$3.10 (2.70 to 3.60), 5,900 calls, 25 min; the pilot cost $0.012\nwarning: the metric is slow"
    )


def test_in_a_notebook_it_is_a_table() -> None:
    """It was the `repr` of all its fields, with twenty digits."""
    forecast = Forecast(
        0.0179704999, 0.0131, 0.0229, 100, 75, 124, seconds=330, pilot_usd=0.0023, cached=32,
        by={"task/<b>": 0.012, "prompt/x": 0.006}, warnings=("<i>slow",),
    )  # fmt: skip
    html = forecast._repr_html_()
    for words in ("$0.0180", "$0.0131 to $0.0229", "75 to 124", "32 more", "task/&lt;b&gt;", "6 min", "&lt;i&gt;slow"):
        assert words in html
    assert "<table" in Forecast(0.0, 0.0, 0.0, 0, 0, 0)._repr_html_()


def test_a_varied_text_is_another_one_of_the_same_length() -> None:
    text = "```\nSort the customer's message under one of four labels.\n```"
    found = {varied(text, str(salt)) for salt in range(20)}
    assert len(found) >= 19
    assert {len(each) for each in found} == {len(text)}
    assert all(each.startswith("```\n") and each.endswith("\n```") for each in found)
    assert 0 <= share("a", 1) < 1
