"""What Prometheus reads of a service is what its provider has billed."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import ConfigError, call_context
from dspy_prod.metrics import standing
from dspy_prod.metrics.exposition import name_of
from dspy_prod.records import NANO
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import Provider
from tests.metrics.support import busy, failing, lm_at, scraped, value
from tests.ports import free_port

NAME = "scraped"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with Provider(faults=failing(NAME), price=(0.15, 0.60), usage=(20, 50)) as running:
        yield running


@pytest.fixture(autouse=True)
def _off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor is a scrape over before the stores have answered, however busy the machine is."""
    monkeypatch.setattr(standing, "PATIENCE", 20.0)
    yield
    dspy_prod.metrics.disable()


def test_a_scrape_tells_what_the_provider_has_billed(provider: Provider) -> None:
    """Money, tokens and calls, to the nano-USD; and everything else that has happened to the calls."""
    provider.bill.clear()
    with dspy_prod.metrics.prometheus(port=0) as endpoint:
        lms = busy(provider, NAME)
        found = scraped(endpoint.url)
    rows = provider.bill.rows
    priced = [row for row in rows if not row.model.endswith("unpriced")]
    assert round(value(found, "dspy_prod_cost_usd_total") * NANO) == sum(row.nano for row in priced) > 0
    assert value(found, "dspy_prod_cost_unknown_total") == len(rows) - len(priced) == 1
    assert value(found, "dspy_prod_attempts_total", dspy_prod_outcome="ok") == len(rows) == 10
    tokens = sum(row.input_tokens for row in rows), sum(row.output_tokens for row in rows)
    for kind, count in zip(("input", "output"), tokens, strict=True):
        assert value(found, "dspy_prod_tokens_total", gen_ai_token_type=kind) == count
        assert value(found, "gen_ai_client_token_usage_sum", gen_ai_token_type=kind) == count
    duration = "gen_ai_client_operation_duration_seconds"
    assert found[duration].type == "histogram"
    assert value(found, f"{duration}_count", error_type="") == 10
    assert value(found, f"{duration}_count", error_type="LMServerError") == 2
    assert value(found, f"{duration}_bucket", le="+Inf") == value(found, f"{duration}_count") == 12
    model = {"gen_ai_provider_name": "openai", "gen_ai_request_model": f"{NAME}-good"}
    assert value(found, "dspy_prod_cache_hits_total", **model) == 2
    assert value(found, "dspy_prod_cache_misses_total") == 4
    saved = [record.saved_nano for record in lms[0].pipeline.store.records() if record.cached]
    assert round(value(found, "dspy_prod_cost_saved_usd_total") * NANO) == sum(filter(None, saved)) > 0
    assert value(found, "dspy_prod_retries_total") == 1
    assert value(found, "dspy_prod_fallbacks_total", **model) == 2
    assert value(found, "dspy_prod_rejections_total", dspy_prod_reason="budget_exceeded") == 1
    assert value(found, "dspy_prod_rejections_total", dspy_prod_reason="circuit_open") == 1
    assert value(found, "dspy_prod_breaker_state", gen_ai_request_model=f"{NAME}-down") == 2
    assert value(found, "dspy_prod_breaker_state", gen_ai_request_model=f"{NAME}-good") == 0
    assert value(found, "dspy_prod_breaker_transitions_total", dspy_prod_state="open") == 1
    waits = value(found, "dspy_prod_admission_wait_seconds_count", dspy_prod_blocked_on="pacing")
    assert waits == 1
    assert 0.3 < value(found, "dspy_prod_admission_wait_seconds_sum") < 5
    assert value(found, "dspy_prod_experiment_decisions_total", dspy_prod_decision="rollback") == 1


def test_budgets_and_limiters_are_told_as_they_are_now(provider: Provider) -> None:
    """A gauge of each budget by its name, in USD, and of what a minute has left."""
    with dspy_prod.metrics.prometheus(port=0) as endpoint:
        lms = busy(provider, NAME)
        spent = lms[0].costs().budgets[0]
        found = scraped(endpoint.url)
    mine = {"dspy_prod_budget": f"{NAME}-day"}
    assert value(found, "dspy_prod_budget_limit_usd", **mine) == 1
    assert value(found, "dspy_prod_budget_used_usd", **mine) == spent.spent_usd > 0
    assert value(found, "dspy_prod_budget_left_usd", **mine) == spent.remaining_usd
    assert value(found, "dspy_prod_budget_held_usd", **mine) == 0
    minute = {"gen_ai_request_model": f"{NAME}-slow", "dspy_prod_dimension": "requests"}
    assert value(found, "dspy_prod_limiter_limit", **minute) == 120
    assert value(found, "dspy_prod_limiter_left", **minute) == 118


