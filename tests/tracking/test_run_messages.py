"""Runs and feedback that are told while calls are served: all of it comes to MLflow, once, and nothing waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import tracking
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.tracking import messages as messages_module
from dspy_prod.tracking import setup
from dspy_prod.tracking.batches import Batch
from dspy_prod.tracking.content import Content
from dspy_prod.tracking.messages import Messages
from dspy_prod.tracking.records import KEY, NotThere, Records
from dspy_prod.tracking.run_messages import RunMessages, TrackedRun
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.registry.processes import MlflowServer, wait_until
from tests.tracking.conftest import EXPERIMENT, traces_in


def runs_in(uri: str) -> list[Any]:
    """Every run, the oldest first."""
    client = MlflowClient(uri)
    place = client.get_experiment_by_name(EXPERIMENT)
    return [] if place is None else client.search_runs([place.experiment_id], order_by=["attributes.start_time ASC"])


def told(scope: str = "experiment/e") -> tuple[RunMessages, TrackedRun]:
    """What tells of a run, and the run."""
    messages = RunMessages(scope)
    return messages, messages.open("cot", tags={"variant": "cot"}, params={"version": "triage/7"}, note="**why**")


def test_a_run_has_its_metrics_over_time_its_traces_and_their_feedback(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """All that was told, in order, however soon after the calls."""
    track()
    lm = connect(serve(), cache=False)
    messages, run = told()
    parent = messages.open("all")
    below = messages.open("below", parent=parent)
    for step in range(3):
        lm(f"question {step}")
        trace = str(lm.ledger.records(limit=1)[0].trace_id)
        assert run.link([trace, trace])
        assert run.log({"resolved": 0.5 + step / 10, "none": None, "infinite": float("inf")}, step=step)
        assert messages.feedback(trace, "resolved", step != 1, source="human", who="ann", rationale="They said so.")
    run.tag(stage="0.25")
    run.text("report.txt", "all of it")
    run.end()
    assert tracking.flush(100.0)
    client = MlflowClient(uri)
    assert run.id is not None
    found = client.get_run(run.id)
    assert (found.info.run_name, found.info.status) == ("cot", "FINISHED")
    assert found.data.params == {"version": "triage/7"}
    assert {"variant": "cot", "stage": "0.25", KEY: "experiment/e/cot"}.items() <= found.data.tags.items()
    assert found.data.tags["mlflow.note.content"] == "**why**"
    assert set(found.data.metrics) == {"resolved"}
    history = sorted((one.step, one.value) for one in client.get_metric_history(run.id, "resolved"))
    assert history == [(0, 0.5), (1, 0.6), (2, pytest.approx(0.7))]
    linked = client.search_traces(locations=[found.info.experiment_id], run_id=run.id)
    assert {trace.info.trace_id for trace in linked} == {trace.info.trace_id for trace in traces_in(uri)}
    told_of = [one for trace in linked for one in trace.info.assessments]
    assert sorted(one.value for one in told_of) == [False, True, True]
    assert {(one.name, one.source.source_type, one.source.source_id) for one in told_of} == {
        ("resolved", "HUMAN", "ann")
    }
    assert {one.rationale for one in told_of} == {"They said so."}
    assert client.get_run(str(below.id)).data.tags["mlflow.parentRunId"] == parent.id
    health = tracking.status()
    assert health is not None
    assert (health.messages_waiting, health.messages_lost) == (0, 0)


@pytest.mark.slow
def test_a_run_is_found_again_and_goes_on(uri: str, track: Callable[..., None]) -> None:
    """By another process, after its end; only `open` opens it again, and another scope has another run."""
    track()
    _, run = told()
    run.end()
    assert tracking.flush(100.0)
    first = run.id
    tracking.disable()
    track()
    late = TrackedRun(run.key, run.name)
    late.log({"resolved": 1.0}, step=9)
    assert tracking.flush(100.0)
    [found] = runs_in(uri)
    assert (found.info.run_id, found.info.status) == (first, "FINISHED")
    assert found.data.metrics == {"resolved": 1.0}
    tracking.disable()
    track()
    _, again = told()
    told("experiment/other")
    assert tracking.flush(100.0)
    assert again.id == first
    assert [run.info.status for run in runs_in(uri)] == ["RUNNING", "RUNNING"]
    again.end()
    told()
    assert tracking.flush(100.0)
    assert [run.info.status for run in runs_in(uri)] == ["RUNNING", "RUNNING"], "it ended, and was opened again"


def test_everything_appears_once_the_server_is_back(
    uri: str, database: Path, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """Telling never waits; what was told while nobody answered is there afterwards, each thing once."""
    server = MlflowServer(database)
    track(tracking_uri=server.uri)
    lm = connect(serve(), cache=False)
    began = time.perf_counter()
    messages, run = told()
    for step in range(20):
        run.log({"resolved": step / 20}, step=step)
    assert time.perf_counter() - began < 0.5
    lm("while it is away")
    trace = str(lm.ledger.records(limit=1)[0].trace_id)
    run.link([trace])
    messages.feedback(trace, "resolved", 1.0)
    wait_until(lambda: tracking.status().failing, 60.0)  # type: ignore[union-attr]
    assert tracking.status().messages_waiting > 0  # type: ignore[union-attr]
    try:
        server.start()
        assert tracking.flush(100.0)
        [found] = runs_in(uri)
        client = MlflowClient(uri)
        assert len(client.get_metric_history(found.info.run_id, "resolved")) == 20
        [linked] = client.search_traces(locations=[found.info.experiment_id], run_id=found.info.run_id)
        assert [one.value for one in linked.info.assessments] == [1.0]
        server.kill()
        run.log({"resolved": 2.0}, step=21)
        server = MlflowServer(database)
    finally:
        tracking.disable()
        server.kill()


def test_what_is_refused_is_counted_and_holds_nothing_up(uri: str, track: Callable[..., None]) -> None:
    """A parameter that changes is refused by MLflow; the messages after it are written."""
    track()
    messages, run = told()
    assert tracking.flush(100.0)
    tracking.disable()
    track()
    TrackedRun(run.key, run.name)._tell(params={"other": "1"})
    TrackedRun(run.key, run.name)._tell(metrics=[("a" * 300, 1.0, 0, 0)])
    run.log({"resolved": 1.0})
    assert tracking.flush(100.0)
    health = tracking.status()
    assert health is not None
    assert health.messages_lost == 1
    assert messages.lost == 1
    assert "MlflowException" in str(messages.refusal)
    [found] = runs_in(uri)
    assert found.data.metrics == {"resolved": 1.0}
    assert found.data.params == {"version": "triage/7", "other": "1"}


def test_while_tracking_is_off_nothing_is_told() -> None:
    """And nobody fails because of it."""
    messages = RunMessages()
    run = messages.open("cot")
    assert not run.log({"a": 1.0})
    assert not run.end()
    assert not messages.feedback("tr-a", "resolved", True)
    assert (run.id, messages.lost, messages.refusal) == (None, 0, None)


@pytest.mark.parametrize("wrong", [{"value": None}, {"value": float("nan")}, {"source": "nobody"}])
def test_impossible_feedback_is_refused_at_once(wrong: dict[str, Any]) -> None:
    """By the name of what is wrong."""
    with pytest.raises(ConfigError, match="feedback"):
        RunMessages().feedback("tr-a", "resolved", **{"value": True, **wrong})


def test_content_stays_within(uri: str, track: Callable[..., None]) -> None:
    """Personal data in tags are redacted, and a rationale is not told where content is not."""
    for mode, expected in (("redacted", "[EMAIL]"), ("off", None)):
        messages = Messages(Content(mode, Redactor()))  # type: ignore[arg-type]
        messages.told(
            {"tags": {"who": "jane@example.com"}, "feedback": [{"value": 1.0, "rationale": "jane@example.com"}]}
        )
        [batch] = messages.ready(1e9, lambda: 1)
        [message] = batch.messages
        assert "jane" not in str(message)
        assert (message["feedback"][0]["rationale"] is None) is (expected is None)


def sent(messages: Messages, at: float = 1e12) -> Batch:
    """The one batch that is due."""
    [batch] = messages.ready(at, lambda: 1)
    assert batch.done is not None
    return batch


def settle(messages: Messages, batch: Batch, **result: Any) -> None:
    """What the exporter says of a batch."""
    assert batch.done is not None
    batch.done(batch, {"ids": {}, "refused": {}, "later": [], **result}, None)


def test_feedback_waits_for_its_trace_but_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """With longer and longer pauses; then it is lost, and why is told."""
    messages = Messages(Content("full", Redactor()))
    assert messages.admits()
    messages.told({"feedback": [{"trace": "tr-a"}]})
    for _ in range(3):
        settle(messages, sent(messages), later=[0])
        assert messages.ready(time.monotonic(), lambda: 1) == []
        assert (messages.waiting, messages.lost, messages.pending) == (1, 0, True)
    monkeypatch.setattr(messages_module, "PATIENCE", -1.0)
    settle(messages, sent(messages), later=[0])
    assert (messages.waiting, messages.lost, messages.pending) == (0, 1, False)
    assert messages.refusal == "there is no trace tr-a"


def test_those_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is lost, and counted; so is all that a process which ended again and again was given."""
    monkeypatch.setattr(messages_module, "MOST_WAITING", 2)
    messages = Messages(Content("full", Redactor()))
    assert [messages.admits() for _ in range(3)] == [True, True, False]
    assert (messages.waiting, messages.lost) == (2, 1)
    for _ in range(2):
        messages.told({"run": "r"})
    batch = sent(messages)
    assert batch.done is not None
    batch.done(batch, None, "it ended again and again")
    assert (messages.waiting, messages.lost, messages.refusal) == (0, 3, "it ended again and again")


