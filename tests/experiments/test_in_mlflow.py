"""An experiment in MLflow: what people say of traces counts, and each variant has a run with its figures and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient
from mlflow.entities import AssessmentSource, Feedback
from mlflow.tracing.client import TracingClient

import dspy_prod
from dspy_prod import ConfigError, Experiment, Judge, Metric, call_context, call_report, tracking
from dspy_prod.experiments import feedback as feedback_module
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, Provider
from dspy_prod.testing.faults import Status
from tests.experiments.conftest import Triage
from tests.ports import free_port
from tests.registry.processes import MlflowServer, wait_until
from tests.tracking.conftest import EXPERIMENT, database, track, uri

__all__ = ["database", "track", "uri"]

Asked = Callable[..., dspy_prod.LM]
RESOLVED = Metric("resolved", margin=0.02, window=3600)
ANN = AssessmentSource("HUMAN", "ann")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


def two(store: Any, *metrics: Metric, **more: Any) -> Experiment:
    variants = {"control": Triage(), "cot": Triage("Think first.")}
    return Experiment("triage-cot", variants=variants, store=store, metrics=metrics or [RESOLVED], **more)


def ask(exp: Experiment, unit: str, message: str = "hi") -> Any:
    with call_context(user=unit, session=f"s-{unit}", tenant="acme"):
        return call_report(exp(message=message))


def runs_of(uri: str) -> dict[str, Any]:
    """The runs of MLflow's by variant."""
    client = MlflowClient(uri)
    place = client.get_experiment_by_name(EXPERIMENT)
    found = [] if place is None else client.search_runs([place.experiment_id])
    by_variant = {run.data.tags["dspy_prod.variant"]: run for run in found}
    assert len(by_variant) == len(found)
    return by_variant


def traces_of(uri: str, run: Any) -> dict[str, Any]:
    found = MlflowClient(uri).search_traces(
        locations=[run.info.experiment_id], run_id=run.info.run_id, max_results=500, include_spans=False
    )
    return {trace.info.trace_id: trace for trace in found}


def say(uri: str, trace: str, value: Any, name: str = "resolved", **more: Any) -> str:
    """Leave feedback on a trace, as MLflow's page does; its id."""
    return str(TracingClient(uri).log_assessment(trace, Feedback(name, value, source=ANN, **more)).assessment_id)


def read(exp: Experiment) -> int:
    """Have the controller read feedback now; how many outcomes that made."""
    controller = exp._works.opened.controller
    controller._feedback._again_at, controller._feedback._waits = 0.0, 60.0
    trial = exp._works.trials.trial(exp.name)
    assert trial is not None
    return controller._feedback.look(trial)


def means(exp: Experiment, metric: str = "resolved") -> dict[str, float | None]:
    return {unit.unit: unit.values.mean for unit in exp._works.trials.matured(exp.name, metric)}


# -- by trace ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "unit", ["user", *(pytest.param(unit, marks=pytest.mark.slow) for unit in ("session", "tenant"))]
)
def test_a_value_of_a_trace_is_its_caller_s(unit: Any, asked: Asked, track: Callable[..., None]) -> None:
    """Also where another process was called, by its ledger; with and without MLflow's prefix."""
    track()
    clock = FakeClock(time.time())
    store = MemoryStore(clock=clock)
    lm = asked()
    own = dspy_prod.LM(lm.model, api_base=lm.kwargs["api_base"], api_key="k", store=store, cache=False)
    with dspy.context(lm=own):
        exp = two(store, unit=unit)
        first, second = ask(exp, "u1", "a"), ask(exp, "u1", "b")
        exp.record(trace=first.trace_id, resolved=True)
        elsewhere = two(store, unit=unit)
        elsewhere.record(trace=str(second.trace_id).removeprefix("tr-"), resolved=0)
    clock.advance(3_700.0)
    name = {"user": "u1", "session": "s-u1", "tenant": "acme"}[unit]
    assert means(exp) == {name: 0.5}, "each trace is a value of its own"


