"""What MLflow's pages show, asked of its server as the pages ask: costs add up to the ledger."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.ui.conftest import DRAFT, EXAMPLE, FINAL, Filled

CLOSE = 1e-12
"""USD; MLflow adds floats up."""


def ask(base: str, path: str, question: dict[str, Any] | None = None) -> Any:
    """What the server answers to a page's question."""
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(f"{base}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def measured(base: str, experiment: str, metric: str, **more: Any) -> list[dict[str, Any]]:
    """What Overview > Usage asks for a chart."""
    question = {
        "experiment_ids": [experiment],
        "view_type": "SPANS",
        "metric_name": metric,
        "aggregations": [{"aggregation_type": "SUM"}],
        "start_time_ms": 0,
        "end_time_ms": int(time.time() * 1000) + 60_000,
        **more,
    }
    points: list[dict[str, Any]] = ask(base, "ajax-api/3.0/mlflow/traces/metrics", question)["data_points"]
    return points


def test_everything_arrived(filled: Filled) -> None:
    """Six calls are six traces, and none is lost."""
    assert (filled.status.exported, filled.status.waiting, filled.status.lost) == (6, 0, 0)
    assert filled.status.failing is None


def test_the_cost_breakdown_is_the_ledger_by_model(pages: str, experiment: str, filled: Filled) -> None:
    """Cost by model, as the ring on Overview > Usage shows it, is the ledger's, and its total is the total."""
    points = measured(pages, experiment, "total_cost", dimensions=["span_model_name"])
    found = {point["dimensions"]["span_model_name"]: point["values"]["SUM"] for point in points}
    assert found == pytest.approx(filled.usd_by_model(), abs=CLOSE)
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(filled.usd, abs=CLOSE)


def test_the_cost_over_time_adds_up_to_the_ledger(pages: str, experiment: str, filled: Filled) -> None:
    """The curve of Overview > Usage has all of the money, in whatever minute it was spent."""
    points = measured(
        pages, experiment, "total_cost", dimensions=["span_model_name"], time_interval_seconds=60,
        start_time_ms=int(time.time() * 1000) - 3_600_000,
    )  # fmt: skip
    assert sum(point["values"].get("SUM") or 0.0 for point in points) == pytest.approx(filled.usd, abs=CLOSE)


def test_the_tokens_are_the_ledgers(pages: str, experiment: str, filled: Filled) -> None:
    """Token Usage on Overview > Usage counts each attempt once, and a cached answer not at all."""
    points = measured(pages, experiment, "total_tokens", view_type="TRACES")
    paid = [record for record in filled.records if not record.cached]
    expected = sum((record.input_tokens or 0) + (record.output_tokens or 0) for record in paid)
    assert sum(point["values"]["SUM"] for point in points) == expected > 0


def test_each_trace_tells_user_session_status_and_cost(pages: str, experiment: str, filled: Filled) -> None:
    """The Traces page has columns for all of these; the cost of each is that of its records."""
    place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
    traces = ask(pages, "ajax-api/3.0/mlflow/traces/search", {"locations": [place], "max_results": 50})["traces"]
    assert len(traces) == 6
    by_id = {trace["trace_id"]: trace for trace in traces}
    for trace_id, trace in by_id.items():
        record = next(record for record in filled.records if record.trace_id == trace_id)
        cost = json.loads(trace["trace_metadata"]["mlflow.trace.cost"])["total_cost"]
        assert cost == pytest.approx(filled.usd_by_trace()[trace_id], abs=CLOSE)
        assert trace["trace_metadata"].get("mlflow.trace.user") == record.user
        assert trace["trace_metadata"].get("mlflow.trace.session") == record.session
    status = {trace_id: trace["tags"].get("dspy_prod.status") for trace_id, trace in by_id.items()}
    assert status[filled.cached] == "cached"
    assert status[filled.retried] == status[filled.fallen] == "ok"
    assert status[filled.failed] == "fallback"
    assert by_id[filled.failed]["response_preview"] == "fallback: upstream_error: A colleague will answer you."
    assert by_id[filled.failed]["tags"]["dspy_prod.tag.channel"] == "mail"


def test_attempts_are_spans_with_their_own_costs(pages: str, filled: Filled) -> None:
    """A trace's page shows one span per attempt, failed ones as failed, and money on the attempt that cost it."""

    def attempts(trace_id: str) -> list[tuple[str, bool, bool]]:
        spans = ask(pages, f"ajax-api/3.0/mlflow/get-trace-artifact?request_id={trace_id}")["spans"]
        found = [span for span in spans if "dspy_prod.attempt" in span["attributes"]]
        found.sort(key=lambda span: int(span["start_time_unix_nano"]))
        return [
            (
                span["name"],
                any(event["name"] == "exception" for event in span["events"]),
                json.loads(span["attributes"]["mlflow.llm.cost"])["total_cost"] > 0,
            )
            for span in found
        ]

    assert attempts(filled.retried) == [("attempt 1", True, False), ("attempt 2", False, True)]
    assert attempts(filled.fallen) == [
        ("attempt 1", True, False),
        ("attempt 2", True, False),
        ("attempt 1 (triage-small)", False, True),
    ]
    assert attempts(filled.cached) == [("cache", False, False)]


def test_the_prompts_have_versions_aliases_and_traces(pages: str, filled: Filled) -> None:
    """Two versions have an alias each, and every trace of the program is linked to the one that answered."""
    client = MlflowClient(pages, pages)
    first, second = (client.get_prompt_version("triage", number) for number in (1, 2))
    assert (first.aliases, second.aliases) == (["previous"], ["production"])
    assert (first.commit_message, second.commit_message) == ("as written", "refined, with an example")
    assert [message["role"] for message in first.template] == ["system", "user"]
    assert [message["role"] for message in second.template] == ["system", "user", "assistant", "user"]
    for version, told in ((first, DRAFT), (second, FINAL)):
        assert told in version.template[0]["content"]
        assert "{{message}}" in version.template[-1]["content"]
    assert EXAMPLE["message"] in second.template[1]["content"]
    for trace_id in filled.usd_by_trace():
        tags = ask(pages, f"ajax-api/2.0/mlflow/traces/{trace_id}/info")["trace_info"]["tags"]
        told = {tag["key"]: tag["value"] for tag in tags}
        if trace_id == filled.bare:
            assert "mlflow.linkedPrompts" not in told
            continue
        assert told["dspy_prod.prompt_version"] == "triage/2"
        assert json.loads(told["mlflow.linkedPrompts"]) == [{"name": "triage", "version": "2"}]
