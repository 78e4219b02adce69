"""What this library believes of the private parts of DSPy, lm15, LiteLLM and MLflow.

A release that changes one of them fails here first, with its name, and not in a user's program.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.clients.execution import aexecute, execute, prepare
from dspy.dsp.utils.settings import settings
from dspy.lm15 import CacheConfig, Config, Message, Request, TextPart, response_to_events
from dspy.utils.exceptions import LMError

import dspy_prod
from dspy_prod.compat import asking, executing, lm15, mlflow, steps
from dspy_prod.compat import dspy as own_dspy
from dspy_prod.compat.foreign import CLAIMED
from dspy_prod.context.current import CallContext
from dspy_prod.lm import calling
from dspy_prod.pipeline.scope import Scope, request_key
from dspy_prod.pipeline.upstream.deadline import ATTEMPT_UNTIL, LEAVING
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import ScriptedEngine
from dspy_prod.tracking import bridge
from tests.logged import logged

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parent.parent.parent

# module, name, and its parameters without annotations
SIGNATURES = [
    ("dspy.clients.execution", "PreparedCall", "(prompt, messages, kwargs, legacy, request, cache, n, managed)"),
    ("dspy.clients.execution", "_canonical", "(call, *, compat=None)"),
    ("dspy.clients.execution", "_result", "(lm, response, call, provider, request=None, *, estimate=True)"),
    ("dspy.clients.execution", "_hint_responses_api", "(lm, exc)"),
    ("dspy.clients.execution", "_declared_fallback", "(lm, binding, resolution, clients)"),
    ("dspy.clients.execution", "execute", "(lm, call)"),
    ("dspy.clients.execution", "aexecute", "(lm, call)"),
    ("dspy.clients.execution", "prepare", "(lm, prompt, messages, kwargs, *, asynchronous=False, direct=False)"),
    ("dspy.clients.execution", "finalize", "(lm, call, result)"),
    ("dspy.clients.lm", "_check_engines", "(engine, async_engine)"),
    ("dspy.clients.lm", "_refuse_client_settings", "(engine, kwargs, *, where='dspy.LM')"),
    ("dspy.clients.lm", "_dump_engine", "(engine, name)"),
    ("dspy.clients.lm", "_load_engine", "(record, name, *, allow_custom_lm_class)"),
    ("dspy.clients.lm", "_is_openai_reasoning_model", "(model)"),
    ("dspy.clients.capabilities", "_capabilities", "(lm, options=None)"),
    ("dspy.clients.backend_selection", "select_backend", "(lm, options=None)"),
    ("dspy.clients.errors", "wrap_error", "(exc, *, model, provider=None)"),
    ("dspy.clients._http", "retry_after_seconds", "(value)"),
    ("dspy.clients._litellm", "get_litellm", "(*, feature)"),
    ("dspy.clients.engines.litellm_engine", "LiteLLMEngine._arguments", "(self, request, *, streaming=False)"),
    ("dspy.clients.engines.litellm_engine", "LiteLLMEngine._response", "(self, raw, request)"),
    ("dspy.clients.engines.litellm_engine", "AsyncLiteLLMEngine._arguments", "(self, request, *, streaming=False)"),
    ("dspy.clients.engines.litellm_engine", "AsyncLiteLLMEngine._response", "(self, raw, request)"),
    ("dspy.clients.engines.litellm_engine", "_ChatStream", "(request)"),
    ("dspy.clients.engines.litellm_engine", "_ChatStream.feed", "(self, chunk)"),
    ("dspy.clients.engines.litellm_engine", "_ChatStream.finish", "(self, litellm)"),
    ("dspy.lm15", "_definitions", "(bindings)"),
    ("dspy.lm15", "_binding_for", "(bindings, provider)"),
    (
        "dspy._vendor.lm15.errors",
        "map_http_error",
        "(status, message, *, provider=None, env_keys=(), provider_code=None, request_id=None, retry_after=None)",
    ),
    ("dspy._vendor.lm15.result", "StreamAccumulator.push", "(self, event)"),
    ("dspy._vendor.lm15.result", "StreamAccumulator.response", "(self)"),
    ("dspy._vendor.lm15.serde", "request_to_dict", "(r)"),
    ("dspy._vendor.lm15.serde", "response_to_dict", "(r, *, include_provider_data=False)"),
    ("dspy._vendor.lm15.serde", "response_from_dict", "(d)"),
    ("dspy._vendor.lm15.serde", "cache_config_to_dict", "(c)"),
    ("dspy._vendor.lm15.serde", "cache_config_from_dict", "(d)"),
    ("dspy._vendor.lm15.providers.openai_chat", "OpenAIChatLM.parse_stream_events", "(self, request, raw_event)"),
    ("dspy._vendor.lm15.transports", "StdlibTransport.stream", "(self, request)"),
    ("dspy._vendor.lm15.transports", "StdlibTransport._open", "(self, parsed, *, proxy, origin, connect_timeout)"),
    (
        "dspy._vendor.lm15.transports",
        "StdlibAsyncTransport._send_request",
        "(self, conn, request, parsed, *, proxy, write_timeout)",
    ),
    ("mlflow.tracing.provider", "_get_mlflow_span_processor", "(tracking_uri)"),
    ("mlflow.tracing", "reset", "()"),
    ("mlflow.tracing", "set_destination", "(destination, *, context_local=False)"),
    ("mlflow.tracing.trace_manager", "InMemoryTraceManager.get_instance", "()"),
    ("mlflow.tracing.trace_manager", "InMemoryTraceManager.has_open_spans", "(self, otel_trace_id)"),
    ("mlflow.tracing.trace_manager", "InMemoryTraceManager.pop_trace", "(self, otel_trace_id)"),
    ("mlflow.tracing.trace_manager", "InMemoryTraceManager.get_mlflow_trace_id_from_otel_id", "(self, otel_trace_id)"),
    ("mlflow.tracing.utils", "maybe_get_request_id", "(is_evaluate=False)"),
    ("mlflow.tracing.processor.mlflow_v3", "MlflowV3SpanProcessor._start_trace", "(self, root_span)"),
    ("mlflow.tracking.fluent", "_get_latest_active_run", "()"),
    ("mlflow.store.db.utils", "_get_latest_schema_revision", "()"),
    ("asyncio", "_get_running_loop", "()"),
]  # fmt: skip

# module, name of something that is only read
VALUES = [
    ("dspy.clients._deprecation", "_adapter_call"),
    ("dspy.clients.model_metadata", "_lock"),
    ("dspy.utils.lazy_import", "_lazy_module_locks"),
    ("dspy.dsp.utils.settings", "thread_local_overrides"),
    ("dspy.dsp.utils.settings", "main_thread_config"),
    ("dspy._vendor.lm15.providers.openai_chat", "_INGEST_CONFIG_KEYS"),
    ("dspy._vendor.lm15.providers.openai_chat", "_INGEST_EXTENSIONS_KEYS"),
    ("dspy._vendor.lm15.providers.openai_chat", "_INGEST_CALL_MODE_KEYS"),
    ("mlflow.tracing.provider", "_MLFLOW_TRACE_USER_DESTINATION.get"),
    ("mlflow.tracing.constant", "SpanAttributeKey.EXPERIMENT_ID"),
    ("mlflow.tracking.fluent", "_active_experiment_id"),
]


def found(module: str, name: str) -> Any:
    """An object by its dotted name."""
    thing: Any = import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize(("module", "name", "expected"), SIGNATURES, ids=lambda value: str(value).partition("(")[0])
def test_it_is_there_and_takes_this(module: str, name: str, expected: str) -> None:
    """Each function that is called, and each method that is overridden, has the parameters it had."""
    signature = inspect.signature(found(module, name))
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == expected


@pytest.mark.parametrize(("module", "name"), VALUES)
def test_it_is_there(module: str, name: str) -> None:
    """Each value that is read is where it was."""
    found(module, name)


def test_the_claim_is_that_of_the_project_file() -> None:
    """An error that names fitting versions names those that would be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["mlflow"]]
    assert {name + versions for name, versions in CLAIMED.items()} <= set(required)


