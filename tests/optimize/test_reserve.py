"""What is kept back for finalists: as much as they lack, and nothing that could not be enough."""

from __future__ import annotations

import threading
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError

from benchmarks.subjects import Guesses
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.reserve import Reserve
from dspy_prod.optimize.sums import Sum, Sums


def budgeted(optimizer: Any, store: str, **options: Any) -> BudgetedOptimizer:
    return BudgetedOptimizer(optimizer, store=store, view=None, **options)


@pytest.mark.parametrize("cap", [60, 70, 79])
def test_what_completes_nothing_more_is_not_kept(cap: int, world: World, asked: Any, store: str) -> None:
    """The last candidate could not be completed, so a part of the cap was left that nobody had any use for."""
    optimizer = Guesses(world.metric, tries=6, num_threads=4)
    assert len(world.valset) == 24
    best = budgeted(optimizer, store, max_calls=cap).compile(
        world.program(), trainset=world.trainset, valset=world.valset
    )
    report = best.optimization
    assert report.stopped_by == "calls"
    assert 0.97 * cap <= len(world.calls) <= cap
    complete = [each for each in report.candidates if each.status == "complete"]
    assert len(complete) == cap // 24
    assert report.best_score == max(each.score for each in complete)


def test_a_search_that_returns_nothing_in_time_has_the_reserve(world: World, asked: Any, store: str) -> None:
    """It was kept for what the optimizer would return, and then nothing was returned."""
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: False, max_bootstrapped_demos=40, max_rounds=3)
    best = budgeted(optimizer, store, max_calls=70, metric=world.metric).compile(
        world.program(), trainset=world.trainset
    )
    assert best.optimization.stopped_by == "calls"
    assert len(world.calls) >= 68


def test_a_candidate_that_lacks_little_is_completed(world: World, asked: Any, store: str) -> None:
    """What an optimizer only looked at in part is evaluated completely at the end."""
    optimizer = dspy.MIPROv2(
        metric=world.metric, auto=None, num_candidates=3, max_bootstrapped_demos=2, max_labeled_demos=2,
        prompt_model=world.prompt_lm(), num_threads=4, verbose=False,
    )  # fmt: skip
    best = budgeted(optimizer, store, max_calls=100).compile(
        world.program(), trainset=world.trainset, valset=world.valset, num_trials=20, minibatch=True, minibatch_size=20,
        minibatch_full_eval_steps=15,
    )  # fmt: skip
    report = best.optimization
    assert report.stopped_by == "calls"
    assert report.phases["finals"].calls > 0
    assert sum(each.status == "complete" for each in report.candidates) >= 2
    assert len(world.calls) >= 0.9 * 100


def test_what_cannot_do_without_a_dear_call_ran_out_of_money(world: World, asked: Any, store: str) -> None:
    """Some optimizers assert, or fail on nothing, when a proposal is refused: that is no failure of theirs."""

    class Dear(dspy.teleprompt.Teleprompter):
        def __init__(self) -> None:
            super().__init__()
            self.metric = world.metric
            self.proposer = world.prompt_lm(max_tokens=100_000)

        def compile(self, student: Any, *, trainset: Any) -> Any:
            try:
                self.proposer("Propose something.")
            except Exception as error:
                assert isinstance(error, ValueError)  # noqa: PT017 (as InferRules does)
            return student

    best = budgeted(Dear(), store, budget_usd=0.02).compile(world.program(), trainset=world.trainset)
    report = best.optimization
    assert (report.stopped_by, report.baseline.score is None) == ("budget", False)
    assert "AssertionError" in report.detail
    assert "Raise the cap" in report.detail