def test_each_worker_takes_a_port_of_its_own() -> None:
    """Workers run the same lines, so they name the same port; who is started anew takes that of the one that ended."""
    first = free_port(3)
    with ExitStack() as others:
        ports = [others.enter_context(socket.create_server(("127.0.0.1", first + each))) for each in (0, 1)]
        with pytest.raises(ConfigError, match=r"cannot listen there .*workers="):
            dspy_prod.metrics.prometheus(port=first)
        with pytest.raises(ConfigError, match="workers=2"):
            dspy_prod.metrics.prometheus(port=first, workers=2)
        with dspy_prod.metrics.prometheus(port=first, workers=3) as endpoint:
            assert endpoint.port == first + 2
            assert scraped(endpoint.url)
        ports[1].close()
        with dspy_prod.metrics.prometheus(port=first, workers=3) as endpoint:
            assert endpoint.port == first + 1


@pytest.mark.parametrize("workers", [1, 3])
def test_a_process_takes_one_of_its_workers_ports(tmp_path: Path, workers: int) -> None:
    """A second one would tell all its numbers twice, and leave none for the last worker; a child takes its own."""
    first, told = free_port(3), tmp_path / "told"
    with dspy_prod.metrics.prometheus(port=first, workers=workers) as endpoint:
        with pytest.raises(ConfigError, match=rf"listens at {endpoint.url} already; .*close\(\) that endpoint first"):
            dspy_prod.metrics.prometheus(port=first, workers=workers)
        child = os.fork()
        if child == 0:
            try:
                with dspy_prod.metrics.prometheus(port=first, workers=3) as own:
                    told.write_text(str(own.port - first))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert told.read_text() == "1"
        with dspy_prod.metrics.prometheus(port=first + 1) as other:
            assert other.port == first + 1, "one that was not named so"
    with dspy_prod.metrics.prometheus(port=first, workers=workers) as endpoint:
        assert endpoint.port == first


@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": True}, {"port": 65_535, "workers": 2}])
def test_ports_that_there_are_not_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"prometheus\((port|workers)="):
        dspy_prod.metrics.prometheus(**given)


def test_nobody_is_named_unless_that_was_asked_for(provider: Provider) -> None:
    """Tenants are told apart on request, and only so many of them; budgets never tell whose account it is."""
    budget = dspy_prod.Budget(usd=1, per="day", scope="tenant", name="each tenant")
    lm = lm_at(provider, f"{NAME}-tenants", budget=budget)
    with (
        dspy_prod.metrics.prometheus(port=0) as plain,
        dspy_prod.metrics.prometheus(port=0, attributes=["tenant", "tag:team"], most_values=2) as asked,
    ):
        for tenant in ("acme", "globex", "initech", "umbrella"):
            with call_context(tenant=tenant, user=f"ann@{tenant}.com", tags={"team": "blue"}):
                lm("hi")
        named, told = scraped(asked.url), scraped(plain.url)
    text = str(told)
    assert "acme" not in text
    assert "ann@" not in text + str(named)
    assert value(told, "dspy_prod_budget_used_usd", dspy_prod_budget="each tenant", dspy_prod_scope="tenant") > 0
    for tenant, calls in (("acme", 1), ("globex", 1), ("(other)", 2)):
        assert value(named, "dspy_prod_attempts_total", dspy_prod_tenant=tenant, dspy_prod_tag_team="blue") == calls
    assert value(told, "dspy_prod_attempts_total") == 4


class Stuck(MemoryStore):
    """Answers nothing about money while it is told to be slow."""

    def __init__(self) -> None:
        super().__init__("stuck")
        self.go = threading.Event()
        self.go.set()

    def account(self, key: str):  # type: ignore[no-untyped-def]
        self.go.wait(20)
        return super().account(key)


