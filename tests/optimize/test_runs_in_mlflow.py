"""An optimization in a real MLflow store: runs, figures, a published version; and what it costs when MLflow is down."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient

from dspy_prod import registry, tracking
from dspy_prod.errors import ConfigError
from dspy_prod.optimize import figures
from dspy_prod.optimize.candidates import Candidate, Progress
from dspy_prod.optimize.mlflow_messages import content
from dspy_prod.optimize.mlflow_runs import PATIENCE, InMlflow, watcher
from dspy_prod.optimize.publishing import publish_best, publish_found
from dspy_prod.policies.answers import SHOWS
from dspy_prod.registry.errors import RegistryUnavailableError
from dspy_prod.tracking.records import KEY, Records
from tests.optimize.found import best_of, found, program, report
from tests.ports import free_port

EXPERIMENT = "optimized"

pytestmark = pytest.mark.usefixtures("quick_exporters")


@pytest.fixture
def uri(schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh store, whose artifacts are in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{shutil.copy(schema, tmp_path / 'mlflow.db')}"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    """MLflow's own client of it."""
    return MlflowClient(uri)


def progress(candidates: tuple[Candidate, ...], **given: Any) -> Progress:
    """How far a run with these candidates is."""
    scored = [one for one in candidates if one.score is not None]
    whole: dict[str, Any] = {
        "run": "triage",
        "optimizer": "MIPROv2",
        "phase": "search",
        "seconds": 3.0,
        "spent_usd": sum(one.cost_usd for one in candidates),
        "calls": 60 * len(candidates),
        "tokens": sum(one.tokens for one in candidates),
        "candidates": candidates,
        "best": best_of(candidates) if scored else None,
        "baseline": candidates[0].score if candidates else None,
        "budget_usd": 0.5,
    }
    return Progress(**{**whole, **given})


def run_through(watching: InMlflow, candidates: tuple[Candidate, ...], **given: Any) -> None:
    """Have a run watched, candidate by candidate."""
    watching.begin(progress(()))
    for count in range(1, len(candidates) + 1):
        watching.update(progress(candidates[:count]))
    told = report(candidates, experiment_run=watching.wait_for_id(60.0), **given)
    watching.end(progress(candidates, stopped_by=told.stopped_by, phase="ended"), told)


