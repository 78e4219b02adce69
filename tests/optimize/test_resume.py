"""Runs that go on: after a stop, with another cap, after kill -9; and those that may not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dspy
import pytest

from benchmarks.world import World
from dspy_prod import BudgetedOptimizer, ConfigError
from dspy_prod.optimize import headers
from dspy_prod.stores.opening import default_namespace, open_store

ROOT = Path(__file__).parents[2]


def go(world: World, store: str, *, resume: bool | None = None, programs: int = 3, **options: Any) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=options.pop("metric", world.metric), max_bootstrapped_demos=2, max_labeled_demos=2,
        num_candidate_programs=programs, num_threads=4,
    )  # fmt: skip
    student = options.pop("student", None) or world.program()
    budgeted = BudgetedOptimizer(optimizer, store=store, name="nightly", view=None, **options)
    return budgeted.compile(student, trainset=world.trainset, valset=world.valset, resume=resume)


@pytest.mark.parametrize("cache", [True, False])
def test_a_higher_cap_goes_on_where_the_lower_one_ended(cache: bool, world: World, tmp_path: Path, store: str) -> None:
    """Both parts together cost what one whole run does, and find the same program."""
    with dspy.context(lm=world.lm(cache=cache)):
        whole = go(world, f"sqlite:///{tmp_path}/whole.db", budget_usd=1.0)
        alone = world.bill_usd
        world.lm().cache_clear()
        part = go(world, store, budget_usd=0.005)
        assert part.optimization.stopped_by == "budget"
        world.lm().cache_clear()
        best = go(world, store, budget_usd=1.0, resume=True)
    report = best.optimization
    assert report.stopped_by == "completed"
    assert report.replayed > 0
    assert report.spent_usd == pytest.approx(world.bill_usd - alone, abs=1e-9)
    assert world.bill_usd - alone <= 1.05 * alone + 0.005 * 0.05
    assert best.dump_state() == whole.dump_state()
    assert any("the cap usd is 1" in each for each in report.warnings)
    assert not any("differ from all" in each for each in report.warnings)


def test_a_run_that_was_not_finished_is_not_begun_again_unasked(world: World, asked: Any, store: str) -> None:
    go(world, store, max_calls=30)
    with pytest.raises(ConfigError, match=r"'nightly' was not finished \(calls, .*resume=True.*resume=False"):
        go(world, store, max_calls=30)
    assert go(world, store, max_calls=30, resume=False).optimization.run == "nightly-2"


def test_a_finished_one_is_followed_by_another(world: World, asked: Any, store: str) -> None:
    """A cell of a notebook may be run again."""
    assert go(world, store, max_calls=1000, programs=1).optimization.run == "nightly"
    assert go(world, store, max_calls=1000, programs=1).optimization.run == "nightly-2"


def test_another_program_is_refused_and_named(world: World, asked: Any, store: str) -> None:
    go(world, store, max_calls=30)
    student = world.program()
    student.classify.signature = student.classify.signature.with_instructions("Something else.")
    with pytest.raises(ConfigError, match=r"would not take the same path: .*program"):
        go(world, store, max_calls=60, resume=True, student=student)


def test_another_metric_scores_old_answers_anew_for_nothing(world: World, asked: Any, store: str) -> None:
    def strict(example: Any, prediction: Any, trace: Any = None) -> float:
        return 0.5 * world.metric(example, prediction)

    before = go(world, store, max_calls=2000, programs=1).optimization
    calls = len(world.calls)
    report = go(world, store, max_calls=2000, programs=1, metric=strict, resume=True).optimization
    assert len(world.calls) == calls
    assert report.baseline.score == pytest.approx(0.5 * before.baseline.score)
    assert any("metric" in each for each in report.warnings)


@pytest.mark.parametrize(
    ("name", "store", "told"),
    [("nightly", "memory://resume", "ends with its process"), (None, None, "say which run"),
     ("never", None, "there is no run 'never'")],
)  # fmt: skip
def test_what_cannot_be_gone_on_with_is_said(
    name: str | None, store: str | None, told: str, world: World, asked: Any, tmp_path: Path
) -> None:
    optimizer = BudgetedOptimizer(
        dspy.LabeledFewShot(k=1), max_calls=5, name=name, store=store or f"sqlite:///{tmp_path}/x.db", view=None
    )
    with pytest.raises(ConfigError, match=told):
        optimizer.compile(world.program(), trainset=world.trainset, resume=True)


def test_another_process_ends_it(world: World, asked: Any, store: str) -> None:
    """As `dspy-prod optimizations stop` does."""
    world.provider.latency = 0.05
    found = open_store(store, default_namespace(None))

    def ask() -> None:
        while headers.load(found, "nightly") is None or len(world.calls) < 30:
            time.sleep(0.02)
        headers.ask_to_stop(found, "nightly")

    thread = threading.Thread(target=ask)
    thread.start()
    best = go(world, store, budget_usd=1.0, programs=20)
    thread.join()
    assert best.optimization.stopped_by == "stopped"
    header = headers.load(found, "nightly")
    assert header is not None
    assert (header.state, header.running) == ("stopped", False)


SCRIPT = """
import sys, dspy
from benchmarks.subjects import optimizers
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer
url, store, resume = sys.argv[1:]
world = World(1, train=24, val=24, test=12, url=url)
dspy.configure(lm=world.lm(cache=False))
subject = optimizers(world)["BootstrapFewShotWithRandomSearch"]
best = BudgetedOptimizer(subject.optimizer, budget_usd=1.0, name="killed", store=store, view=None).compile(
    subject.student, resume=resume == "yes" or None, **subject.arguments)
import json
print("RESULT", json.dumps([best.dump_state(), best.optimization.replayed]))
"""


@pytest.mark.long
def test_a_killed_process_is_gone_on_with(world: World, tmp_path: Path) -> None:
    """kill -9 at half: both parts cost what one costs, but for calls in flight, and find the same program."""

    def start(store: str, resume: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, world.url, store, resume], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip

    whole = start(f"sqlite:///{tmp_path}/a.db", "no").communicate(timeout=200)[0]
    alone = len(world.calls)
    process = start(f"sqlite:///{tmp_path}/b.db", "no")
    while len(world.calls) < alone * 3 // 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.communicate()
    resumed, errors = start(f"sqlite:///{tmp_path}/b.db", "yes").communicate(timeout=200)
    assert "RESULT" in resumed, errors[-2000:]
    assert resumed.rpartition("RESULT")[2].rpartition(",")[0] == whole.rpartition("RESULT")[2].rpartition(",")[0]
    assert len(world.calls) - alone <= 1.05 * alone + 6
