"""What an orchestrator is told: alive, ready, and why not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from dspy_prod import ConfigError
from dspy_prod.asgi import install, probe_routes, probes
from dspy_prod.asgi.serving import serving
from dspy_prod.runtime.living import LIVE, living
from dspy_prod.testing import Provider
from tests.asgi.support import Answer, exchange
from tests.e2e.support import MODEL, make_lm


@pytest.fixture(autouse=True)
def only_its_own() -> Iterator[None]:
    """A probe looks at every LM of the process: here not at those of other tests, some without a store by now."""
    others = living()
    LIVE.clear()
    yield
    LIVE.clear()
    LIVE.update(others)


def service(*unready: Any) -> Starlette:
    return Starlette(routes=[*probe_routes(unready)] if unready else probe_routes())


def ask(app: Any, path: str = "/readyz") -> Answer:
    """A GET."""

    async def get(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "method": "GET"}, receive, send)

    return asyncio.run(exchange(get, path))


def test_a_worker_is_alive_and_ready_without_asking_a_provider() -> None:
    """The first look as all others; it says how the circuits are, and nothing that is secret."""
    with Provider() as provider:
        lm = make_lm(provider.url, api_key="sk-secret-1")
        assert ask(service(), "/healthz").json() == {"status": "alive"}
        answer = ask(service("store", "draining"))
        assert answer.status == 200
        assert answer.json()["status"] == "ready"
        assert answer.json()["models"][MODEL] == "closed"
        assert b"sk-secret-1" not in answer.body
        assert provider.calls == []
        lm.close()


def test_a_worker_whose_store_is_gone_is_not_ready(tmp_path: Path) -> None:
    """Nothing can be accounted for there; the page stays up, and tells no path."""
    lm = make_lm("http://127.0.0.1:9/v1", store=f"sqlite:///{tmp_path}/state.db")
    assert ask(service()).status == 200
    lm.pipeline.store.close()
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "state.db").mkdir()
    answer = ask(service())
    assert (answer.status, answer.json()["reasons"]) == (503, ["store"])
    assert str(tmp_path).encode() not in answer.body
    del lm


def test_a_worker_that_is_about_to_end_is_not_ready() -> None:
    """Load balancers send their requests elsewhere from then on."""
    app = service()
    serving(app).draining = True
    answer = ask(app)
    assert (answer.status, answer.json()["reasons"]) == (503, ["draining"])


def test_an_open_circuit_counts_where_that_is_wanted() -> None:
    """By default it does not: all workers meet the same provider."""
    lm = make_lm("http://127.0.0.1:9/v1")
    lm.breaker("force_open")
    assert ask(service()).status == 200
    assert ask(service("any_circuit")).json()["reasons"] == ["any_circuit"]
    assert ask(service("degraded")).status == 503
    lm.breaker("reset")
    lm.close()


def test_every_circuit_is_open_only_when_all_of_them_are() -> None:
    """A service without any has none that is open."""
    from dspy_prod.status.models import BreakerHealth, Health

    def found(*states: str) -> Health:
        breakers = [BreakerHealth.model_construct(state=state) for state in states]
        return Health.model_construct(breakers=breakers, stores=[], status="healthy")

    holds = [
        probes._holds("circuits", found(*states), False)
        for states in [(), ("closed", "open"), ("open", "forced_open"), ("half_open",)]
    ]
    assert holds == [False, False, True, False]


def test_a_look_that_hangs_makes_unready_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer blocks no page, and no further thread."""
    looks: list[float] = []

    def slow() -> Any:
        looks.append(time.monotonic())
        time.sleep(0.3)
        raise RuntimeError

    monkeypatch.setattr(probes, "health", slow)
    monkeypatch.setattr(probes, "PATIENCE", 0.05)
    app = service()
    assert [ask(app).json()["reasons"] for _ in range(3)] == [["store"]] * 3
    assert len(looks) == 1
    assert ask(app, "/healthz").status == 200


def test_without_a_thread_to_look_with_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page was an error of ours, which says nothing; it is ready again as soon as a thread can be started."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    app = service()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for _ in range(2):
            answer = ask(app)
            assert (answer.status, answer.json()["reasons"]) == (503, ["store"])
    assert ask(app).status == 200


def test_however_often_it_is_asked_one_look_a_second_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many load balancers are no load."""
    looks: list[int] = []
    health = probes.health

    def counted() -> Any:
        looks.append(1)
        return health()

    monkeypatch.setattr(probes, "health", counted)
    monkeypatch.setattr(probes, "FRESH", 60.0)
    app = service()
    assert {ask(app).status for _ in range(20)} == {200}
    assert len(looks) == 1


def test_paths_are_chosen_and_causes_checked() -> None:
    """An unknown cause is refused with those there are."""
    app = install(Starlette(), alive="/live", ready="/ready")
    assert [ask(app, path).status for path in ("/live", "/ready", "/healthz")] == [200, 200, 404]
    assert ask(app, "/ready").json()["in_flight"] == 0
    with pytest.raises(ConfigError, match="'breaker' is unknown"):
        probe_routes(["breaker"])  # type: ignore[list-item]