def runs_of(client: MlflowClient) -> tuple[Any, dict[str, Any]]:
    """The run of the compile, and those below it by candidate."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = {run.data.tags["dspy_prod.candidate"]: run for run in runs if run is not parent}
    assert len(below) == len(runs) - 1
    assert {run.data.tags["mlflow.parentRunId"] for run in below.values()} == {parent.info.run_id}
    return parent, below


def artifact(client: MlflowClient, run: Any, path: str, folder: Path) -> Path:
    """The file of an artifact."""
    return Path(client.download_artifacts(run.info.run_id, path, str(folder)))


def test_a_compile_is_a_run_and_each_candidate_one_below_it(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """Scores, costs, tokens and latency are metrics, prompts parameters and artifacts, lineage and status tags."""
    candidates = found()
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT, settings={"auto": "light"})
    assert watching is not None
    run_through(watching, candidates)
    assert watching.wait(60.0)
    parent, below = runs_of(client)
    assert parent.info.run_name == "triage"
    assert parent.info.status == "FINISHED"
    assert parent.info.run_id == watching.run_id
    assert parent.data.params["budget_usd"] == "0.5"
    assert parent.data.params["auto"] == "light"
    best = best_of(candidates)
    assert parent.data.metrics["best_score"] == pytest.approx(best.score, abs=1e-4)
    assert set(below) == {str(one.index) for one in candidates if one.status != "minibatch"}
    for one in candidates:
        if one.status == "minibatch":
            continue
        run = below[str(one.index)]
        assert run.info.run_name == f"#{one.index} {one.origin}"
        assert run.info.status == ("FINISHED" if one.status == "complete" else "KILLED")
        assert run.data.metrics.get("score") == (None if one.score is None else pytest.approx(one.score, abs=1e-4))
        assert run.data.metrics["cost_usd"] == pytest.approx(one.cost_usd, abs=1e-9)
        assert run.data.metrics["tokens"] == one.tokens
        assert run.data.metrics["latency_s"] == pytest.approx(one.latency)
        assert run.data.params["prompt"] == one.prompts["classify"]
        assert run.data.tags["dspy_prod.parents"] == " ".join(f"#{up}" for up in one.parents)
        assert run.data.tags.get("dspy_prod.best") == ("true" if one.index == best.index else None)
    text = artifact(client, below["1"], "prompts.md", tmp_path).read_text()
    assert candidates[1].prompts["classify"] in text
    history = client.get_metric_history(parent.info.run_id, "best_score")
    values = [point.value for point in sorted(history, key=lambda point: point.step)]
    assert values == sorted(values), "the best score never falls"
    assert len({point.step for point in history}) == len(history)


@pytest.mark.slow
def test_minibatches_figures_and_the_report_are_artifacts(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """What only saw minibatches is a table; both figures are pictures; the report is there as JSON, HTML and text."""
    candidates = found()
    candidates = (replace(candidates[0], minibatches=((3, 1 / 3),)), *candidates[1:])
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert watching is not None
    run_through(watching, candidates)
    assert watching.wait(60.0)
    parent, _ = runs_of(client)
    table = json.loads(artifact(client, parent, "minibatches.json", tmp_path).read_text())
    asked = [one for one in candidates if one.minibatches]
    rejected = [one for one in asked if one.status == "minibatch"]
    shown = [*rejected, *(one for one in asked if one not in rejected)]
    assert [one.index for one in asked] != [one.index for one in shown]
    assert [row[0] for row in table["data"]] == [f"#{one.index}" for one in shown]
    assert [row[-1] for row in table["data"]] == [round(one.minibatches[0][1], 4) for one in shown]
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"])[0]["path"] == "minibatches.json"
    for path in ("score_against_dollars.png", "quality_against_cost.png"):
        assert artifact(client, parent, path, tmp_path).read_bytes().startswith(b"\x89PNG")
    told = json.loads(artifact(client, parent, "report.json", tmp_path).read_text())
    assert told["best"] == best_of(candidates).index
    assert "<table" in artifact(client, parent, "report.html", tmp_path).read_text()


def test_a_resumed_run_goes_on_in_the_same_runs(uri: str, client: MlflowClient) -> None:
    """After a stop the second part finds the run and its candidates, and adds the new ones."""
    candidates = found()
    first = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert first is not None
    run_through(first, candidates[:6])
    assert first.wait(60.0)
    second = watcher(tracking_uri=uri, experiment=EXPERIMENT, resumed=True)
    assert second is not None
    run_through(second, candidates)
    assert second.wait(60.0)
    parent, below = runs_of(client)
    assert second.run_id == first.run_id == parent.info.run_id
    assert set(below) == {str(one.index) for one in candidates if one.status != "minibatch"}


@pytest.mark.slow
def test_a_resumed_run_has_what_both_parts_cost(uri: str, client: MlflowClient) -> None:
    """What is replayed for nothing keeps its price, its time and its end; the run's figures are the last part's."""
    candidates = found(4)
    first = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert first is not None
    run_through(first, candidates)
    assert first.wait(60.0)
    _, before = runs_of(client)
    replayed = tuple(replace(one, cost_usd=0.0, tokens=0, latency=None) for one in candidates[:4])
    again = (*replayed, replace(candidates[4], status="complete", score=0.99, cost_usd=0.5, tokens=7))
    second = watcher(tracking_uri=uri, experiment=EXPERIMENT, resumed=True)
    assert second is not None
    second.begin(progress((), budget_usd=2.0))
    second.update(progress(again))  # all at once: nothing is waited for
    second.end(progress(again, spent_usd=1.5, budget_usd=2.0, stopped_by="completed"), report(again, spent_usd=1.5))
    assert second.wait(60.0)
    parent, below = runs_of(client)
    for one in candidates[:3]:
        run, was = below[str(one.index)], before[str(one.index)]
        assert run.data.metrics["cost_usd"] == pytest.approx(one.cost_usd, abs=1e-9)
        assert run.data.metrics["tokens"] == one.tokens
        assert run.data.metrics["latency_s"] == pytest.approx(one.latency)
        assert (run.info.start_time, run.info.end_time) == (was.info.start_time, was.info.end_time)
    assert below["4"].data.metrics["cost_usd"] == pytest.approx(0.5)
    assert parent.data.metrics["spent_usd"] == pytest.approx(1.5)
    assert parent.data.metrics["best_score"] == pytest.approx(0.99)
    assert parent.data.params["budget_usd"] == "0.5"
    assert parent.data.tags["dspy_prod.budget_usd"] == "2.0"


@pytest.mark.slow
def test_a_part_that_two_processes_wrote_is_added_once(uri: str, client: MlflowClient) -> None:
    """The process that writes may die and be replaced, which then does not know what was added."""
    place = client.create_experiment(EXPERIMENT)
    earlier = client.create_run(place, tags={"dspy_prod.state": "s", KEY: "part 1/s"}).info.run_id
    client.log_metric(earlier, "cost_usd", 1.0)
    message = {
        "run": "part 2/s", "continues": {"dspy_prod.state": "s"}, "adds": ["cost_usd"], "status": "FINISHED",
        "metrics": [("cost_usd", 0.25, 0, time.time_ns() // 1_000_000 + 1)],
    }  # fmt: skip
    for known in ({}, {"part 2/s": earlier}, {}):
        Records(uri, EXPERIMENT, known).write(message)
        assert client.get_run(earlier).data.metrics["cost_usd"] == 1.25


@pytest.mark.slow
def test_more_parameters_than_mlflow_takes_at_once(uri: str, client: MlflowClient) -> None:
    """A program of many predictors has the prompt of each."""
    many = replace(found(0)[0], prompts={f"part[{n}].predict": f"prompt {n}" for n in range(130)})
    Records(uri, EXPERIMENT, {}).write({"run": "k", **content(many, whole=True)})
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert len(run.data.params) == 131
    assert run.data.params["prompt.part_129_.predict"] == "prompt 129"


@pytest.mark.slow
def test_another_run_of_the_same_name_is_another_run(uri: str, client: MlflowClient) -> None:
    """What is not resumed begins anew."""
    for _ in range(2):
        watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
        assert watching is not None
        run_through(watching, found(2))
        assert watching.wait(60.0)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 2


@pytest.mark.slow
def test_it_is_part_of_the_run_that_is_active(uri: str, client: MlflowClient) -> None:
    """Who calls `compile` within `mlflow.start_run()` finds the optimization below that run."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run() as above:
        watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
        assert watching is not None
        run_through(watching, found(2))
    assert watching.wait(60.0)
    assert watching.run_id is not None
    assert client.get_run(watching.run_id).data.tags["mlflow.parentRunId"] == above.info.run_id


