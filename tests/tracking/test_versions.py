"""From a version to its traces, from a list of traces to what went wrong, and from a span to who asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INTERNAL_ERROR, INVALID_PARAMETER_VALUE, ErrorCode

import dspy_prod
from dspy_prod import registry, tracking
from dspy_prod.testing import FaultPlan, Status
from dspy_prod.tracking.asking import Predictors
from dspy_prod.tracking.linking import MOST_WAITING, Links
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.registry.processes import MlflowServer
from tests.tracking.conftest import EXPERIMENT, traces_in

ANSWER = '{"category": "billing", "reply": "Thank you."}'
CANNED = "A colleague will answer you."


class Triage(dspy.Module):
    """A program of two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("message -> category")
        self.answer = dspy.ChainOfThought("message, category -> reply")

    def forward(self, message: str) -> Any:
        return self.answer(message=message, category=self.classify(message=message).category)


def published(uri: str, folder: Path) -> Any:
    """A version of it, as a service loads it."""
    with dspy.context(lm=dspy.LM("openai/m"), adapter=dspy.JSONAdapter()):
        registry.publish(Triage(), "triage", tracking_uri=uri)
    return registry.load("triage/1", Triage(), tracking_uri=uri, cache_dir=folder)


def ask(program: Any, lm: Any, message: str, **whose: Any) -> None:
    """One call, whatever becomes of it."""
    with (
        dspy.context(lm=lm, adapter=dspy.JSONAdapter(use_native_function_calling=False)),
        dspy_prod.call_context(**whose),
        contextlib.suppress(LMError),
    ):
        program(message=message)


def by_message(uri: str) -> dict[str, Trace]:
    """Every trace by what was asked."""
    return {str(trace.data.spans[0].inputs.get("message")): trace for trace in traces_in(uri)}


def of_version(uri: str, version: str) -> set[str]:
    """The traces that MLflow lists on the page of a prompt version."""
    client = MlflowClient(uri)
    place = client.get_experiment_by_name(EXPERIMENT).experiment_id
    found = client.search_traces(locations=[place], filter_string=f"prompt = '{version}'", max_results=200)
    return {trace.info.trace_id for trace in found}


REASONED = ANSWER.replace("{", '{"reasoning": "They paid.", ', 1)


def test_a_version_lists_its_traces_and_the_experiment_its_prompts(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM, tmp_path: Path
) -> None:
    """On the program's page and on those of its predictors; a call of no version is on none."""
    triage = published(uri, tmp_path)
    track()
    lm = connect(serve(answer=REASONED), cache=False)
    production = dspy_prod.Production(triage, name="triage", fallback_response=CANNED)
    ask(production, lm, "answered")
    ask(triage.deepcopy(), lm, "no version")
    lm.breaker("force_open")
    ask(production, lm, "canned")
    assert tracking.flush(100.0)
    traces = by_message(uri)
    expected = {traces["answered"].info.trace_id, traces["canned"].info.trace_id}
    for version in ("triage/1", "triage.classify/1", "triage.answer.predict/1"):
        assert of_version(uri, version) == expected, version
    assert of_version(uri, "triage/2") == set()
    place = MlflowClient(uri).get_experiment_by_name(EXPERIMENT).experiment_id
    listed = MlflowClient(uri).search_prompts(filter_string=f"experiment_id = '{place}'")
    assert {prompt.name for prompt in listed} == {"triage", "triage.classify", "triage.answer.predict"}


@pytest.mark.slow
def test_links_are_made_through_a_server_too(
    uri: str, database: Path, track: Callable[..., None], serve: MakeProvider, connect: MakeLM, tmp_path: Path
) -> None:
    """One request for each trace, and none of the traces waits for it."""
    triage = published(uri, tmp_path)
    server = MlflowServer(database)
    server.start()
    try:
        track(tracking_uri=server.uri)
        lm = connect(serve(answer=REASONED), cache=False)
        for number in range(3):
            ask(dspy_prod.Production(triage, name="triage"), lm, f"question {number}")
        assert tracking.flush(100.0)
        assert len(of_version(server.uri, "triage/1")) == 3
        assert len(of_version(server.uri, "triage.classify/1")) == 3
    finally:
        tracking.disable()
        server.kill()


def test_how_a_call_ended_stands_in_the_list(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM, tmp_path: Path
) -> None:
    """As the answer that MLflow's list shows, as tags, and as the state; the span keeps the answer alone."""
    triage = published(uri, tmp_path)
    track()
    down = Status(500)
    provider = serve(answer=REASONED, faults=FaultPlan.script([None, None, down, down, down, None, None]))
    common: dict[str, Any] = {"cache": False, "retry": dspy_prod.Retry(attempts=1)}
    lm = connect(provider, **common)
    production = dspy_prod.Production(triage, name="triage", fallback_response=CANNED)
    bare = dspy_prod.Production(triage, name="triage")
    ask(production, lm, "fine", tenant="acme")
    ask(bare, lm, "failed", tenant="acme")
    ask(production, lm, "canned", tenant="acme")
    ask(production, connect(provider, fallbacks=[connect(provider, **common)], **common), "elsewhere")
    lm.breaker("force_open")
    ask(bare, lm, "refused", tenant="acme")
    assert tracking.flush(100.0)
    found = by_message(uri)
    expected = {
        "fine": ("OK", "ok", None, '{"reasoning":"They paid.","reply":"Thank you."}'),
        "failed": ("ERROR", "error", "upstream_error", "error: LMServerError 500: "),
        "canned": ("OK", "fallback", "upstream_error", f"fallback: upstream_error: {CANNED}"),
        "refused": ("ERROR", "refused", "circuit_open", "refused: circuit_open: The circuit of route "),
        "elsewhere": ("OK", "ok", None, "fallback to "),
    }
    for message, (state, status, reason, shown) in expected.items():
        info = found[message].info
        assert info.state.value == state, message
        assert info.tags["dspy_prod.status"] == status, message
        assert info.tags.get("dspy_prod.reason") == reason, message
        assert info.response_preview.startswith(shown), (message, info.response_preview)
        assert info.tags["dspy_prod.program"] == "triage", message
        assert info.tags["dspy_prod.prompt_version"] == "triage/1", message
    assert found["canned"].data.spans[0].outputs == {"reply": CANNED}
    assert found["refused"].data.spans[0].outputs is None
    assert "dspy_prod.route" in found["elsewhere"].info.tags
    assert found["refused"].info.tags["dspy_prod.tenant"] == "acme"


@pytest.mark.parametrize("content", [pytest.param("off", marks=pytest.mark.slow), "redacted"])
def test_what_may_not_leave_is_not_in_the_list_either(
    content: str, uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """A canned answer's text is content too."""
    track(content=content)
    lm = connect(serve(answer=REASONED), cache=False)
    lm.breaker("force_open")
    ask(dspy_prod.Production(Triage(), name="triage", fallback_response="Write to jane@example.com"), lm, "q")
    assert tracking.flush(100.0)
    [trace] = traces_in(uri)
    shown = trace.info.response_preview
    assert shown.startswith("fallback: circuit_open")
    assert "jane@example.com" not in shown
    assert (shown == "fallback: circuit_open") is (content == "off")


def test_a_refusal_without_a_program_says_why(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM, tmp_path: Path
) -> None:
    """A program that is called by itself has its version; a bare LM its reason."""
    triage = published(uri, tmp_path)
    track()
    lm = connect(serve(), cache=False)
    lm.breaker("force_open")
    ask(triage, lm, "by itself")
    with pytest.raises(dspy_prod.CircuitOpenError):
        lm("bare")
    assert tracking.flush(100.0)
    infos = {trace.info.tags["mlflow.traceName"]: trace.info for trace in traces_in(uri)}
    assert set(infos) == {"classify", lm.model}
    assert infos["classify"].tags["dspy_prod.prompt_version"] == "triage/1"
    for info in infos.values():
        assert (info.tags["dspy_prod.status"], info.tags["dspy_prod.reason"]) == ("refused", "circuit_open")


def test_within_mlflow_s_own_traces_it_is_told_too(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM, tmp_path: Path
) -> None:
    """Beside autologging: status, version, and the line in the list."""
    triage = published(uri, tmp_path)
    track(autolog=True)
    lm = connect(serve(answer=REASONED), cache=False)
    production = dspy_prod.Production(triage, name="triage", fallback_response=CANNED)
    ask(production, lm, "fine")
    lm.breaker("force_open")
    ask(production, lm, "canned")
    ask(dspy_prod.Production(triage, name="triage"), lm, "refused")
    assert tracking.flush(100.0)
    infos = {trace.info.tags["dspy_prod.status"]: trace.info for trace in traces_in(uri)}
    assert set(infos) == {"ok", "fallback", "refused"}
    assert infos["fallback"].response_preview == f"fallback: circuit_open: {CANNED}"
    assert infos["refused"].response_preview.startswith("refused: circuit_open: The circuit")
    assert "Thank you." in infos["ok"].response_preview
    assert {info.tags["dspy_prod.prompt_version"] for info in infos.values()} == {"triage/1"}
    assert of_version(uri, "triage/1") == {info.trace_id for info in infos.values()}


def test_a_span_says_which_predictor_asked(
    uri: str, track: Callable[..., None], serve: MakeProvider, connect: MakeLM
) -> None:
    """As `named_predictors()` calls it, and as the registry calls its prompt; the model stands beside."""
    track()
    lm = connect(serve(answer=REASONED), cache=False)
    ask(dspy_prod.Production(Triage(), name="triage"), lm, "q")
    assert tracking.flush(100.0)
    [trace] = traces_in(uri)
    calls = [span for span in trace.data.spans if span.span_type == "CHAT_MODEL"]
    assert [span.name for span in calls] == ["classify", "answer.predict"]
    assert {span.attributes["dspy_prod.model"] for span in calls} == {lm.model}


def test_predictors_are_found_however_programs_change() -> None:
    """A replaced predictor has the new one's name; a single one has none; what is strange harms nobody."""
    program, names = Triage(), Predictors()
    assert names.name(None, [program, program.classify]) == "classify"
    assert names.name(program, ["a module above", program, program.answer, program.answer.predict]) == "answer.predict"
    other = dspy.Predict("a -> b")
    assert names.name(program, [program, other]) is None
    names._looked.clear()
    program.classify = other
    assert names.name(program, [program, other]) == "classify"
    assert names.name(None, [other]) is None
    assert names.name(None, None) is None

    class Strange(dspy.Module):
        def named_predictors(self) -> Any:
            raise RuntimeError("no")

    strange = Strange()
    assert names.name(strange, [strange, dspy.Predict("a -> b")]) is None


class Prompts:
    """MLflow's client and its store, which fail as they are told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.linked: list[str] = []

    def get_prompt(self, name: str) -> None: ...

    def get_prompt_version(self, name: str, version: str) -> None: ...

    def link_prompts_to_trace(self, trace: str, versions: Any) -> None:
        if self.error is not None:
            raise self.error
        self.linked.append(trace)


def failing(code: int) -> MlflowException:
    return MlflowException("no", code)


def made(prompts: Prompts, count: int = 1) -> Links:
    links = Links(lambda: prompts, lambda: prompts)
    links.add({f"tr-{number}": (("p", "1"),) for number in range(count)}, {}, "1")
    return links


def test_a_link_is_tried_again_while_mlflow_is_away() -> None:
    """And made once it is back."""
    prompts = Prompts()
    prompts.error = ConnectionError("away")
    links = made(prompts)
    for _ in range(5):
        links.step()
    assert (links.asked, links.settled) == (1, 0)
    assert links.pause() > 0
    prompts.error = None
    links.step()
    assert (links.settled, prompts.linked, links.pause()) == (1, ["tr-0"], None)


@pytest.mark.parametrize(
    ("code", "steps"), [(INVALID_PARAMETER_VALUE, 1), (INTERNAL_ERROR, 3), (ENDPOINT_NOT_FOUND, 1)]
)
def test_a_link_that_mlflow_refuses_holds_nothing_up(code: int, steps: int) -> None:
    """At once when it says so, after some tries when it only fails; a server that is too old is not asked again."""
    prompts = Prompts()
    prompts.error = failing(code)
    links = made(prompts)
    for _ in range(steps):
        assert links.settled == 0
        links.step()
    assert links.settled == 1
    prompts.error = None
    links.add({"tr-later": (("p", "1"),)}, {}, "1")
    links.step()
    assert prompts.linked == ([] if code == ENDPOINT_NOT_FOUND else ["tr-later"])
    assert ErrorCode.Name(code)


def test_links_that_wait_are_bounded_and_a_stranger_s_tag_is_left_alone() -> None:
    """The oldest ones are given up."""
    links = made(Prompts(), MOST_WAITING + 10)
    assert (links.asked, links.settled) == (MOST_WAITING + 10, 10)
    assert links.refs("not JSON") == ()
    assert links.refs('[{"name": "p", "version": 3}]') == (("p", "3"),)