# -- an LM and its settings ------------------------------------------------------------------------------------------
def test_what_an_lm_keeps_to_itself() -> None:
    """Its engines, whether DSPy's cache serves it, and how it is told where LMs are asked what they can do."""
    plain = dspy.LM("openai/gpt-4o-mini")
    assert own_dspy.engines_of(plain) == ("auto", None)
    assert own_dspy.caches_responses(plain)
    engine = ScriptedEngine()
    own_dspy.set_engines(plain, engine, engine.asynchronous)
    assert (plain.engine, plain("hi")) == (engine, ["ok"])
    ours = dspy_prod.LM("openai/gpt-4o-mini", engine=engine, store="memory://foreign", namespace="foreign")
    assert prepare(plain, "hi", None, {}).cache
    assert not prepare(ours, "hi", None, {}).cache


def test_what_settings_modules_and_examples_keep_to_themselves() -> None:
    """A setting in force, the modules around a call, who is frozen, and which keys are inputs."""
    seen: list[Any] = []

    class Program(dspy.Module):
        def forward(self) -> None:
            seen.append(settings.caller_modules[-1])

    program = Program()
    with dspy.context(dspy_prod_probe=1):
        assert own_dspy.thread_local_overrides.get()["dspy_prod_probe"] == 1
        program()
    assert seen == [program]
    assert not own_dspy.is_compiled(program)
    production = dspy_prod.Production(dspy.Predict("question -> answer"))
    production._compiled = True
    assert own_dspy.is_compiled(production.program)
    parent = dspy.Module()
    parent.child = production
    assert parent.named_parameters() == []
    assert own_dspy.input_keys(dspy.Example(a=1, b=2).with_inputs("a")) == {"a"}
    assert own_dspy.input_keys(dspy.Example(a=1)) is None


