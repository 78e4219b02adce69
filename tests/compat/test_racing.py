"""DSPy's `Evaluate` in a race: it asks in the heat's order, stops where the race is decided, and is else as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import dspy
import pytest
from dspy.utils import parallelizer
from dspy.utils.callback import BaseCallback
from dspy.utils.callback_context import ACTIVE_CALL_ID

from dspy_prod.compat import racing
from dspy_prod.context.scoring import raising
from dspy_prod.errors import RejectedError
from dspy_prod.optimize.racing import Contest, Heat

SIZE = 40
EXAMPLES = [dspy.Example(place=place).with_inputs("place") for place in range(SIZE)]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    evaluate: Any = import_module("dspy.evaluate.evaluate")
    monkeypatch.setattr(evaluate, "ParallelExecutor", evaluate.ParallelExecutor)
    racing.install()
    yield
    assert not racing.HEATS


class Program(dspy.Module):
    """Notes what it is asked."""

    def __init__(self, broken: frozenset[int] = frozenset(), error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.calls: set[str] = set()
        self.broken, self.error = broken, error
        self._lock = threading.Lock()

    def forward(self, place: int) -> dspy.Prediction:
        with self._lock:
            self.asked.append(place)
        if place in self.broken:
            raise self.error("broken")
        return dspy.Prediction(place=place)


class Racer(BaseCallback):  # type: ignore[misc]
    """Gives each evaluation the heat it is told to have."""

    def __init__(self, heat: Heat | None) -> None:
        self.heat = heat

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if self.heat is not None:
            racing.HEATS[call_id] = self.heat

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        racing.HEATS.pop(call_id, None)


def a_heat(best: float = 0.9, size: int = SIZE) -> Heat:
    """The heat of somebody new against an incumbent."""
    contest = Contest(size, delta=0.1, seed=1)
    contest.complete("given", [best] * size)
    heat = contest.heat("new")
    assert heat is not None
    return heat


def evaluated(program: Program, heat: Heat | None, metric: Any, *, threads: int = 1, **settings: Any) -> Any:
    """The result of an evaluation in a race."""
    evaluate = dspy.Evaluate(devset=EXAMPLES, metric=metric, num_threads=threads)
    with dspy.context(callbacks=[Racer(heat)], **settings):
        return evaluate(program)


def wrong(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    return False


def even(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    return example.place % 2 == 0


@pytest.mark.parametrize("threads", [1, 6])
def test_a_dropped_program_is_not_asked_any_more(threads: int) -> None:
    """What it was asked is the beginning of the heat's order; the score is the predicted one."""
    heat, program = a_heat(), Program()
    result = evaluated(program, heat, wrong, threads=threads)
    assert heat.dropped
    assert len(program.asked) < SIZE / 2
    assert sorted(program.asked) == sorted(heat.order[: len(program.asked)])
    assert [example.place for example, _, _ in result.results] == list(range(SIZE))
    assert result.score == pytest.approx(100 * heat.predicted, abs=0.01)
    assert result.score < 90
    for example, prediction, score in result.results:
        asked = example.place in program.asked
        assert (dict(prediction) == {"place": example.place}) == asked
        assert (score is False) == asked


@pytest.mark.parametrize("threads", [1, 6])
def test_one_that_is_good_enough_is_evaluated_completely(threads: int) -> None:
    """Its results are in the order of the set, each with its own prediction."""
    heat, program = a_heat(best=0.5), Program()
    result = evaluated(program, heat, even, threads=threads)
    assert program.asked == heat.order or threads > 1
    assert sorted(program.asked) == list(range(SIZE))
    assert result.score == 50
    assert [(prediction.place, score) for _, prediction, score in result.results] == [
        (place, place % 2 == 0) for place in range(SIZE)
    ]
    assert heat.predicted == 0.5


def test_an_evaluation_without_a_heat_is_as_it_was() -> None:
    """Also one of another size than the heat's: it is not the selection set."""
    for heat in (None, a_heat(size=3)):
        program = Program()
        assert evaluated(program, heat, even).score == 50
        assert program.asked == list(range(SIZE))


@pytest.mark.parametrize("threads", [1, 4])
def test_failures_drop_nobody_and_stand_at_their_places(threads: int) -> None:
    """They score what DSPy gives them; the race takes them for unknown."""
    heat, program = a_heat(best=0.45), Program(broken=frozenset(range(1, SIZE, 2)))
    result = evaluated(program, heat, even, threads=threads, max_errors=1000)
    assert not heat.dropped
    assert heat.answered == dict.fromkeys(range(0, SIZE, 2), 1.0)
    assert [score for _, _, score in result.results] == [True, 0.0] * (SIZE // 2)


def test_what_failed_is_named_as_dspy_names_it(caplog: pytest.LogCaptureFixture) -> None:
    """The log shows the example and not what the race made of it, and the lists have the example's place."""
    evaluate: Any = import_module("dspy.evaluate.evaluate")
    executor = evaluate.ParallelExecutor(num_threads=1, max_errors=100, disable_progress_bar=True)
    token = ACTIVE_CALL_ID.set("call")
    racing.HEATS["call"] = a_heat(best=0.1)

    def ask(example: dspy.Example) -> tuple[Any, float]:
        if example.place == 7:
            raise RuntimeError("broken")
        return example.place, 1.0

    parallelizer.logger.addHandler(caplog.handler)
    try:
        results = executor.execute(ask, EXAMPLES)
    finally:
        parallelizer.logger.removeHandler(caplog.handler)
        racing.HEATS.clear()
        ACTIVE_CALL_ID.reset(token)
    assert results == [(place, 1.0) if place != 7 else None for place in range(SIZE)]
    assert executor.failed_indices == [7]
    assert str(executor.exceptions_map) == str({7: RuntimeError("broken")})
    assert f"Error for {EXAMPLES[7]}: broken" in caplog.text


def test_our_own_refusals_end_the_evaluation_as_themselves() -> None:
    """Nothing is scored 0 because somebody was out of money."""
    with raising(), pytest.raises(RejectedError, match="broken"):
        evaluated(Program(broken=frozenset([3]), error=RejectedError), a_heat(best=0.1), even, max_errors=1000)


def test_a_score_that_is_no_number_ends_the_race_and_is_dspy_s_to_complain_about() -> None:
    """As without a race."""
    heat = a_heat()
    with pytest.raises(TypeError):
        evaluated(Program(), heat, lambda *_: None)
    assert heat.answered == {}
    assert not heat.dropped


def test_it_is_installed_once() -> None:
    """One layer, however often it is called; a plain executor elsewhere stays DSPy's own."""
    evaluate: Any = import_module("dspy.evaluate.evaluate")
    first = evaluate.ParallelExecutor
    racing.install()
    assert evaluate.ParallelExecutor is first
    original = import_module("dspy.utils.parallelizer").ParallelExecutor
    assert first.__mro__[1] is original
    assert import_module("dspy.predict.parallel").ParallelExecutor is original


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ParallelExecutor.execute", "(self, function, data)"),
        ("ParallelExecutor._process_outcome", "(self, results, idx, outcome)"),
        ("ParallelExecutor._wrap_function", "(self, user_function)"),
    ],
)
def test_the_foreign_names_are_there(name: str, expected: str) -> None:
    """A release that changes one of them fails here first."""
    thing: Any = import_module("dspy.utils.parallelizer")
    for part in name.split("."):
        thing = getattr(thing, part)
    assert str(inspect.signature(thing)) == expected
    assert ACTIVE_CALL_ID.get() is None
