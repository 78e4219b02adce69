"""One MLflow store, filled by real calls through `dspy_prod`, behind a real `mlflow server`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import registry, tracking
from dspy_prod.records import NANO
from dspy_prod.testing import FaultPlan, Provider, Status
from tests.registry.processes import MlflowServer

LARGE, SMALL = "openai/triage-large", "openai/triage-small"
PRICES = {LARGE: (2.50, 10.00), SMALL: (0.15, 0.60)}
EXPERIMENT = "support"
DRAFT = "Sort the customer's message, and reply."
FINAL = "Sort the customer's message, and reply in one friendly sentence."
"""The instructions of the two versions."""
EXAMPLE = {"message": "My parcel never came.", "category": "shipping", "reply": "Sorry, we are looking for it."}
"""The demo that the second version has."""
ANSWER = '{"category": "billing", "reply": "Thank you, we look into it."}'


@dataclass(frozen=True)
class Filled:
    """What was written, as the ledger has it.

    Attributes:
        database: MLflow's file. records: the ledger's. status: what tracking said in the end.
        retried, fallen, cached, failed, bare: the ids of one trace of each kind.
    """

    database: Path
    records: list[dspy_prod.CallRecord]
    status: Any
    retried: str
    fallen: str
    cached: str
    failed: str
    bare: str

    @property
    def usd(self) -> float:
        """What everything cost."""
        return sum(record.cost_nano or 0 for record in self.records) / NANO

    def usd_by_trace(self) -> dict[str, float]:
        """What each trace cost."""
        costs: dict[str, int] = {}
        for record in self.records:
            costs[str(record.trace_id)] = costs.get(str(record.trace_id), 0) + (record.cost_nano or 0)
        return {trace_id: nano / NANO for trace_id, nano in costs.items()}

    def usd_by_model(self) -> dict[str, float]:
        """What each model cost."""
        return {
            model: sum(record.cost_nano or 0 for record in self.records if record.model == model) / NANO
            for model in PRICES
        }


def published(uri: str, folder: Path) -> dspy.Module:
    """The second of two published versions, which is `production`, as a service loads it."""
    first, second = (dspy.Predict(dspy.Signature("message -> category, reply", told)) for told in (DRAFT, FINAL))
    second.demos = [dspy.Example(**EXAMPLE).with_inputs("message")]
    with dspy.context(lm=dspy.LM(LARGE, temperature=0.2), adapter=dspy.JSONAdapter()):
        for program, message in ((first, "as written"), (second, "refined, with an example")):
            version = registry.publish(program, "triage", message=message, tracking_uri=uri)
            registry.promote("triage", version, tracking_uri=uri)
    program = dspy.Predict("message -> category, reply")
    return registry.load("triage@production", program, tracking_uri=uri, cache_dir=folder)


@pytest.fixture(scope="session")
def filled(schema: Path, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Two users, two models; a retry, a fallback, a cached answer, an outage, and a call without a program."""
    folder = tmp_path_factory.mktemp("mlflow-ui")
    prices = {model: dspy_prod.Price(input=price[0], output=price[1]) for model, price in PRICES.items()}
    down = Status(500)
    script = [None, down, None, down, down, None, down, down, down, down, None]
    billed = {model.split("/")[1]: price for model, price in PRICES.items()}
    uri = f"sqlite:///{shutil.copy(schema, folder / 'mlflow.db')}"
    triage = published(uri, folder)
    tracking.enable(EXPERIMENT, tracking_uri=uri)
    with Provider(prices=billed, answer=ANSWER, faults=FaultPlan.script(script)) as provider:
        common: dict[str, Any] = {"api_base": provider.url, "api_key": "test", "max_tokens": 50, "prices": prices}
        common.update(store="memory://ui", retry=dspy_prod.Retry(attempts=2, backoff=0.01), breaker=False)
        lm = dspy_prod.LM(LARGE, fallbacks=[dspy_prod.LM(SMALL, **common)], **common)
        program = dspy_prod.Production(triage, name="triage", fallback_response="A colleague will answer you.")

        def ask(user: str, message: str) -> str:
            with (
                dspy.context(lm=lm, adapter=dspy.JSONAdapter()),
                dspy_prod.call_context(user=user, tenant="acme", session=f"{user}-chat", tags={"channel": "mail"}),
            ):
                program(message=message)
            return str(lm.ledger.records(limit=1)[0].trace_id)

        ask("ann", "I was charged twice.")
        cached = ask("ann", "I was charged twice.")
        retried = ask("bob", "The app crashes.")
        fallen = ask("bob", "Where is my parcel?")
        failed = ask("ann", "I cannot log in.")
        lm("hello")
        records = lm.ledger.records()
        bare = str(records[0].trace_id)
        assert sum(record.cost_nano or 0 for record in records) == provider.bill.nano
        assert len(provider.calls) == len(script)
    assert tracking.flush(110.0), tracking.status()
    status = tracking.status()
    tracking.disable()
    return Filled(folder / "mlflow.db", records, status, retried, fallen, cached, failed, bare)


@pytest.fixture(scope="session")
def experiment(filled: Filled) -> str:
    """The experiment's id."""
    return str(MlflowClient(f"sqlite:///{filled.database}").get_experiment_by_name(EXPERIMENT).experiment_id)


@pytest.fixture(scope="session")
def pages(filled: Filled) -> Iterator[str]:
    """The address of a running `mlflow server` on it."""
    server = MlflowServer(filled.database)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        server.start()
    try:
        yield server.uri
    finally:
        server.kill()