def test_without_content_no_prompt_reaches_mlflow(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """`tracking.enable(content="off")` holds for prompts and demonstrations of candidates too."""
    tracking.enable(EXPERIMENT, tracking_uri=uri, content="off")
    try:
        watching = watcher()
        assert watching is not None
        run_through(watching, found(3), warnings=(f"6 calls differ. {SHOWS}'Take care'",))
        assert watching.wait(60.0)
    finally:
        tracking.disable()
    parent, below = runs_of(client)
    for run in below.values():
        assert set(run.data.params) == {"origin"}
        assert client.list_artifacts(run.info.run_id) == []
    (tmp_path / "kept").mkdir()
    kept = artifact(client, parent, "", tmp_path / "kept")
    texts = [path.read_text() for path in kept.iterdir() if path.suffix != ".png"]
    assert len(texts) == 4
    assert not [text for text in texts if "Take care" in text], "the report's candidates had their prompts"


def test_secrets_in_a_prompt_stay_here(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """Every text passes the same door as logs and traces."""
    leaky = replace(found(1)[0], prompts={"classify": "Write to ann.smith@example.com about it."})
    tracking.enable(EXPERIMENT, tracking_uri=uri)
    try:
        watching = watcher()
        assert watching is not None
        run_through(watching, (leaky,))
        assert watching.wait(60.0)
    finally:
        tracking.disable()
    _, below = runs_of(client)
    assert "ann.smith" not in below["0"].data.params["prompt"]
    assert "ann.smith" not in artifact(client, below["0"], "prompts.md", tmp_path).read_text()


@pytest.mark.slow
def test_secrets_in_names_stay_here_and_markdown_is_shown_as_it_is(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    """A run's name and tags pass the door too; what an error says does not become a picture in its description."""
    told = report(found(1), run="for ann.smith@example.com", detail="![x](http://there/x.png)\n# <b>bad</b>")
    tracking.enable(EXPERIMENT, tracking_uri=uri)
    try:
        watching = watcher()
        assert watching is not None
        watching.begin(progress((), run=told.run))
        watching.end(progress(told.candidates, run=told.run, stopped_by="budget"), told)
        assert watching.wait(60.0)
    finally:
        tracking.disable()
    parent, _ = runs_of(client)
    assert "ann.smith" not in str((parent.info.run_name, parent.data.tags, parent.data.params))
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("- **MIPROv2**, ended: **budget**, ")
    assert r"\!\[x\](http://there/x.png) \# \<b\>bad\</b\>" in note


def test_a_candidate_ends_when_it_is_decided_and_its_figures_stand_at_one_step(uri: str, client: MlflowClient) -> None:
    """Its duration was that of the run; where its number changed, what was told first went on to be shown."""
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert watching is not None
    given, _, other, *_ = found(4)
    early = replace(other, index=7, cost_usd=0.001)
    watching.begin(progress((given,)))
    watching.update(progress((given, early)))
    assert watching.wait_for_id(60.0)
    decided = time.time() * 1000
    time.sleep(0.5)
    merged = replace(other, parents=(0, 1), cost_usd=0.002)
    watching.end(progress((given, merged), stopped_by="completed"), report((given, merged)))
    assert watching.wait(60.0)
    _, below = runs_of(client)
    assert below["2"].info.end_time <= decided
    assert below["2"].data.metrics["cost_usd"] == 0.002
    assert below["2"].data.tags["dspy_prod.parents"] == "#0 #1"
    history = client.get_metric_history(below["2"].info.run_id, "cost_usd")
    assert {point.step for point in history} == {0}


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the end of a compile waits, as it does where matplotlib is imported first."""
    real = figures.png
    monkeypatch.setattr(figures, "png", lambda figure: (time.sleep(PATIENCE + 0.5), real(figure))[1])


def test_a_flush_waits_for_what_is_being_made(uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `tracking.flush()` waits for traces and for candidates, also for those figures that are not drawn yet."""
    slowly(monkeypatch)
    tracking.enable(EXPERIMENT, tracking_uri=uri)
    try:
        watching = watcher()
        assert watching is not None
        run_through(watching, found(2))
        assert tracking.flush(60.0)
        parent, _ = runs_of(client)
        assert parent.info.status == "FINISHED"
        assert {"quality_against_cost.png"} <= {one.path for one in client.list_artifacts(parent.info.run_id)}
    finally:
        tracking.disable()


def test_the_end_of_the_program_waits_for_what_is_being_made(
    uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that ends after its compile left a run that was running for ever."""
    slowly(monkeypatch)
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert watching is not None
    run_through(watching, found(2))
    watching._runs.close()
    parent, _ = runs_of(client)
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_datasets_are_inputs_of_the_run(uri: str, client: MlflowClient) -> None:
    """Train and selection set are named with size and digest."""
    examples = [dspy.Example(message=f"m{n}", category="billing").with_inputs("message") for n in range(4)]
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT, datasets={"trainset": examples, "valset": examples[:2]})
    assert watching is not None
    run_through(watching, found(1))
    assert watching.wait(60.0)
    parent, _ = runs_of(client)
    names = {one.dataset.name: one.dataset.digest for one in parent.inputs.dataset_inputs}
    assert set(names) == {"trainset (4 examples)", "valset (2 examples)"}
    assert len(set(names.values())) == 2


def test_the_best_program_is_published_and_linked(uri: str, client: MlflowClient) -> None:
    """The version has the scores, the dataset's digest and the run; the run names the version."""
    candidates = found(3)
    examples = [dspy.Example(message="m", category="billing").with_inputs("message")]
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert watching is not None
    run_through(watching, candidates)
    assert watching.wait(60.0)
    told = report(candidates, experiment_run=None)
    best = program(best_of(candidates))
    version = publish_best(told, best, "triage", dataset=examples, tracking_uri=uri, watching=watching)
    assert version.version == 1
    parent, _ = runs_of(client)
    assert parent.data.tags["dspy_prod.published"] == "triage/1"
    prompt = client.get_prompt_version("triage", "1")
    assert prompt.tags["dspy_prod_optimization"] == "triage"
    assert prompt.tags["dspy_prod_dataset"].endswith("(1 examples)")
    assert version.metrics["score"] == told.best_score


def test_a_server_that_is_down_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """At a closed port nothing waits but the end, for two seconds; nothing is raised; the log says it once."""
    watching = watcher(tracking_uri=f"http://127.0.0.1:{free_port()}", experiment=EXPERIMENT)
    assert watching is not None
    candidates = found()
    with contextlib.closing(watching._runs):  # else whoever flushes after this test waits for them
        began = time.monotonic()
        watching.begin(progress(()))
        for count in range(1, len(candidates) + 1):
            watching.update(progress(candidates[:count]))
        assert time.monotonic() - began < 1.0
        began = time.monotonic()
        assert watching.wait_for_id() is None
        watching.end(progress(candidates, stopped_by="completed"), report(candidates))
        assert time.monotonic() - began < PATIENCE + 1.0
        assert watching.run_id is None
        assert not watching.wait(15.0)
    told = [record.getMessage() for record in caplog.records if "MLflow at" in record.getMessage()]
    assert len(told) == 1


def test_a_program_that_cannot_be_published_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a compile that is a line in the log, which says how to publish it later."""
    nobody = f"http://127.0.0.1:{free_port()}"
    assert publish_found(report(), program(best_of(found())), "triage", tracking_uri=nobody) is None
    assert any("was not published" in record.getMessage() for record in caplog.records)


def test_whatever_keeps_a_program_from_being_published(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compile that was paid for does not end with an error of the registry's; what is published is called so."""
    best = program(best_of(found(2)))
    monkeypatch.setattr(registry, "publish", lambda *_, **__: 1 / 0)
    assert publish_found(report(found(2)), best, "triage", tracking_uri=uri) is None
    assert "division by zero" in caplog.text
    monkeypatch.undo()
    caplog.clear()

    def refused(*_: Any) -> None:
        raise RegistryUnavailableError("away")

    monkeypatch.setattr("dspy_prod.optimize.publishing._named_after", refused)
    version = publish_found(report(found(2)), best, "triage", tracking_uri=uri)
    assert version is not None
    assert version.version == 1
    assert "triage/1 is published, but says nothing of run 'triage': away" in caplog.text


def test_a_version_that_is_linked_to_no_run_says_so(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow may have no run yet, where it is slow; the version is there all the same."""
    watching = watcher(tracking_uri=uri, experiment=EXPERIMENT)
    assert watching is not None
    monkeypatch.setattr(watching, "wait_for_id", lambda seconds: None)
    best = program(best_of(found(2)))
    assert publish_found(report(found(2)), best, "triage", tracking_uri=uri, watching=watching) is not None
    assert "triage/1 is published, but linked to no MLflow run" in caplog.text


def test_without_tracking_there_is_no_watcher() -> None:
    """`track=True` says what is missing; by default nobody watches."""
    tracking.disable()
    assert watcher() is None
    assert watcher(track=False, tracking_uri="sqlite:///x.db") is None
    with pytest.raises(ConfigError, match=r"track=True.*tracking\.enable"):
        watcher(track=True)