def test_a_trace_of_no_call_of_it_is_an_error(asked: Asked, store: str, track: Callable[..., None]) -> None:
    track()
    lm = asked()
    exp = two(store)
    with call_context(user="u1"):
        lm("not in the experiment")
    [record] = lm.ledger.records(limit=1)
    for trace in ("tr-unknown", str(record.trace_id)):
        with pytest.raises(ConfigError, match="no call of it has the trace"):
            exp.record(trace=trace, resolved=1)
    for whose in ({}, {"unit": "u1", "trace": "tr-1"}):
        with pytest.raises(ConfigError, match="by a unit or by trace="):
            exp.record(**whose, resolved=1)


# -- what people say ---------------------------------------------------------------------------------------------------
def test_feedback_in_mlflow_is_an_outcome_once_and_corrections_hold(
    uri: str, track: Callable[..., None], asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    """Said anew or changed, it is the same value; what is neither true nor false nor a number is refused aloud."""
    track()
    clock = FakeClock(time.time())
    store = MemoryStore(clock=clock)
    asked(cache=False)
    exp = two(store)
    traces = [str(ask(exp, f"u{number}", str(number)).trace_id) for number in range(6)]
    assert tracking.flush(60.0)
    changed, overridden = say(uri, traces[0], True), say(uri, traces[1], False)
    say(uri, traces[2], 1)
    say(uri, traces[3], "yes")
    say(uri, traces[4], True, name="something else")
    exp.record(trace=traces[5], resolved=True)
    assert tracking.flush(60.0)
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        assert read(exp) == 3
        assert read(exp) == 0, "what is known is no news, and what we told ourselves is no news either"
    assert caplog.text.count("'yes' is neither a boolean nor a number") == 1
    client = TracingClient(uri)
    client.update_assessment(traces[0], changed, Feedback("resolved", False, source=ANN))
    client.log_assessment(traces[1], Feedback("resolved", True, source=ANN, overrides=overridden))
    assert read(exp) == 2
    assert read(two(store)) == 3, "another controller reads it again, to no effect"
    clock.advance(3_700.0)
    assert means(exp) == {"u0": 0.0, "u1": 1.0, "u2": 1.0, "u3": None, "u4": None, "u5": 1.0}


@pytest.mark.slow
def test_feedback_is_read_without_tracking_where_the_experiment_says(
    uri: str, track: Callable[..., None], asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    track()
    asked(cache=False)
    exp = two(store)
    trace = str(ask(exp, "u1").trace_id)
    assert tracking.flush(60.0)
    say(uri, trace, True)
    tracking.disable()
    assert read(exp) == 0, "nobody is asked"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    assert read(two(store, tracking_uri=uri)) == 1


@pytest.mark.slow
def test_much_feedback_is_read_in_parts(
    uri: str, track: Callable[..., None], asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page a look, where reading takes long; all of it in the end."""
    track()
    asked(cache=False)
    exp = two(store)
    traces = [str(ask(exp, f"u{number}", str(number)).trace_id) for number in range(7)]
    assert tracking.flush(60.0)
    for trace in traces:
        say(uri, trace, True)
    from dspy_prod.tracking import assessments

    monkeypatch.setattr(assessments, "_PAGE", 3)
    monkeypatch.setattr(assessments, "PATIENCE", -1.0)
    client, page, found = MlflowClient(uri), None, set()
    place = client.get_experiment_by_name(EXPERIMENT).experiment_id
    for _ in range(4):
        asked_for = {"names": ["resolved"], "tags": {"dspy_prod.experiment": exp.name}, "since": 0, "page": page}
        told = assessments.assessments(client, place, asked_for)
        found |= {one["trace"] for one in told["found"]}
        page = told["page"]
        if page is None:
            break
    assert found == set(traces)
    assert page is None


# -- a run of each variant ---------------------------------------------------------------------------------------------
def test_each_variant_has_a_run_with_its_figures_over_time_and_its_traces(
    uri: str, track: Callable[..., None], asked: Asked, store: str
) -> None:
    track()
    asked(cache=False)
    metrics = Metric("resolved", margin=0.02), Metric("quality", judge="untrusted")
    exp = two(store, *metrics, judges={"quality": Judge(lambda e, p: 0.5, share=1.0)})
    of: dict[str, set[str]] = {"control": set(), "cot": set()}
    for number in range(30):
        report = ask(exp, f"u{number}", str(number))
        of[str(report.variant)].add(str(report.trace_id))
        exp.record(trace=report.trace_id, resolved=number % 2)
        if number % 10 == 9:
            assert exp._works.judges is not None
            assert exp._works.judges.wait()
            exp.step()
    with call_context(user="qa"):
        two(store, *metrics, judges={"quality": Judge(lambda e, p: 0.5, share=1.0)})
    assert tracking.flush(60.0)
    exp.step()
    runs = runs_of(uri)
    assert set(runs) == {"control", "cot"}
    for variant, run in runs.items():
        linked = traces_of(uri, run)
        assert set(linked) == of[variant], "the traces of its calls, and no others"
        assert (run.info.status, run.data.tags["dspy_prod.experiment"]) == ("RUNNING", "triage-cot")
        assert "of the traces that the page has loaded" in run.data.tags["mlflow.note.content"]
        assert run.data.metrics["users"] == len(linked)
        assert run.data.metrics["quality"] == 0.5
        assert run.data.metrics["error_rate"] == 0.0
        assert 0 < run.data.metrics["usd_per_1000_calls"] < 1
        assert 0 < run.data.metrics["latency_p50_s"] <= run.data.metrics["latency_p95_s"]
        assert ("resolved/e_better" in run.data.metrics) == (variant == "cot")
        history = MlflowClient(uri).get_metric_history(run.info.run_id, "users")
        assert sorted(one.step for one in history) == [10, 20, 30]
        told = {(one.name, one.source.source_type) for each in linked.values() for one in each.info.assessments}
        assert told == {("resolved", "CODE"), ("quality", "LLM_JUDGE")}
        assert {type(one.value) for each in linked.values() for one in each.info.assessments} == {bool, float}
    url = exp.scorecard().url
    control, cot = (runs[variant].info for variant in ("control", "cot"))
    assert url == (
        f"http://127.0.0.1:5000/#/experiments/{cot.experiment_id}/evaluation-runs"
        f"?selectedRunUuid={cot.run_id}&compareToRunUuid={control.run_id}"
    )
    tracking.disable()
    assert two(store, *metrics, judges={"quality": Judge(max, share=1.0)}).scorecard().url == url, "any process knows"


@pytest.mark.slow
def test_runs_end_with_the_experiment_and_go_on_with_it(
    uri: str, track: Callable[..., None], asked: Asked, store: str, tmp_path: Path
) -> None:
    """Also by another process; one that only looks at what is over opens nothing again."""
    track()
    asked()
    exp = two(store)

    def states() -> set[str]:
        exp.step()
        assert tracking.flush(60.0)
        return {run.info.status for run in runs_of(uri).values()}

    ask(exp, "u1")
    assert states() == {"RUNNING"}
    exp.pause()
    assert states() == {"FINISHED"}
    exp.resume()
    tracking.disable()
    track()
    assert states() == {"RUNNING"}
    exp.stop()
    assert states() == {"FINISHED"}
    for run in runs_of(uri).values():
        page = MlflowClient(uri).download_artifacts(run.info.run_id, "scorecard.html", str(tmp_path))
        assert "stopped" in Path(page).read_text(encoding="utf-8")
    ends = {run.info.end_time for run in runs_of(uri).values()}
    tracking.disable()
    track()
    exp = two(store)
    assert states() == {"FINISHED"}
    assert {run.data.tags["dspy_prod.state"] for run in runs_of(uri).values()} == {"stopped"}
    assert {run.info.end_time for run in runs_of(uri).values()} == ends, "nothing of it is done again"


def test_runs_end_with_what_a_person_does_and_wait_for_no_look(
    uri: str, track: Callable[..., None], asked: Asked, store: str
) -> None:
    """Somebody who stops an experiment looks at it no more."""

    def told() -> set[tuple[str, str]]:
        assert tracking.flush(60.0)
        return {(run.info.status, run.data.tags["dspy_prod.state"]) for run in runs_of(uri).values()}

    track()
    asked()
    exp = two(store)
    for number in range(4):
        ask(exp, f"u{number}")
    exp.step()
    assert told() == {("RUNNING", "running")}
    exp.pause()
    assert told() == {("FINISHED", "paused")}
    exp.resume()
    assert told() == {("RUNNING", "running")}
    exp.promote("cot", force=True, reason="the shop wants it")
    assert told() == {("FINISHED", "decided")}


@pytest.mark.parametrize("where", ["here", "elsewhere", "beside a controller"])
def test_runs_end_when_their_experiment_is_removed(
    where: str, uri: str, track: Callable[..., None], asked: Asked, store: str
) -> None:
    """Also by a process that told nothing of them itself, and by the next look of one that did."""
    track()
    asked()
    exp = two(store)
    ask(exp, "u1")
    exp.step()
    assert tracking.flush(60.0)
    exp.step()  # the audit knows the runs now
    if where == "beside a controller":
        exp._works.trials.remove(exp.name)
        exp._works.opened.controller.step()
    else:
        (exp if where == "here" else two(store)).remove(force=True)
    assert tracking.flush(60.0)
    assert {(run.info.status, run.data.tags["dspy_prod.state"]) for run in runs_of(uri).values()} == {
        ("FINISHED", "removed")
    }
    assert len(runs_of(uri)) == 2


@pytest.mark.parametrize("by", ["the one that told", "another object", "beside a controller"])
@pytest.mark.parametrize("place", ["another database", "another experiment"])
def test_a_removal_makes_no_runs_in_another_mlflow(
    by: str, place: str, uri: str, tmp_path: Path, track: Callable[..., None], asked: Asked, store: str
) -> None:
    """It made two there, at once "removed", while those that there are went on."""
    track()
    asked()
    exp = two(store)
    ask(exp, "u1")
    exp.step()
    assert tracking.flush(60.0)
    exp.step()  # the audit knows the runs now
    tracking.disable()
    other = f"sqlite:///{tmp_path}/other.db" if place == "another database" else uri
    track(tracking_uri=other, experiment_name="another")
    with call_context(user="u2"):
        exp.variants["control"].program(message="hi")  # a trace, so that its place is known
    assert tracking.flush(60.0)
    if by == "beside a controller":
        exp._works.trials.remove(exp.name)
        exp._works.opened.controller.step()
    else:
        (exp if by == "the one that told" else two(store)).remove(force=True)
    assert tracking.flush(60.0)
    client = MlflowClient(other)
    there = client.get_experiment_by_name("another")
    assert there is None or client.search_runs([there.experiment_id]) == []
    assert {run.info.status for run in runs_of(uri).values()} == {"RUNNING"}


def test_nothing_waits_for_mlflow_and_everything_follows(
    uri: str, database: Path, track: Callable[..., None], provider: Provider, asked: Asked, store: str
) -> None:
    """While MLflow is down: the same decision as ever, calls and looks as fast; then runs, links and feedback."""
    server = MlflowServer(database)
    track(tracking_uri=server.uri)
    asked(cache=False)
    provider.faults = lambda call: Status(500) if "Think first." in str(call.body) else None
    exp = two(store)
    wait_until(lambda: tracking.status().failing, 60.0)  # type: ignore[union-attr]
    of: dict[str, set[str]] = {"control": set(), "cot": set()}
    slowest, failed = 0.0, 0
    for number in range(200):
        began = time.monotonic()
        try:
            report = ask(exp, f"u{number}", str(number))
            of[str(report.variant)].add(str(report.trace_id))
            exp.record(trace=report.trace_id, resolved=True)
        except dspy.LMServerError:
            failed += 1
        if number % 10 == 9:
            began_looking = time.monotonic()
            card = exp.step()
            slowest = max(slowest, time.monotonic() - began_looking)
            if card.state == "decided":
                break
        assert time.monotonic() - began < 5.0
    assert slowest < feedback_module.FIRST
    assert (card.state, card.serves) == ("decided", "control")
    assert card.url is None
    assert failed == card.users["cot"]
    try:
        server.start()
        assert tracking.flush(100.0)
        exp.step()
        runs = runs_of(uri)
        assert set(traces_of(uri, runs["control"])) == of["control"]
        assert len(traces_of(uri, runs["cot"])) == card.users["cot"]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert runs["cot"].data.metrics["error_rate"] == 1.0
        said = [one.value for each in traces_of(uri, runs["control"]).values() for one in each.info.assessments]
        assert said == [True] * len(of["control"])
        assert f"{server.uri}/#/experiments/" in str(exp.scorecard().url)
    finally:
        tracking.disable()
        server.kill()


def test_a_call_in_nested_experiments_is_in_both(
    uri: str, track: Callable[..., None], asked: Asked, store: str
) -> None:
    """Its trace is on the runs of both variants; what is said of it counts in both."""
    track()
    asked(cache=False)
    inner = two(store)
    outer = Experiment("outer", variants={"a": inner, "b": Triage()}, store=store, metrics=[RESOLVED],
                       weights={"a": 1000, "b": 1}, guardrails=())  # fmt: skip
    trace = str(ask(outer, "u1").trace_id)
    outer.step(), inner.step()
    assert tracking.flush(60.0)
    client = MlflowClient(uri)
    place = client.get_experiment_by_name(EXPERIMENT).experiment_id
    linked = {run.data.tags["dspy_prod.experiment"] for run in client.search_runs([place])
              if trace in traces_of(uri, run)}  # fmt: skip
    assert linked == {"outer", "triage-cot"}
    say(uri, trace, True)
    assert (read(outer), read(inner)) == (1, 1)
    for exp in (two(store), Experiment("outer", variants={"a": two(store), "b": Triage()}, store=store,
                                       metrics=[RESOLVED], weights={"a": 1000, "b": 1}, guardrails=())):  # fmt: skip
        exp.record(trace=trace, resolved=False)


@pytest.mark.parametrize("sample", [pytest.param(1.0, marks=pytest.mark.slow), 0.0])
def test_what_was_not_drawn_or_not_kept_is_not_linked(
    sample: float, uri: str, track: Callable[..., None], asked: Asked, store: str
) -> None:
    """Overrides, calls of nobody; and traces that sampling left out."""
    track(sample=sample)
    asked(cache=False)
    exp = two(store, overrides={"qa": "cot"})
    ask(exp, "qa", "override")
    exp(message="of nobody")
    drawn = str(ask(exp, "u1", "drawn").trace_id)
    exp.record(trace=drawn, resolved=True)
    exp.step()
    assert tracking.flush(60.0)
    health = tracking.status()
    assert health is not None
    assert (health.messages_waiting, health.messages_lost) == (0, 0), "nobody looks for a trace that was left out"
    linked = {trace for run in runs_of(uri).values() for trace in traces_of(uri, run)}
    assert linked == ({drawn} if sample else set())


# -- before anybody is exposed -----------------------------------------------------------------------------------------
def test_an_evaluation_has_a_run_of_each_variant_and_the_page_that_compares_them(
    uri: str, track: Callable[..., None], asked: Asked, provider: Provider, store: str
) -> None:
    """Scores, cost and traces, and no outcome of the experiment; a second evaluation has runs of its own."""
    track()
    asked(cache=False)
    provider.faults = lambda call: Status(400) if "Think first." in str(call.body) and "m3" in str(call.body) else None
    exp = two(store)
    examples = [dspy.Example(message=f"m{number}").with_inputs("message") for number in range(5)]
    report = exp.evaluate(examples, lambda example, prediction: 1.0)
    assert tracking.flush(60.0)
    runs = runs_of(uri)
    assert {variant: run.data.metrics["score"] for variant, run in runs.items()} == {"control": 1.0, "cot": 0.8}
    for variant, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.params == {"examples": "5", "margin": "0.0"}
        assert run.data.metrics["failed"] == (variant == "cot")
        assert 0 < run.data.metrics["usd_per_1000_calls"] < 1
        assert ("score/difference" in run.data.metrics) == (variant == "cot")
        linked = traces_of(uri, run)
        scores = [one.value for each in linked.values() for one in each.info.assessments if one.name == "score"]
        assert sorted(scores) == ([0.0, 1.0, 1.0, 1.0, 1.0] if variant == "cot" else [1.0] * 5)
    control, cot = (runs[variant].info for variant in ("control", "cot"))
    assert report.url is not None
    assert report.url.endswith(f"?selectedRunUuid={cot.run_id}&compareToRunUuid={control.run_id}")
    assert report.url in str(report).replace("\n", "").replace(" ", "")
    assert report.to_dict()["url"] == report.url
    again = exp.evaluate(examples[:1], lambda example, prediction: 1.0)
    assert again.url != report.url
    assert exp.scorecard().audit[-1].what == "start"


@pytest.mark.slow
def test_an_evaluation_without_tracking_or_with_an_mlflow_that_is_down_waits_for_nothing(
    track: Callable[..., None], asked: Asked, store: str
) -> None:
    asked(cache=False)
    exp = two(store)
    examples = [dspy.Example(message="m").with_inputs("message")]
    assert exp.evaluate(examples, lambda example, prediction: 1.0).url is None
    track(tracking_uri=f"http://127.0.0.1:{free_port()}", exit_timeout=0.5)
    with call_context(user="u1"):
        exp(message="something to write")
    wait_until(lambda: tracking.status().failing, 60.0)  # type: ignore[union-attr]
    began = time.monotonic()
    assert exp.evaluate(examples, lambda example, prediction: 1.0).url is None
    assert time.monotonic() - began < 10.0


# -- without the code of the program -----------------------------------------------------------------------------------
def test_a_controller_of_its_own_writes_the_runs_where_it_is_told(
    uri: str, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`experiment run` and `step` wrote none, since nothing turns tracking on in that process."""
    from dspy_prod.cli import main
    from dspy_prod.stores.opening import open_store
    from tests.experiments.support import declared, feed

    opened = declared(open_store(store, "cli"))
    feed(opened, 200, {"control": 0.9, "new": 0.3})
    where = ["--store", store, "--namespace", "cli"]
    told = ["--tracking-uri", uri, "--tracking-experiment", EXPERIMENT]
    assert main(["experiment", "run", "e", "--every", "0.1", *where, *told]) == 0
    assert "rollback by controller" in capsys.readouterr().out
    assert tracking.status() is None
    ended = {
        "control": "FINISHED",
        "new": "FINISHED",
    }  # what was not written when the command ended is written after it
    wait_until(lambda: {variant: run.info.status for variant, run in runs_of(uri).items()} == ended, 60.0)
    runs = runs_of(uri)
    assert sum(run.data.metrics["users"] for run in runs.values()) == 200
    assert runs["new"].data.tags["dspy_prod.state"] == "decided"
    other = declared(open_store(store, "cli"), "other")
    feed(other, 20, {"control": 0.9, "new": 0.3})
    assert main(["experiment", "step", "other", *where]) == 0
    assert set(runs_of(uri)) == {"control", "new"}, "nothing is written unless it is said"