def kept_for(max_calls: int, used: int, missing: int, flying: int = 0) -> tuple[Reserve, Any, list[Any]]:
    """What keeps back of so many calls for one candidate of 24 examples, its run, and the caps that it sets."""
    seen = SimpleNamespace(index=2, evaluated=True, predicted=None, scores=dict.fromkeys(range(24 - missing), 1.0))
    camera: Any = SimpleNamespace(
        keys=[str(number) for number in range(24)], candidates=SimpleNamespace(all=[seen]),
        is_complete=lambda _: False, missing=lambda _: missing, flying=lambda _: flying,
    )  # fmt: skip
    traits = SimpleNamespace(finalists=1, late=False)
    task: Any = SimpleNamespace(traits=traits, rounds=None, num_threads=4, testset=[], selection=([0] * 24,))
    terms: Any = SimpleNamespace(budget_usd=None, max_calls=max_calls, max_tokens=None, reserve="auto")
    sums = Sums("run", {})
    sums.candidates["2"] = Sum(calls=24 - missing, answers=24 - missing)
    sums.phases["baseline"] = Sum(calls=24, answers=24)
    sums.total = Sum(calls=used, answers=used)
    caps: list[int] = []
    run: Any = SimpleNamespace(
        used=lambda: SimpleNamespace(usd=None, calls=used, tokens=None), allow=lambda **to: caps.append(to["calls"])
    )
    return Reserve(terms, task, sums, camera), run, caps


@pytest.mark.parametrize(
    ("missing", "flying", "used", "kept"), [(12, 0, 60, 0), (12, 3, 60, 0), (10, 4, 60, 6), (12, 4, 58, 8)]
)
def test_what_its_calls_on_their_way_will_have_used_is_no_room(missing: int, flying: int, used: int, kept: int) -> None:
    """With 10 of 70 calls left, 3 of them on their way, a candidate that lacks 12 answers cannot be completed.

    It was taken to lack 9, which were kept for it, and the run ended with 61 calls.
    """
    reserve, run, caps = kept_for(70, used, missing, flying)
    reserve.keep(run, None)
    assert caps == [70 - kept]


@pytest.mark.parametrize("way", ["keep", "look"])
@pytest.mark.parametrize("last", ["keep", "free"])
def test_a_thread_of_the_search_that_is_late_does_not_have_the_last_word(last: str, way: str) -> None:
    """It took back what was kept for the finals, which were then refused their answers."""
    reserve, run, caps = kept_for(70, 50, 10)
    reserve.keep(run, None)
    reserve.keep(run, None, final=True) if last == "keep" else reserve.free(run)
    assert caps == [60, 70]
    getattr(reserve, way)(run, None)
    assert caps == [60, 70]


@pytest.mark.parametrize("last", ["keep", "free"])
def test_nor_does_one_that_was_at_it_before(last: str) -> None:
    """Nobody waited for it as the reserve was given to the test set."""
    reserve, run, caps = kept_for(70, 50, 10)
    reserve.keep(run, None)
    there, go_on, used = threading.Event(), threading.Event(), run.used

    def waits() -> Any:
        if threading.current_thread() is late:
            there.set()
            assert go_on.wait(20)
        return used()

    run.used = waits
    late = threading.Thread(target=reserve.look, args=(run, None))
    late.start()
    assert there.wait(20)
    ends = threading.Thread(
        target=(lambda: reserve.keep(run, None, final=True)) if last == "keep" else lambda: reserve.free(run)
    )
    ends.start()
    ends.join(0.05)  # it can only wait
    go_on.set()
    late.join(20)
    ends.join(20)
    assert caps == [60, 60, 70]


