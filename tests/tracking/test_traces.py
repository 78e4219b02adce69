"""Traces in the making, sampling, and what of their content is shown: without MLflow and without a process."""

from __future__ import annotations

import random
import time
from typing import Any

import orjson
import pytest

from dspy_prod import Redactor
from dspy_prod.context.current import CallContext
from dspy_prod.records import CallRecord
from dspy_prod.tracking.batches import Batch
from dspy_prod.tracking.calls import LeanNode
from dspy_prod.tracking.content import LONGEST, Content, plain
from dspy_prod.tracking.nodes import LM, PROGRAM
from dspy_prod.tracking.sampling import Sampler
from dspy_prod.tracking.traces import PATIENCE, Traces


class Route:
    """All that is asked of a route here."""

    breaker = None

    def rates(self) -> None:
        return None


class Posted:
    """A courier that only keeps what is posted."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def post(self, item: Any) -> None:
        self.items.append(item)


def node(
    courier: Any,
    name: str = "lm",
    kind: str = LM,
    parent: LeanNode | None = None,
    *,
    live: bool = False,
    **context: Any,
) -> LeanNode:
    """A node, below another one or of a trace of its own."""
    number = random.Random().getrandbits(128)
    ids = f"{number:032x}", f"{number >> 64:016x}", None
    if parent is not None:
        ids = parent.trace_id, f"{number >> 64:016x}", parent.span_id
    return LeanNode(courier, name, kind, {"prompt": "q"}, CallContext(**context), *ids, live)


def record(id: str, cost: int | None = 5_000, **fields: Any) -> CallRecord:
    """A ledger record."""
    told = {"started_at": 1.0, "model": "openai/m", "route": "primary", "attempt": 1, "outcome": "ok"}
    tokens = {"input_tokens": 3, "output_tokens": 4}
    return CallRecord(id=id, call_id="c", cost_nano=cost, **{**told, **tokens, **fields})


def traces(content: str = "full", share: float = 1.0, bridged: bool = False) -> Traces:
    return Traces(Content(content, Redactor()), Sampler(share), bridged)  # type: ignore[arg-type]


def attempt(made: Traces, on: LeanNode, row: CallRecord) -> None:
    made.attempted(on, row, Route(), None, None)  # type: ignore[arg-type]


def end(made: Traces, on: LeanNode, outputs: Any = "a", error: BaseException | None = None, **told: Any) -> None:
    on.answered(outputs, **told)
    on.error = error
    on.ended_ns = on.started_ns + 1000
    made.ended(on)


def only(batches: list[Batch]) -> Batch:
    (batch,) = batches
    return batch


def attribute(span: dict[str, Any], name: str) -> Any:
    coded = span["attributes"].get(name)
    return None if coded is None else orjson.loads(coded)


def test_a_program_s_calls_are_one_trace_that_is_shipped_when_it_ends() -> None:
    """Attempts and LM calls wait for their program; then all of them leave at once, counted as one trace."""
    made, post = traces(), Posted()
    root = node(post, "triage", PROGRAM)
    inner = node(post, parent=root)
    attempt(made, inner, record("r1"))
    end(made, inner)
    assert made.ready(time.monotonic(), at_once=True) == []
    end(made, root)
    batch = only(made.ready(1e9))
    assert batch.traces == 1
    assert [span["name"] for span in batch.spans] == ["attempt 1", "lm", "triage"]
    assert len({span["trace_id"] for span in batch.spans}) == 1
    assert batch.spans[0]["parent_span_id"] == batch.spans[1]["span_id"]
    assert batch.spans[1]["parent_span_id"] == batch.spans[2]["span_id"]


def test_what_comes_after_a_trace_was_shipped_follows_and_is_not_counted_again() -> None:
    """A late attempt belongs to the same trace and the same span."""
    made, root = traces(), node(Posted())
    end(made, root)
    first = only(made.ready(1e9))
    attempt(made, root, record("late"))
    second = only(made.ready(1e9))
    assert (first.traces, second.traces) == (1, 0)
    assert [span["name"] for span in second.spans] == ["attempt 1"]
    assert second.spans[0]["parent_span_id"] == first.spans[0]["span_id"]
    assert made.ready(1e9, at_once=True) == []


def test_a_trace_whose_end_never_comes_is_shipped_all_the_same() -> None:
    """After a quarter of an hour, or when the program ends."""
    for late, unfinished in ((PATIENCE + 1, False), (0.0, True)):
        made, root = traces(), node(Posted())
        attempt(made, root, record("r"))
        began = next(iter(made._open.values())).begun
        assert made.ready(began, at_once=True) == []
        assert only(made.ready(began + late, at_once=True, unfinished=unfinished)).traces == 1


def test_ended_traces_wait_a_moment_for_company() -> None:
    """Several are written at once, fifty at most."""
    made = traces()
    for _ in range(150):
        end(made, node(Posted()))
    assert [batch.traces for batch in made.ready(1e9)] == [50, 50, 50]


def test_sampling_leaves_out_whole_traces_and_what_follows_them() -> None:
    """A trace that was left out is counted, and its late attempts are left out too."""
    made, root = traces(share=0.0), node(Posted())
    attempt(made, root, record("r"))
    end(made, root)
    attempt(made, root, record("late"))
    assert made.ready(1e9, at_once=True) == []
    assert made.sampled_out == 1


@pytest.mark.parametrize(
    ("row", "told", "error"),
    [
        (record("r", outcome="error", error="LMServerError"), {}, None),
        (record("r", route="anthropic/haiku"), {}, None),
        (record("r", outcome="stale", cached=True), {}, None),
        (record("r"), {"status": "fallback"}, None),
        (record("r"), {}, ValueError("no")),
    ],
)
def test_sampling_keeps_what_is_worth_a_look(row: CallRecord, told: dict[str, Any], error: Any) -> None:
    """Errors, retries, model fallbacks, stale and canned answers are always kept."""
    made, root = traces(share=0.0), node(Posted())
    attempt(made, root, row)
    end(made, root, error=error, **told)
    assert only(made.ready(1e9)).traces == 1


def test_sampling_is_fair_keeps_the_dearest_and_is_the_same_everywhere() -> None:
    """A tenth of the ordinary ones by their id, and those that cost more than 99 % of the recent ones."""
    draw = random.Random(1)
    ids = [f"{draw.getrandbits(128):032x}" for _ in range(5000)]
    one, other = Sampler(0.1), Sampler(0.1)
    kept = [one.keeps(trace_id, False, 100) for trace_id in ids]
    assert kept == [other.keeps(trace_id, False, 100) for trace_id in ids]
    assert 0.08 < sum(kept) / len(kept) < 0.12
    never = Sampler(0.0)
    costs = [never.keeps(trace_id, False, draw.randrange(1000)) for trace_id in ids]
    assert 0.002 < sum(costs) / len(costs) < 0.03
    assert never.keeps(ids[0], False, 10**6)
    assert all(Sampler(1.0).keeps(trace_id, False, 0) for trace_id in ids)


def test_a_cost_that_is_not_known_is_left_out() -> None:
    """Neither a cost nor tokens that MLflow would price by itself."""
    made, root = traces(), node(Posted())
    attempt(made, root, record("r", cost=None))
    end(made, root)
    span = only(made.ready(1e9)).spans[0]
    assert attribute(span, "mlflow.llm.cost") is None
    assert attribute(span, "mlflow.chat.tokenUsage") is None
    assert attribute(span, "mlflow.llm.model") == "openai/m"


@pytest.mark.parametrize("mode", ["full", "redacted", "off"])
def test_content_is_shown_as_asked_for(mode: str) -> None:
    """Full, without personal data and secrets, or not at all; an error's text too."""
    made = traces(mode)
    root = node(Posted(), user="u1")
    root.inputs = {"messages": [{"role": "user", "content": "write to jane@example.com"}], "prompt": None}
    end(made, root, ["card 4111 1111 1111 1111"], ValueError("jane@example.com is unknown"))
    span = only(made.ready(1e9)).spans[0]
    text = orjson.dumps(span).decode()
    assert ("jane@example.com" in text) is (mode == "full")
    assert ("4111" in text) is (mode == "full")
    assert (attribute(span, "mlflow.spanInputs") is None) is (mode == "off")
    if mode == "redacted":
        assert attribute(span, "mlflow.spanInputs")["messages"][0]["content"] == "write to <email>"
    assert span["status"]["code"] == "STATUS_CODE_ERROR"
    assert attribute(span, "user.id") == "u1"


