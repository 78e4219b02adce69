"""Evaluations on Ray: two worker processes on this machine, a provider, and its bill. Ray takes seconds to begin."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import dspy
import pytest
import redis

import dspy_prod
from dspy_prod import ConfigError
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm
from tests.extras import needed
from tests.scaling.programs import Dies, Fails, TwoSteps, devset, even, question_of
from tests.stores.redis.servers import started_valkey

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

KEY = "sk-from-the-environment"
PASSWORD = "also-from-the-environment"
NANO = 1_000_000_000
ON_RAY: dict[str, Any] = {"engine": "ray", "workers": 2, "num_threads": 2, "progress": False}


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    """The URL of a server that wants a password."""
    server = started_valkey()
    with closing(redis.Redis(port=server.port)) as client:
        client.config_set("requirepass", PASSWORD)
    yield f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def cluster(valkey: str) -> Iterator[Any]:
    """Ray on loopback, with the provider's key and the server's password in the environment of its workers, where alone
    they find them."""
    ray = needed("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("DSPY_PROD__STORE", valkey)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="error",
            log_to_driver=False,
        )  # fmt: skip
        yield ray
        ray.shutdown()


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(latency=0.02) as provider:
        yield provider


@pytest.fixture(params=["sqlite", "redis"])
def lm(request: pytest.FixtureRequest, tmp_path: Path, provider: Provider, valkey: str) -> Iterator[Any]:
    store = valkey if request.param == "redis" else f"sqlite:///{tmp_path}/state.db"
    lm = make_lm(provider.url, store=store, api_key=KEY, namespace=f"on-ray-{uuid.uuid4().hex}")
    with dspy.context(lm=lm):
        yield lm
    lm.close()
    lm.pipeline.store.close()


def asked(provider: Provider) -> Counter[tuple[str, int]]:
    """How often each step of each example was sent."""
    return Counter(question_of(call.body) for call in provider.calls)


def test_every_example_is_answered_once_and_paid_once(lm: Any, provider: Provider) -> None:
    """The results are those of threads, in order; the run, the ledger and the bill agree; the answers are gone."""
    examples = devset(20)
    run = dspy_prod.Run("whole", usd=0.01, store=lm.pipeline.store)
    with dspy_prod.call_context(user="anna"):
        result = dspy_prod.evaluate(TwoSteps(), examples, even, run=run, **ON_RAY)
    assert isinstance(result, dspy.evaluate.EvaluationResult)
    assert result.score == 50.0
    assert [prediction.asked for _, prediction, _ in result.results] == [each.question for each in examples]
    assert [score for *_, score in result.results] == [1.0, 0.0] * 10
    assert all(example is given for (example, *_), given in zip(result.results, examples, strict=True))

    assert set(asked(provider).values()) == {1}
    assert len(provider.calls) == 40
    assert {call.headers["authorization"] for call in provider.calls} == {f"Bearer {KEY}"}
    assert provider.max_in_flight > 1
    used = run.used()
    assert round((used.usd or 0) * NANO) == provider.bill.nano
    assert (used.unconfirmed_usd, used.held_usd) == (0, 0)
    records = lm.ledger.records()
    assert (len(records), sum(each.cost_nano for each in records)) == (40, provider.bill.nano)
    assert {(each.user, each.run) for each in records} == {("anna", "whole")}
    assert lm.pipeline.store.runs.answered() == []


def test_the_cap_holds_over_all_workers_and_more_money_goes_on(lm: Any, provider: Provider) -> None:
    """Refused by a cap, it ends as that, below it; with a larger one the rest is asked, and nothing twice."""
    examples = devset(20)
    cap = 0.0006
    with pytest.raises(dspy_prod.BudgetExceededError) as caught:
        dspy_prod.evaluate(TwoSteps(), examples, even, run="capped", budget_usd=cap, **ON_RAY)
    assert provider.bill.usd <= cap
    assert cap - provider.bill.usd < 4 * caught.value.bound_usd  # all workers were refused, or were ended meanwhile
    paid = len(provider.calls)
    assert 0 < paid < 40

    result = dspy_prod.evaluate(TwoSteps(), examples, even, run="capped", budget_usd=0.01, **ON_RAY)
    assert result.score == 50.0
    assert set(asked(provider).values()) == {1}
    used = dspy_prod.Run("capped", usd=0.01, store=lm.pipeline.store).used()
    assert round((used.usd or 0) * NANO) == provider.bill.nano


def test_a_killed_worker_s_examples_are_done_again_and_what_was_answered_is_not_paid_again(
    lm: Any, provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL while second steps are under way: no first step is sent twice, the cap holds, and the books say how."""
    examples = devset(12)
    provider.latency = lambda call: 2.0 if question_of(call.body)[1] == 2 else 0.02
    run = dspy_prod.Run("killed", usd=0.01, store=lm.pipeline.store)

    def doing() -> dict[int, set[str]]:
        """Which examples each process has begun."""
        begun: dict[int, set[str]] = {}
        for path in tmp_path.glob("* question*"):
            pid, question = path.name.split(" ", 1)
            begun.setdefault(int(pid), set()).add(question)
        return begun

    def waits_for_two(provider: Provider) -> int | None:
        """A worker that has begun two examples and waits for the second step of both."""
        second = {question for question, step in asked(provider) if step == 2}
        return next((pid for pid, begun in doing().items() if len(begun) == 2 and begun <= second), None)

    def kill() -> set[tuple[str, int]]:
        """Kill such a worker; which calls were under way in it."""
        killed: list[int] = []
        provider.wait_until(lambda p: (pid := waits_for_two(p)) and not killed.append(pid), 120)
        os.kill(killed[0], signal.SIGKILL)
        return {(question, 2) for question in doing()[killed[0]]}

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        result = dspy_prod.evaluate(TwoSteps(tmp_path), examples, even, run=run, **ON_RAY)
        dead = killing.result(60)
    assert result.score == 50.0
    assert [prediction.asked for _, prediction, _ in result.results] == [each.question for each in examples]
    assert all(prediction.answer for _, prediction, _ in result.results)
    assert "examples are done again" in caplog.text

    sent = asked(provider)
    twice = {call for call, times in sent.items() if times == 2}
    assert twice == dead
    assert set(sent.values()) == {1, 2}
    assert len(sent) == 24

    used = run.used()
    bill = {row.call_id: row.nano for row in provider.bill.rows}
    left_alone = sorted((c for c in provider.calls if question_of(c.body) in twice), key=lambda call: call.received_at)
    unheard = sum(bill.get(call.call_id, 0) for call in left_alone[: len(twice)])
    confirmed = round(((used.usd or 0) - (used.unconfirmed_usd or 0)) * NANO)
    assert confirmed == provider.bill.nano - unheard
    assert (used.unconfirmed_usd or 0) * NANO >= unheard
    assert used.held_usd == 0
    assert provider.bill.usd <= (used.usd or 0) <= 0.01


