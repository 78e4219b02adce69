"""Vectors in MLflow: spans of their own type, with what they cost."""

from __future__ import annotations

from collections.abc import Callable

import dspy

import dspy_prod
from dspy_prod import tracking
from dspy_prod.testing import Provider
from tests.tracking.conftest import assert_same_costs, traces_in

MODEL = "openai/text-embedding-3-small"


def test_an_embedder_s_call_is_a_trace_with_its_cost(track: Callable[..., None], uri: str) -> None:
    """By itself and within a program; an attempt a batch, and what the cache gave."""
    track()
    with Provider(prices={MODEL: (0.02, 0.0)}) as provider:
        embedder = dspy_prod.Embedder(
            MODEL, batch_size=2, api_key="k", api_base=provider.url, store="memory://traced", namespace="t"
        )

        class Search(dspy.Module):
            def forward(self, question: str) -> dspy.Prediction:
                return dspy.Prediction(found=embedder([question, "b"]).shape)

        embedder(["a", "b", "c"])
        dspy_prod.Production(Search())(question="why")
        assert tracking.flush()
    found = {trace.data.spans[0].name: trace for trace in traces_in(uri)}
    alone, program = found[MODEL], found["Search"]
    spans = {span.name: span for span in alone.data.spans}
    assert [span.span_type for span in alone.data.spans] == ["EMBEDDING"] * 3
    assert spans[MODEL].inputs == {"input": ["a", "b", "c"]}
    assert spans[MODEL].outputs == {"vectors": 3, "dimension": 16}
    assert spans["attempt 1"].get_attribute("mlflow.llm.model") == MODEL
    assert [span.span_type for span in program.data.spans] == ["CHAIN", "EMBEDDING", "EMBEDDING", "EMBEDDING"]
    assert "cache" in {span.name for span in program.data.spans}
    assert_same_costs(uri, embedder.ledger.records())
    embedder.pipeline.store.close()
