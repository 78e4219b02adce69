"""`BudgetedOptimizer.forecast`: what it says before a run, and that its pilot counts in that run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from tqdm import tqdm

import dspy_prod
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer, ConfigError


def budgeted(world: World, store: str, **options: Any) -> BudgetedOptimizer:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=world.metric, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=3, num_threads=4
    )
    given = {"budget_usd": 1.0, "name": "triage", "view": None, **options}
    return BudgetedOptimizer(optimizer, store=store, **given)


def test_the_pilot_is_part_of_the_run_and_the_bill_is_in_the_range(world: World, asked: Any, store: str) -> None:
    """Its answers are not asked for again; ledger and bill agree over both."""
    optimizer = budgeted(world, store)
    forecast = optimizer.forecast(world.program(), trainset=world.trainset, valset=world.valset)
    assert len(world.calls) == 16
    assert forecast.pilot_usd == pytest.approx(world.bill_usd, abs=1e-9)
    best = optimizer.compile(world.program(), trainset=world.trainset, valset=world.valset)
    report = best.optimization
    assert report.run == "triage"
    assert report.forecast is forecast
    assert report.spent_usd == pytest.approx(world.bill_usd, abs=1e-9)
    assert forecast.usd_low <= report.spent_usd <= forecast.usd_high
    assert forecast.usd == pytest.approx(report.spent_usd, rel=0.3)


def test_a_dry_run_prints_it_and_optimizes_nothing(
    world: World, asked: Any, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    forecast = budgeted(world, store).compile(
        world.program(), trainset=world.trainset, valset=world.valset, dry_run=True
    )
    assert str(forecast) in capsys.readouterr().out
    assert len(world.calls) == 16


def test_neither_program_nor_optimizer_is_changed(world: World, asked: Any, store: str) -> None:
    optimizer, program = budgeted(world, store), world.program()
    before, metric = program.dump_state(), optimizer.optimizer.metric
    optimizer.forecast(program, trainset=world.trainset, valset=world.valset)
    assert program.dump_state() == before
    assert optimizer.optimizer.metric is metric


def test_a_cap_that_is_too_small_for_the_pilot_is_said(world: World, asked: Any, store: str) -> None:
    with pytest.raises((ConfigError, dspy_prod.BudgetExceededError), match="run 'triage'"):
        budgeted(world, store, budget_usd=0.0002).forecast(
            world.program(), trainset=world.trainset, valset=world.valset
        )


def test_another_optimizer_of_the_name_goes_on_with_the_pilot(world: World, asked: Any, store: str) -> None:
    """As in another session of a notebook, with `resume=True` or without."""
    budgeted(world, store).forecast(world.program(), trainset=world.trainset, valset=world.valset)
    best = budgeted(world, store).compile(world.program(), trainset=world.trainset, valset=world.valset, resume=True)
    report = best.optimization
    assert report.run == "triage"
    assert report.spent_usd == pytest.approx(world.bill_usd, abs=1e-9)


@pytest.mark.parametrize(("view", "bars"), [(None, 0), ("log", 0), ("auto", 0), ("bar", 4)])
def test_it_shows_how_far_it_is(
    world: World, asked: Any, store: str, capsys: pytest.CaptureFixture[str], view: str | None, bars: int
) -> None:
    """A bar at a terminal and in a notebook, else a line a step; nothing where nothing is to be shown."""
    optimizer = budgeted(world, store, view=view)
    capsys.readouterr()  # DSPy prints when it is made
    optimizer.forecast(world.program(), trainset=world.trainset, valset=world.valset)
    out, err = capsys.readouterr()
    assert out == ""
    steps = ["triage: pilot", *[f"triage: rehearsal {n} of 3" for n in (1, 2, 3)]]
    if view is None:
        assert err == ""
    elif not bars:
        assert err.splitlines() == steps
    else:
        assert all(step in err for step in steps)
        assert "/16 [" in err
        assert not err.rpartition("\r")[2].strip()  # the last one is wiped off


@pytest.mark.parametrize("after", [3, 30], ids=["in the pilot", "in a rehearsal"])
def test_ctrl_c_ends_it_at_once_and_leaves_nothing_behind(
    world: World, asked: Any, store: str, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    """No bar, no changed class, no changed optimizer; and another forecast can be made."""
    scored: list[float] = []

    def interrupted(metric: Callable[..., Any]) -> Callable[..., Any]:
        def scores(*args: Any, **kwargs: Any) -> Any:
            scored.append(metric(*args, **kwargs))
            if len(scored) == after:
                raise KeyboardInterrupt
            return scored[-1]

        return scores

    optimizer = budgeted(world, store, view="bar")
    own = optimizer.optimizer.metric = interrupted(world.metric)
    ask = dspy.BaseLM.__call__, dspy_prod.LM.__call__
    sets = {"trainset": world.trainset, "valset": world.valset}
    with pytest.raises(KeyboardInterrupt):
        optimizer.forecast(world.program(), **sets)
    assert (dspy.BaseLM.__call__, dspy_prod.LM.__call__) == ask
    assert optimizer.optimizer.metric is own
    assert not [bar for bar in tqdm._instances if not bar.disable]
    assert not capsys.readouterr().err.rpartition("\r")[2].strip()
    sent = len(world.calls)
    assert sent <= 16
    assert optimizer.forecast(world.program(), **sets).usd > 0


class Strays(dspy.Module):
    """Calls its LM in a thread of its own, which knows nothing of the run."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.sort = dspy.Predict("message -> label")
        self.sort.lm = lm

    def forward(self, message: str) -> dspy.Prediction:
        found: list[dspy.Prediction] = []
        thread = threading.Thread(target=lambda: found.append(self.sort(message=message)))
        thread.start()
        thread.join()
        return found[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pilot_past_which_calls_go_is_refused_at_its_first_example(world: World, asked: Any, store: str) -> None:
    """As a run is: no cap would hold for the pilot either."""
    with pytest.raises(ConfigError, match="threads of its own"):
        budgeted(world, store).forecast(Strays(asked), trainset=world.trainset, valset=world.valset)
    assert len(world.calls) <= 1