def test_a_program_that_fails_scores_nothing_and_one_that_kills_its_worker_is_left(
    lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An error scores 0; an example over which workers die is given up, and the others are answered."""
    examples = devset(5)
    assert dspy_prod.evaluate(Fails(), examples, even, **ON_RAY).score == 60.0
    with pytest.raises(RuntimeError, match="1 examples failed"):
        dspy_prod.evaluate(Fails(), examples, even, max_errors=1, **ON_RAY)
    assert "goes on with it for nothing" in caplog.text
    result = dspy_prod.evaluate(Dies(), examples, even, failure_score=-1.0, **ON_RAY)
    assert [score for *_, score in result.results] == [1.0, 0.0, 1.0, -1.0, 1.0]


def test_a_stopped_run_ends_the_evaluation(lm: Any, provider: Provider) -> None:
    """Asked to stop, workers send nothing more, and nothing of theirs is left behind."""
    provider.latency = 0.3
    run = dspy_prod.Run("stopped", store=lm.pipeline.store)

    def stop() -> None:
        provider.wait_until(lambda p: len(p.calls) >= 4, 120)
        run.stop("enough")

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(dspy_prod.RunStoppedError):
        dspy_prod.evaluate(TwoSteps(), devset(100), even, run=run, **ON_RAY)
    stopping.join(10)
    count = len(provider.calls)
    assert count < 40
    provider.wait_until(lambda p: p.in_flight == 0, 10)
    assert len(provider.calls) == count
    assert lm.pipeline.store.holds() == 0


def test_traces_of_workers_reach_mlflow(lm: Any, tmp_path: Path, schema: Path) -> None:
    """Tracking that is on here is on there."""
    import shutil

    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(schema, tmp_path / "mlflow.db")
    off = dspy_prod.tracking.enable("evaluated", uri)
    try:
        dspy_prod.evaluate(TwoSteps(), devset(2), even, **ON_RAY)
    finally:
        off()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("evaluated")
    assert experiment is not None
    traces = client.search_traces(locations=[experiment.experiment_id])
    assert len(traces) >= 2


def test_a_store_of_this_process_alone_is_refused(provider: Provider) -> None:
    """No worker could share it."""
    with (
        dspy.context(lm=make_lm(provider.url)),
        pytest.raises(ConfigError, match=r"which no other process sees|ends with its"),
    ):
        dspy_prod.evaluate(TwoSteps(), devset(1), even, **ON_RAY)