def test_a_slow_store_holds_up_no_scrape(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answered last is told meanwhile, and how long ago that was."""
    monkeypatch.setattr(standing, "FRESH", 0.1)
    store = Stuck()
    lm = lm_at(provider, f"{NAME}-stuck", store=store, budget=dspy_prod.Budget(usd=1, per="total", name="stuck"))
    lm("hi")
    with dspy_prod.metrics.prometheus(port=0) as endpoint:
        first = scraped(endpoint.url)
        used = value(first, "dspy_prod_budget_used_usd", dspy_prod_budget="stuck")
        assert used > 0
        monkeypatch.setattr(standing, "PATIENCE", 0.25)
        store.go.clear()
        ages = []
        try:
            end = time.monotonic() + 15
            while time.monotonic() < end and (not ages or ages[-1] < 0.6):
                found = scraped(endpoint.url)
                ages.append(value(found, "dspy_prod_standing_age_seconds"))
                assert value(found, "dspy_prod_budget_used_usd", dspy_prod_budget="stuck") == used
        finally:
            store.go.set()
        assert 0.6 <= ages[-1] < 10
        assert len(ages) > 3


def test_each_kind_of_application_serves_the_same(provider: Provider) -> None:
    """Mounted in a service, ASGI or WSGI."""
    import httpx
    from starlette.applications import Starlette
    from starlette.routing import Mount

    asgi, wsgi = dspy_prod.metrics.prometheus_app(), dspy_prod.metrics.prometheus_app("wsgi")
    lm_at(provider, f"{NAME}-mounted")("hi")

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        service = httpx.ASGITransport(Starlette(routes=[Mount("/metrics", asgi)]))
        async with httpx.AsyncClient(transport=service, base_url="http://service") as client:
            accept = {"accept": "text/plain"}
            return await client.get("/metrics/", headers=accept), await client.post("/metrics/")

    answer, posted = asyncio.run(ask())
    assert answer.headers["content-type"].startswith("text/plain")
    assert f'gen_ai_request_model="{NAME}-mounted"' in answer.text
    assert posted.status_code == 405
    status = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "HTTP_ACCEPT": "text/plain"}
    text = b"".join(wsgi(environ, lambda code, headers: status.append(code))).decode()
    assert status == ["200 OK"]
    assert _without_age(text) == _without_age(answer.text)


def _without_age(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("dspy_prod_standing_age")]


def test_asynchronous_calls_are_counted_as_well(provider: Provider) -> None:
    """One flow, one record, one number."""
    lm = lm_at(provider, f"{NAME}-async")

    async def ask() -> None:
        await asyncio.gather(*(lm.acall(f"{number}") for number in range(5)))

    with dspy_prod.metrics.prometheus(port=0) as endpoint:
        asyncio.run(ask())
        assert value(scraped(endpoint.url), "dspy_prod_attempts_total", dspy_prod_outcome="ok") == 5


def test_a_forked_child_counts_for_itself_and_leaves_the_port_alone(provider: Provider, tmp_path: Path) -> None:
    """What its parent has counted would else be there twice."""
    lm = lm_at(provider, f"{NAME}-forked")
    with dspy_prod.metrics.prometheus(port=0) as endpoint:
        lm("in the parent")
        told = tmp_path / "told"
        child = os.fork()
        if child == 0:
            try:
                with dspy_prod.metrics.prometheus(port=0) as own:
                    lm("in the child")
                    lm("and again")
                    told.write_text(str(value(scraped(own.url), "dspy_prod_attempts_total")))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert told.read_text() == "2.0"
        assert value(scraped(endpoint.url), "dspy_prod_attempts_total") == 1


def test_what_cannot_be_is_refused_at_once_with_the_remedy() -> None:
    """A taken port, a port that is none, an attribute that is none, an interface that is none."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="use another port, or port=0"):
            dspy_prod.metrics.prometheus(port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="0 \\(any free one\\) to 65535"):
        dspy_prod.metrics.prometheus(port=70_000)
    with pytest.raises(ConfigError, match="'tenants' is none; use some of user, tenant"):
        dspy_prod.metrics.prometheus(port=0, attributes=["tenants"])
    with pytest.raises(ConfigError, match=r"use a list of names, such as \['tenant'\]"):
        dspy_prod.metrics.prometheus(port=0, attributes="tenant")
    with pytest.raises(ConfigError, match="'asgi' or 'wsgi'"):
        dspy_prod.metrics.prometheus_app("cgi")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("gen_ai.client.operation.duration", "s", "gen_ai_client_operation_duration_seconds"),
        ("gen_ai.client.token.usage", "{token}", "gen_ai_client_token_usage"),
        ("dspy_prod.cost", "USD", "dspy_prod_cost_usd"),
        ("wait.seconds", "s", "wait_seconds"),
    ],
)
def test_names_are_those_that_prometheus_wants(name: str, unit: str, expected: str) -> None:
    """Units are written out, what is counted is left out."""
    assert name_of(name, unit) == expected