def test_any_value_can_be_shown() -> None:
    """Media by their kind, long texts cut, foreign objects as text, circles ended."""
    image = {"url": "data:image/png;base64," + "A" * 500}
    circle: list[Any] = []
    circle.append(circle)
    shown = plain({"i": image, "b": b"abc", "t": "x" * (LONGEST + 5), 7: {1}, "o": Route, "c": circle})
    assert shown["i"] == {"url": "[media]"}
    assert shown["b"] == "[3 bytes]"
    assert shown["t"].endswith("[5 more characters]")
    assert shown["7"] == [1]
    orjson.dumps(shown)


def test_foreign_spans_stay_json_when_they_are_redacted() -> None:
    """MLflow's own spans hold JSON texts; a hit at a quote must not break them."""
    content = Content("redacted", Redactor())
    inputs = orjson.dumps({"text": 'mail "jane@example.com", password: "hunter2secret"', "n": 1}).decode()
    span = {"attributes": {"mlflow.spanInputs": inputs, "mlflow.spanType": '"LLM"'}, "status": {"message": "x"}}
    shown = content.foreign(span)
    value = orjson.loads(shown["attributes"]["mlflow.spanInputs"])
    assert "jane@example.com" not in value["text"]
    assert value["n"] == 1
    assert shown["attributes"]["mlflow.spanType"] == '"LLM"'
    off = Content("off", Redactor()).foreign(span)
    assert "mlflow.spanInputs" not in off["attributes"]
