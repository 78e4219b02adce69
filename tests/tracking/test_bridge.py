"""Beside MLflow's own tracing: what belongs to our calls is ours, everything else stays MLflow's."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dspy
import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities.trace_location import MlflowExperimentLocation

import dspy_prod
from dspy_prod import Production, tracking
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.tracking.conftest import EXPERIMENT, assert_same_costs, traces_in

ANSWER = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


@pytest.fixture
def elsewhere(schema: Path, tmp_path: Path) -> str:
    """A second MLflow store, which is the program's own current one."""
    uri = f"sqlite:///{shutil.copy(schema, tmp_path / 'other.db')}"
    mlflow.set_tracking_uri(uri)
    return uri


def test_traces_of_other_code_stay_where_the_program_sends_them(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str, elsewhere: str
) -> None:
    """Neither sampling nor our address touches them, and they can be read at once."""
    track(autolog=True, sample=0.0)
    with mlflow.start_span("other work"):
        pass
    assert mlflow.get_trace(mlflow.get_last_active_trace_id(), flush=True) is not None
    lm = connect(serve(answer=ANSWER))
    with dspy.context(lm=lm):
        Production(dspy.Predict("question -> answer"), name="asked")(question="q")
    assert tracking.flush(60)
    theirs = MlflowClient(elsewhere).search_traces(locations=["0"])
    assert [trace.data.spans[0].name for trace in theirs] == ["other work"]
    assert traces_in(uri) == []


def test_a_record_names_the_trace_that_its_span_is_in(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """Also where a call inside another one begins a trace of its own, as MLflow does in worker threads."""
    track(autolog=True)
    lm = connect(serve(answer=ANSWER))

    class Fan(dspy.Module):
        def forward(self, question: str) -> dspy.Prediction:
            ask = dspy.Predict("question -> answer")
            pairs = [(ask, {"question": f"{question} {number}"}) for number in range(3)]
            return dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)[0]

    with dspy.context(lm=lm):
        Production(Fan(), name="fan")(question="q")
    assert tracking.flush(60)
    records = lm.ledger.records()
    assert len({record.trace_id for record in records}) == 3
    spans = {
        span.attributes.get("dspy_prod.record_id"): trace.info.trace_id
        for trace in traces_in(uri)
        for span in trace.data.spans
    }
    assert {record.id: record.trace_id for record in records} == {record.id: spans[record.id] for record in records}
    assert_same_costs(uri, records)


def test_mlflow_evaluates_as_without_us_and_shows_the_costs(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """`mlflow.genai.evaluate` needs its traces at once; it gets them, and the attempts follow."""
    from mlflow.genai.scorers import scorer

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    track(autolog=True)
    lm = connect(serve(answer="yes"))

    @scorer
    def spans(trace: mlflow.entities.Trace) -> int:
        return len(trace.data.spans)

    found = mlflow.genai.evaluate(
        data=[{"inputs": {"q": "a"}}, {"inputs": {"q": "b"}}], predict_fn=lambda q: lm(q)[0], scorers=[spans]
    )
    assert found.result_df is not None
    assert len(found.result_df) == 2
    assert found.metrics["spans/mean"] >= 1
    assert tracking.flush(60)
    asked = lm.ledger.records()
    assert len(asked) >= 2
    assert_same_costs(uri, asked)


def test_odd_texts_and_objects_hold_nothing_up(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """What cannot be shown is replaced; its trace and those beside it arrive."""

    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    class Echo(dspy.Module):
        def forward(self, value: object) -> dspy.Prediction:
            if value == "raise":
                raise ValueError("bad \ud800 text")
            return dspy.Prediction(answer="ok")

    track()
    prod = Production(Echo(), name="echo")
    for value in ("lone \ud800 surrogate", 2**70, Odd(), "raise", float("nan"), "fine"):
        try:
            prod(value=value)
        except ValueError:
            assert value == "raise"
    with dspy_prod.call_context(session="s" * 5000, user="u" * 5000):
        Production(Echo(), name="n" * 5000)(value=1)
    assert tracking.flush(60)
    health = dspy_prod.health().tracking
    assert health is not None
    assert (health.exported, health.lost, health.waiting) == (7, 0, 0)
    assert len(traces_in(uri)) == 7


@pytest.mark.parametrize("autolog", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_traces_go_onto_the_run_around_the_calls(
    serve: MakeProvider,
    connect: MakeLM,
    track: Callable[..., None],
    uri: str,
    autolog: bool,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run of another experiment had no traces: they were in the experiment that tracking was given.

    MLflow was told of the file by its place in the working directory, tracking by its whole path.
    """
    folder = database.parent
    monkeypatch.chdir(folder.parent)
    mlflow.set_tracking_uri(f"sqlite:///{folder.name}/{database.name}")
    track(autolog=autolog)
    lm = connect(serve(answer=ANSWER))
    client = MlflowClient(uri)
    other = client.create_experiment("of the run")
    with dspy.context(lm=lm):
        with mlflow.start_run(experiment_id=other) as run:
            dspy.Predict("question -> answer")(question="on the run")
        dspy.Predict("question -> answer")(question="after it")
    assert tracking.flush(60)
    [trace] = client.search_traces(locations=[other])
    assert [one.info.trace_id for one in client.search_traces(locations=[other], run_id=run.info.run_id)] == [
        trace.info.trace_id
    ]
    assert "on the run" in str(trace.data.spans[0].inputs)
    assert len(traces_in(uri)) == 1
    on_it, after = sorted(lm.ledger.records(), key=lambda record: record.started_at)
    assert on_it.trace_id == trace.info.trace_id
    assert trace.info.cost["total_cost"] == pytest.approx(on_it.cost_usd)
    assert traces_in(uri)[0].info.trace_id == after.trace_id


def test_a_trace_goes_to_the_destination_it_was_given(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """`@mlflow.trace(trace_destination=...)` around a call was not heard."""
    mlflow.set_tracking_uri(uri)
    track(autolog=True)
    lm = connect(serve())
    client = MlflowClient(uri)
    other = client.create_experiment("the destination")

    @mlflow.trace(trace_destination=MlflowExperimentLocation(other))
    def asked() -> None:
        lm("q")

    asked()
    assert tracking.flush(60)
    [trace] = client.search_traces(locations=[other])
    assert {"asked", "attempt 1"} <= {span.name for span in trace.data.spans}
    assert traces_in(uri) == []


TRACKED = """
import sys
import dspy, dspy_prod
from dspy_prod import tracking
from dspy_prod.testing import ScriptedEngine

tracking.enable("tracked", tracking_uri=sys.argv[1], autolog=True, content="full")
lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine(sys.argv[2]), store="memory://", cache=False)
with dspy.context(lm=lm):
    dspy.Predict("question -> answer")(question="q")
assert tracking.flush(60)
"""


@pytest.mark.slow
def test_the_default_store_of_mlflow_is_not_touched(uri: str, tmp_path: Path) -> None:
    """An old `mlflow.db` in the working directory was migrated on a caller's thread, and the spans of modules lost."""
    folder = tmp_path / "work"
    folder.mkdir()
    old = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(old)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR)")
        connection.execute("INSERT INTO alembic_version VALUES ('0a8213491aaa')")
        connection.commit()
    before = old.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, uri, ANSWER], cwd=folder, capture_output=True, text=True, timeout=120,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
            "PYTHONPATH": str(Path(dspy_prod.__file__).parent.parent),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir() if "mlflow" in path.name] == ["mlflow.db"]
    assert old.read_bytes() == before
    [trace] = traces_in(uri)
    assert "Predict.forward" in {span.name for span in trace.data.spans}