def test_a_chosen_experiment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that `mlflow.set_experiment` chose, and not one that MLflow would look up."""
    from mlflow.tracking import fluent

    monkeypatch.setattr(fluent, "_active_experiment_id", "7")
    assert mlflow.chosen_experiment() == "7"


# -- the short way of a call -----------------------------------------------------------------------------------------
def ask(run: Callable[[Any, Any], Any], arun: Callable[[Any, Any], Any], answer: Any, **kwargs: Any) -> list[Any]:
    """What a call on a thread and one in a task give, or raise."""
    engine = ScriptedEngine(answer)
    lm = dspy.LM("openai/gpt-4o-mini", engine=engine, async_engine=engine.asynchronous, cache=False, num_retries=0)
    outcomes: list[Any] = []
    for way in (lambda call: run(lm, call), lambda call: asyncio.run(arun(lm, call))):
        try:
            outcome = way(prepare(lm, "hi", None, kwargs))
        except LMError as error:
            outcomes.append((type(error), str(error), type(error.__cause__)))
        else:
            outcomes.append({**vars(outcome), "cost": None, "cost_details": None})  # ours comes from the ledger
    return [*outcomes, engine.requests]


@pytest.mark.parametrize("answer", ["yes", RuntimeError("broken"), TimeoutError("late")], ids=repr)
@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.5, "max_tokens": 9}, {"n": 2}], ids=str)
def test_the_short_way_is_dspy_s_way(answer: Any, kwargs: dict[str, Any]) -> None:
    """Requests, results and errors are equal to those of DSPy's own executor."""
    assert steps.SHORT
    expected = ask(execute, aexecute, answer, **kwargs)

    def run(lm: Any, call: Any) -> Any:
        return executing.run_call(lm, call, asking.request_of(lm, call))

    def arun(lm: Any, call: Any) -> Any:
        return executing.arun_call(lm, call, asking.request_of(lm, call))

    assert ask(run, arun, answer, **kwargs) == expected


def test_an_answer_from_memory_is_a_finished_call() -> None:
    """Every field that DSPy's bookkeeping reads is the one that is meant."""
    engine = ScriptedEngine("yes")
    lm = dspy_prod.LM("openai/gpt-4o-mini", engine=engine, store="memory://answered", namespace="answered")
    scope = calling.scope_of(lm, "hi", None, {}, None)
    lm("hi")
    known = calling.hit(lm, scope, "hi", None, {})
    assert known is not None
    result = calling.result_of(known)
    assert (result.outputs, result.usage, result.cost, result.cache_hit) == (["yes"], {}, 0.0, True)
    assert (result.responses, result.response_model) == ((result.raw,), "openai/gpt-4o-mini")


# -- lm15 ------------------------------------------------------------------------------------------------------------
def test_a_request_has_the_key_it_always_had() -> None:
    """Another JSON form of a request would make every answer in every user's cache a stranger."""
    request = Request(
        model="openai/gpt-4o-mini",
        system="Be brief.",
        messages=(Message.user("What is 1 + 1?"), Message.assistant([TextPart("2")]), Message.user("And 2 + 2?")),
        config=Config(max_tokens=64, temperature=0.5, stop=("END",), seed=7, cache=CacheConfig(mode="auto")),
    )
    key = request_key(b"[]", request, Scope(CallContext(), None, {"num_ctx": 1}, 3, True), "acme")
    assert key is not None
    assert hashlib.sha256(key).hexdigest() == "e613a14a28a0a6da0303685bcc2a76335892b376dbff06494c641c9bbe3062ce"