@pytest.mark.slow
def test_two_processes_that_open_a_run_at_once_share_it(uri: str) -> None:
    """The one that was made first."""
    message = {"run": "shared", "name": "cot", "shared": True, "open": True}
    one, other = Records(uri, EXPERIMENT, {}), Records(uri, EXPERIMENT, {})
    looked = other._found
    other._found = lambda message: None  # type: ignore[assignment]  # it looked before the first one had made it
    one.write(message)
    other.write(message)
    other._found = looked  # type: ignore[method-assign]
    assert one.ids == other.ids
    assert len(runs_in(uri)) == 1


def test_feedback_is_added_once_however_often_it_is_told(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """An exporter that died may have written it already; on a trace that is nowhere it is said so."""
    track()
    connect(serve(), cache=False)("q")
    assert tracking.flush(100.0)
    [trace] = traces_in(uri)
    records = Records(uri, EXPERIMENT, {})
    one = {"id": "f1", "trace": trace.info.trace_id, "name": "resolved", "value": True, "source": "code"}
    for again in (False, True, True):
        records.write({"feedback": [one], "again": again})
    [trace] = traces_in(uri)
    assert len(trace.info.assessments) == 1
    with pytest.raises(NotThere):
        records.write({"feedback": [{**one, "id": "f2", "trace": "tr-nowhere"}]})


@pytest.mark.slow
def test_more_than_a_hundred_traces_are_linked(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """MLflow takes a hundred at a time."""
    track()
    lm = connect(serve(), cache=False)
    for number in range(120):
        lm(f"question {number}")
    _, run = told()
    run.link(str(record.trace_id) for record in lm.ledger.records(limit=200))
    assert tracking.flush(110.0), tracking.status()
    client = MlflowClient(uri)
    place = client.get_experiment_by_name(EXPERIMENT).experiment_id
    assert len(client.search_traces(locations=[place], run_id=run.id, max_results=200)) == 120
    assert setup.courier() is not None
