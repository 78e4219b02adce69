"""Beside `mlflow.dspy.autolog(log_compiles=True, log_evals=True)`: no second set of runs, and nothing left changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import mlflow
import pytest
from dspy.utils import DummyLM
from mlflow import MlflowClient

import dspy_prod
from benchmarks.world import World
from dspy_prod import tracking
from dspy_prod.compat.mlflow import apart_from_autolog
from dspy_prod.tracking import runs

EXAMPLES = [dspy.Example(message=f"m{number}", category="billing").with_inputs("message") for number in range(3)]


def right(example: Any, prediction: Any, trace: Any = None) -> float:
    """Whether the category is right."""
    return float(example.category == prediction.category)


@pytest.fixture
def logged(schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """Autologging at its most talkative, into a store of this test."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{shutil.copy(schema, tmp_path / 'mlflow.db')}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("autologged")
    assert dspy_prod.BudgetedOptimizer is not None  # autologging patches the optimizers that there are by then
    mlflow.dspy.autolog(log_compiles=True, log_evals=True, silent=True)
    yield MlflowClient(uri)
    mlflow.dspy.autolog(disable=True)


def compiled() -> dspy.Module:
    """A small optimization: it bootstraps and evaluates."""
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=right, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=2
    )
    answers = DummyLM([{"category": "billing"}] * 60)
    with dspy.context(lm=answers, adapter=dspy.ChatAdapter()):
        best: dspy.Module = optimizer.compile(dspy.Predict("message -> category"), trainset=EXAMPLES)
    return best


def counts(client: MlflowClient) -> tuple[int, int]:
    """(runs, traces) in the store."""
    mlflow.flush_trace_async_logging()
    experiment = client.get_experiment_by_name("autologged")
    assert experiment is not None
    places = [experiment.experiment_id]
    return len(client.search_runs(places)), len(client.search_traces(locations=places))


def test_no_runs_and_no_traces_of_a_compile_apart(logged: MlflowClient) -> None:
    """Compile and evaluations make neither; the same compile afterwards makes both, as it does without us."""
    with apart_from_autolog():
        compiled()
    assert counts(logged) == (0, 0)
    assert mlflow.active_run() is None
    compiled()
    runs, _ = counts(logged)
    assert runs > 1


def test_calls_after_it_are_traced_again(logged: MlflowClient) -> None:
    """What is answered outside is traced as before."""
    with apart_from_autolog():
        compiled()
    with dspy.context(lm=DummyLM([{"category": "billing"}])):
        dspy.Predict("message -> category")(message="m")
    assert counts(logged) == (0, 1)


def test_traces_of_a_compile_are_kept_where_they_were_asked_for(logged: MlflowClient) -> None:
    """`log_traces_from_compile=True` holds within it too."""
    mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True, silent=True)
    with apart_from_autolog():
        compiled()
    runs, traces = counts(logged)
    assert runs == 0
    assert traces > 0


def test_a_forecast_makes_no_runs(logged: MlflowClient, tmp_path: Path) -> None:
    """Three rehearsals are three compiles with their evaluations, of which nobody wants to see a run."""
    with World(train=8, val=8) as world, dspy.context(lm=world.lm(), adapter=dspy.ChatAdapter()):
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=world.metric, max_bootstrapped_demos=1, num_candidate_programs=1, num_threads=2
        )
        dspy_prod.BudgetedOptimizer(optimizer, budget_usd=1.0, view=None, store=f"memory://{tmp_path.name}").forecast(
            world.program(), trainset=world.trainset, valset=world.valset
        )
    assert counts(logged)[0] == 0
    assert mlflow.active_run() is None


@pytest.mark.usefixtures("quick_exporters")
def test_a_budgeted_optimizer_makes_only_its_own_runs(logged: MlflowClient, tmp_path: Path) -> None:
    """Autologging has patched it as every optimizer; there is one run of the compile, and one a candidate, of ours."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking.enable("autologged", tracking_uri=uri)
    try:
        with World(train=8, val=8) as world, dspy.context(lm=world.lm(), adapter=dspy.ChatAdapter()):
            optimizer = dspy.BootstrapFewShotWithRandomSearch(
                metric=world.metric, max_bootstrapped_demos=1, num_candidate_programs=1, num_threads=2
            )
            best = dspy_prod.BudgetedOptimizer(
                optimizer, budget_usd=1.0, view=None, store=f"memory://{tmp_path.name}"
            ).compile(world.program(), trainset=world.trainset, valset=world.valset)
        assert runs.flush(60.0)
        assert mlflow.active_run() is None
    finally:
        tracking.disable()
    experiment = logged.get_experiment_by_name("autologged")
    assert experiment is not None
    kept = logged.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in kept if "dspy_prod.key" not in run.data.tags} == set()
    below = [run for run in kept if "mlflow.parentRunId" in run.data.tags]
    assert len(below) == len(kept) - 1
    complete = [one for one in best.optimization.candidates if one.status == "complete"]
    assert len([run for run in below if run.data.tags["dspy_prod.status"] == "complete"]) == len(complete)