def test_an_answer_survives_its_json_form() -> None:
    """What the cache keeps of an answer is the answer; its events put together are the answer too."""
    request = Request(model="m", messages=(Message.user("hi"),))
    response = ScriptedEngine("yes").complete(request)
    assert lm15.response_from_dict(lm15.response_to_dict(response)) == response
    accumulator = lm15.StreamAccumulator(request)
    for event in response_to_events(response):
        accumulator.push(event)
    assert accumulator.response() == response


def test_every_argument_of_the_list_is_in_lm15_s_tables() -> None:
    """The list that stands in for tables that have moved says nothing that they do not."""
    assert set(lm15._ARGUMENTS.split()) <= lm15.canonical_arguments()


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


REQUEST = Request(model="openai/gpt-4o-mini", messages=(Message.user("hi"),))


@pytest.mark.timeout(30)
def test_the_transport_ends_at_the_deadline(deaf: str) -> None:
    """Without the hooks in the transport a call would hang for lm15's own ten minutes."""
    upstream = Upstream("openai/gpt-4o-mini", "chat", "lm15", None, {"api_key": "k", "api_base": deaf}, {})
    engine, bounded = upstream.sync_engine(REQUEST, None)
    assert bounded
    token = ATTEMPT_UNTIL.set(time.monotonic() + 0.2)
    try:
        with pytest.raises(Exception, match=r"(?i)time"):
            engine.complete(REQUEST)
        with pytest.raises(Exception, match="time limit"):  # before it connects
            engine.complete(REQUEST)
    finally:
        ATTEMPT_UNTIL.reset(token)
        upstream.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_transport_tells_when_a_request_leaves(deaf: str, way: str) -> None:
    """The limiter counts from that moment on."""
    clients = {"api_key": "k", "api_base": deaf, "timeout": 0.2}
    upstream = Upstream("openai/gpt-4o-mini", "chat", "lm15", None, clients, {})
    left = threading.Event()
    token = LEAVING.set(left.set)
    try:
        with pytest.raises(Exception, match=r"(?i)time"):
            _ask(upstream) if way == "sync" else asyncio.run(_aask(upstream))
    finally:
        LEAVING.reset(token)
        upstream.close()
    assert left.is_set()


def _ask(upstream: Upstream) -> None:
    upstream.sync_engine(REQUEST, None)[0].complete(REQUEST)


async def _aask(upstream: Upstream) -> None:
    try:
        await upstream.async_engine(REQUEST, None).complete(REQUEST)
    finally:
        await upstream.aclose()


# -- MLflow ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mlflow.tracing.provider", "_get_mlflow_span_processor"),
        ("mlflow.tracing.trace_manager", "InMemoryTraceManager.pop_trace"),
        ("mlflow.tracking.fluent", "_get_latest_active_run"),
        ("mlflow.tracing.processor.mlflow_v3", "MlflowV3SpanProcessor._start_trace"),
    ],
)
def test_an_mlflow_built_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str, name: str
) -> None:
    """One warning, and MLflow goes on exporting by itself."""
    import_module(module)
    for part in found(module, name.rpartition(".")[0]).__mro__[:-1] if "." in name else [import_module(module)]:
        monkeypatch.delattr(part, name.rpartition(".")[2], raising=False)  # also of what it would be inherited from
    courier: Any = object()
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        remove = bridge.install(courier, "sqlite:///mlflow.db")
    if remove is not None:  # else the tests after this one fail too
        remove()
    assert remove is None
    assert [name.rpartition(".")[2] in record.getMessage() for record in logged(caplog)] == [True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sqlite:///mlflow.db", "sqlite:///./mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:////{here}/x/../mlflow.db"),
        ("sqlite:///mlflow.db?timeout=1", "sqlite:////{here}/mlflow.db?timeout=1"),
        ("http://host:5000/", "http://host:5000"),
    ],
)
def test_a_tracking_uri_has_one_form(one: str, other: str) -> None:
    """However it is written: MLflow keeps what it was given."""
    assert mlflow.absolute(one) == mlflow.absolute(other.replace("/{here}", os.getcwd()))
    for own in ("sqlite:///:memory:", "postgresql+psycopg://u@h/sqlite:///x", "sqlite://", "databricks"):
        assert mlflow.absolute(own) == own


def test_without_its_newest_schema_mlflow_makes_its_tables_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slower, and as before for whoever uses MLflow alone."""
    from dspy_prod.tracking import mlflow_schema

    monkeypatch.delattr("mlflow.store.db.utils._get_latest_schema_revision")
    mlflow_schema.prepare(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []
