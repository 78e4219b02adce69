"""`dspy_prod.metrics.enable`: instruments of OpenTelemetry, at a provider of meters that is the user's own."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import dspy_prod
from dspy_prod import ConfigError, Price, call_context
from dspy_prod.metrics import inbox as box
from dspy_prod.metrics.catalogue import CATALOGUE
from dspy_prod.metrics.inbox import Inbox
from dspy_prod.metrics.sums import _PROVIDERS, MOST_SERIES, Sums
from dspy_prod.pipeline.routes import _OPERATIONS
from dspy_prod.records import NANO, CallRecord
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.telemetry.events import BUS
from dspy_prod.testing import ScriptedEngine

MODEL = "azure/gpt-4o-mini"
PROVIDER = "azure.ai.openai"


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    dspy_prod.metrics.disable()
    provider.shutdown()


def make_lm(**policies: Any) -> dspy_prod.LM:
    engine = ScriptedEngine("hi")
    prices = {MODEL: Price(input=1, output=2)}
    defaults = {"cache": False, "retry": False, "breaker": False, "prices": prices, "store": f"memory://{id(engine)}"}
    return dspy_prod.LM(MODEL, engine=engine, async_engine=engine.asynchronous, **{**defaults, **policies})


def points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    """The data points of one metric; none of calls that were left by a test before, and may end at any time."""
    data = reader.get_metrics_data()
    return [
        point
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
        if point.attributes.get("gen_ai.provider.name", PROVIDER) == PROVIDER
        or point.attributes.get("gen_ai.operation.name") == "embeddings"
    ]


def test_requests_are_measured_by_the_names_of_the_conventions(
    reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """Dashboards for generative AI look for these attributes, whatever library sends them."""
    dspy_prod.metrics.enable(provider)
    make_lm()("hi")
    (duration,) = points(reader, "gen_ai.client.operation.duration")
    names = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "azure.ai.openai"}
    assert duration.attributes == {**names, "gen_ai.request.model": "gpt-4o-mini"}
    assert duration.count == 1
    tokens = points(reader, "gen_ai.client.token.usage")
    assert {point.attributes["gen_ai.token.type"]: point.sum for point in tokens} == {"input": 10, "output": 5}
    (cost,) = points(reader, "dspy_prod.cost")
    assert cost.value == 20e-6


def test_an_operation_is_called_what_the_conventions_call_it(
    reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """Vectors take other times than answers do; whoever looks at one of them must not see both."""
    dspy_prod.metrics.enable(provider)
    make_lm()("hi")
    make_lm(model_type="text")("hi")
    embed = dspy_prod.Embedder(lambda texts: [[1.0]] * len(texts), store="memory://operations")
    embed(["a", "b"])
    embed(["a", "b"])  # from the cache: nothing was asked
    durations = points(reader, "gen_ai.client.operation.duration")
    counts = {point.attributes["gen_ai.operation.name"]: point.count for point in durations}
    assert counts == {"chat": 1, "text_completion": 1, "embeddings": 1}
    embed.close()


def test_the_conventions_are_those_of_the_installed_package() -> None:
    """Who renames them there is heard of here."""
    conventions = pytest.importorskip("opentelemetry.semconv._incubating.metrics.gen_ai_metrics")
    known = [value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")]
    mine = [name for name in CATALOGUE if name.startswith("gen_ai.")]
    assert len(mine) == 2
    assert set(mine) <= set(known)
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as attributes

    assert attributes.GEN_AI_OPERATION_NAME == "gen_ai.operation.name"
    assert attributes.GEN_AI_PROVIDER_NAME == "gen_ai.provider.name"
    assert attributes.GEN_AI_REQUEST_MODEL == "gen_ai.request.model"
    assert attributes.GEN_AI_TOKEN_TYPE == "gen_ai.token.type"
    operations = {each.value for each in attributes.GenAiOperationNameValues}
    assert {"chat", *_OPERATIONS.values()} <= operations
    names = {each.value for each in attributes.GenAiProviderNameValues}
    assert set(_PROVIDERS.values()) <= names


def test_enabling_twice_counts_once_and_disabling_ends_it(
    reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """OpenTelemetry keeps instruments for ever; they are used again, and a counter never goes back."""
    lm = make_lm()
    dspy_prod.metrics.enable(provider)
    stop = dspy_prod.metrics.enable(provider)
    lm("counted")
    stop()
    lm("not counted")
    assert [point.value for point in points(reader, "dspy_prod.attempts")] == [1]
    assert not BUS.meters
    dspy_prod.metrics.enable(provider)
    lm("counted")
    assert [point.value for point in points(reader, "dspy_prod.attempts")] == [2]
    with pytest.raises(ConfigError, match="OpenTelemetry removes none"):
        dspy_prod.metrics.enable(provider, attributes=["program"])
    with pytest.raises(ConfigError, match="expected an OpenTelemetry MeterProvider, got str"):
        dspy_prod.metrics.enable("otlp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="most_values=0 must be a positive integer"):
        dspy_prod.metrics.enable(MeterProvider(), most_values=0)


def test_the_global_provider_is_used_once_whenever_it_is_set() -> None:
    """Who enables metrics before and after the application has set OpenTelemetry up counts each call once."""
    try:
        stop = dspy_prod.metrics.enable()
        assert dspy_prod.metrics.enable() == stop
        assert len(BUS.meters) == 1
    finally:
        dspy_prod.metrics.disable()


class Counting(MemoryStore):
    """Knows how many records were appended one by one."""

    appended = 0

    def append(self, record: CallRecord) -> None:
        self.appended += 1
        super().append(record)


def test_metrics_leave_answers_from_memory_on_their_short_way(provider: MeterProvider) -> None:
    """A listener to each call makes a hit cost twice as much; a meter must not."""

    def hits() -> int:
        store = Counting("counting")
        lm = make_lm(cache=True, store=store)
        for _ in range(7):
            lm("the same")
        return store.appended

    short = hits()
    dspy_prod.metrics.enable(provider)
    assert BUS.active
    assert hits() == short < 3
    remove = dspy_prod.add_listener(lambda event: None)
    assert hits() >= 6
    remove()


def test_cached_answers_are_counted_each(reader: InMemoryMetricReader, provider: MeterProvider) -> None:
    """Also those that the ledger notes together."""
    dspy_prod.metrics.enable(provider, attributes=["program"])
    lm = make_lm(cache=True)
    with call_context(program="faq"):
        for _ in range(7):
            lm("the same")
    (hits,) = points(reader, "dspy_prod.cache.hits")
    assert (hits.value, hits.attributes["dspy_prod.program"]) == (6, "faq")
    (saved,) = points(reader, "dspy_prod.cost.saved")
    assert round(saved.value * NANO) == 6 * 20_000


def test_many_calls_are_counted_though_nobody_looks(
    reader: InMemoryMetricReader, provider: MeterProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is emptied by a thread that ends; nothing is lost, and memory does not grow."""
    monkeypatch.setattr(box, "MANY", 8)
    dspy_prod.metrics.enable(provider)
    lm = make_lm()
    threads = [threading.Thread(target=lambda: [lm(f"{n}") for n in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(point.value for point in points(reader, "dspy_prod.attempts")) == 200
    assert [point.value for point in points(reader, "dspy_prod.metrics.lost")] == [0]


def test_the_queue_has_a_bound_and_says_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can start no thread, and whose metrics nobody reads."""
    monkeypatch.setattr(box, "MOST", 600)
    monkeypatch.setattr(box, "begin", lambda *_: None)
    taken: list[int] = []
    queue = Inbox(taken.append)
    for number in range(1_000):
        queue.put(number)
    assert queue.lost == 400
    queue.empty()
    assert taken == list(range(600))


def test_a_record_that_cannot_be_counted_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one is taken."""
    taken: list[int] = []

    def take(item: int) -> None:
        if item == 1:
            raise ValueError("no")
        taken.append(item)

    queue = Inbox(take)
    for number in range(3):
        queue.put(number)
    with caplog.at_level(logging.ERROR, "dspy_prod"):
        queue.empty()
    assert taken == [0, 2]
    assert "1 records could not be counted" in caplog.text


def test_however_many_models_there_are_a_metric_has_a_bound() -> None:
    """Names come from users, too: a gateway's model may be anything."""
    sums = Sums(("user",), 1_000, lambda *_: None)
    for number in range(5_000):
        record = CallRecord("i", "c", 0.0, f"openai/{number}", "primary", 1, "ok", 1, user=f"u{number}")
        sums.take((record, None, "chat"))
    told = list(sums.told("dspy_prod.cost"))
    assert len(told) <= MOST_SERIES + 1
    assert round(sum(cost for cost, _ in told) * 1e9) == 5_000


def test_a_scrape_is_quick_while_calls_are_made(reader: InMemoryMetricReader, provider: MeterProvider) -> None:
    """Whoever collects waits for no call, and no call for it; the SDK gives up after ten seconds, as this did when each
    counter took all that had come while the one before it was read."""
    dspy_prod.metrics.enable(provider)
    lm = make_lm()
    lm("hi")  # the first one imports much
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            lm("hi")

    thread = threading.Thread(target=call)
    thread.start()
    try:
        end = time.monotonic() + 0.5
        counts = []
        while time.monotonic() < end or len(counts) < 4:
            counts.append(sum(point.value for point in points(reader, "dspy_prod.attempts")))
    finally:
        done.set()
        thread.join()
    assert counts == sorted(counts)
    assert counts[-1] > 1


@pytest.mark.parametrize(
    ("missing", "call", "package"),
    [
        ("opentelemetry.metrics", "enable()", "opentelemetry-api"),
        ("opentelemetry.sdk.metrics", "prometheus(port=0)", "opentelemetry-sdk"),
        ("prometheus_client", "prometheus_app()", "prometheus-client"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(
    missing: str, call: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is optional."""
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "opentelemetry.metrics":
        monkeypatch.delattr("opentelemetry.metrics", raising=False)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'dspy-prod\[metrics\]'"):
        eval(f"dspy_prod.metrics.{call}", {"dspy_prod": dspy_prod})