def test_whoever_finds_somebody_at_it_does_not_wait_and_nothing_is_missed() -> None:
    """The garbage collector closed a call on the very thread that was at it, and this waited for itself."""
    reserve, run, caps = kept_for(70, 50, 10)
    reserve.keep(run, None)
    used, inside = run.used, []

    def once_more() -> Any:
        if not inside:
            inside.append(True)
            reserve.look(run, None)
        return used()

    run.used = once_more
    thread = threading.Thread(target=reserve.look, args=(run, None), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert caps == [60, 60, 60]


def watching(student: Any, world: World, asked: Any, judge: Any = None, on_answer: Any = lambda: None) -> Camera:
    nobody: Any = None
    return Camera(
        student, world.valset, world.trainset, judge, {asked.model}, None, lambda _: None, on_answer, nobody
    )  # fmt: skip


def test_of_its_calls_on_their_way_only_those_count_that_it_lacks(world: World, asked: Any) -> None:
    """Those on the training set were taken off what it lacks, and less was kept for it while they went on."""
    student = world.program()
    first, second, third, *_ = world.valset
    camera = watching(student, world, asked)
    seen = camera.candidates.seen_of(student)
    camera.note(seen, camera.key(first), 1.0)

    def begin(name: str, *examples: Any) -> None:
        for number, example in enumerate(examples):
            camera.on_module_start(f"{name} {number}", student, {"kwargs": dict(example.inputs())})

    other = dspy.Example(message="something else").with_inputs("message")
    copy_context().run(begin, "elsewhere", *world.trainset[:4], other)
    copy_context().run(begin, "known", first)
    with dspy.context(lm=asked.copy(rollout_id=7)):
        copy_context().run(begin, "sample", third)
    assert (camera.flying(seen), camera.missing(seen)) == (0, len(world.valset) - 1)
    copy_context().run(begin, "its own", second, second, third)
    assert camera.flying(seen) == 2


def endless() -> Any:
    """What contains itself."""
    found: dict[str, Any] = {}
    found["within"] = found
    return found


class Unreadable:
    """Another thread is at it whenever it is read."""

    def model_dump(self, **_: Any) -> Any:
        raise RuntimeError("dictionary changed size during iteration")


@pytest.mark.parametrize("odd", [endless(), Unreadable(), "\ud83d"], ids=["endless", "unreadable", "half a character"])
def test_inputs_that_cannot_be_told_are_no_examples_of_the_run(odd: Any, world: World, asked: Any) -> None:
    """Each look at what is on its way failed as long as such a call was, and the reserve stayed what it had been."""
    student = world.program()
    camera = watching(student, world, asked)
    seen = camera.candidates.seen_of(student)
    copy_context().run(camera.on_module_start, "odd", student, {"kwargs": {"message": odd}})
    copy_context().run(camera.on_module_start, "known", student, {"kwargs": dict(world.valset[0].inputs())})
    assert camera.flying(seen) == 1
    example, answer = dspy.Example(message=odd).with_inputs("message"), dspy.Prediction(label="a")
    camera.on_module_end("odd", answer)
    camera.scored(example, answer, 1.0, traced=False)  # called by the metric: what it raises is the metric's error
    assert camera.flying(seen) == 1
    assert camera.missing(seen) == len(world.valset)


def test_what_a_call_was_asked_stays_what_it_is_when_its_inputs_change(world: World, asked: Any) -> None:
    """A program may write into what it was given, while others look."""
    student = world.program()
    camera = watching(student, world, asked)
    inputs = dict(world.valset[0].inputs())
    copy_context().run(camera.on_module_start, "known", student, {"kwargs": inputs})
    inputs.clear()
    assert camera.flying(camera.candidates.seen_of(student)) == 1


def test_a_refused_answer_is_none_also_where_nobody_can_look_at_what_is_left(world: World, asked: Any) -> None:
    """DSPy logs what a callback raises, and the refusal behind it was never noted."""

    def fails() -> None:
        raise OSError("the store cannot be read")

    student = world.program()
    judge = SimpleNamespace(refused=lambda error: True)
    camera = watching(student, world, asked, judge, fails)

    def answers() -> None:
        camera.on_module_start("call", student, {"kwargs": dict(world.valset[0].inputs())})
        answering = camera._calls["call"].answering
        camera.on_lm_start("asked", asked, {})
        with pytest.raises(OSError, match="cannot be read"):
            camera.on_lm_end("asked", None, LMError("no more"))
        assert answering.refused

    copy_context().run(answers)
