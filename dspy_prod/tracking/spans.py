"""Spans as MLflow stores them, made from what a call did. Pure: no MLflow, no clock, no I/O.

A trace is a tree: a program's call (if it is a `Production`), the LM calls in it, and beneath each LM call one span per
upstream attempt. Cost, model and tokens stand on attempts alone, so that sums over spans are right
(`mlflow.llm.cost`, `mlflow.llm.model`, `mlflow.llm.provider`, `mlflow.chat.tokenUsage`).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

from dspy_prod.context.current import CallContext, mark_of
from dspy_prod.records import ANSWERED, NANO, CallRecord
from dspy_prod.telemetry.tap import Tariff
from dspy_prod.tracking.attributes import COST, MODEL, PROVIDER, REQUEST_ID, TAG, TYPE, USAGE, dumped, valid
from dspy_prod.tracking.calls import LeanNode

HEADLINES: Final = {"dspy_prod.user": "mlflow.trace.user", "dspy_prod.session": "mlflow.trace.session"}
"""What MLflow has a place of its own for in a trace."""
UNTAGGED: Final = frozenset({*HEADLINES, "dspy_prod.priority"})

_WHOSE: Final = ("user", "tenant", "session", "priority", "run", "program", "experiment", "variant", "prompt_version")

LONGEST_NAME: Final = 250
"""Characters of a name that MLflow's tables hold."""

Span = dict[str, Any]


def span(
    trace_id: str,
    span_id: str,
    parent_id: str | None,
    name: str,
    started_ns: int,
    ended_ns: int,
    attributes: Mapping[str, Any],
    error: str | None = None,
    raised: str | None = None,
) -> Span:
    """One span in the form `mlflow.entities.Span.from_dict` reads.

    Args:
        trace_id: 32 hex digits. span_id, parent_id: 16 hex digits each.
        started_ns, ended_ns: nanoseconds since the epoch.
        attributes: JSON-friendly values; None ones are left out.
        error: what went wrong, None when nothing did. raised: its class, when there is one.
    """
    ended_ns = max(started_ns, ended_ns)
    coded = {key: dumped(value) for key, value in attributes.items() if value is not None}
    coded[REQUEST_ID] = dumped(f"tr-{trace_id}")
    events = []
    if error is not None:  # by this event MLflow's pages know a span that failed; they do not look at its status
        told = {"exception.type": raised or "error", "exception.message": error}
        events = [{"name": "exception", "time_unix_nano": ended_ns, "attributes": told}]
    return {
        "trace_id": _base64(trace_id),
        "span_id": _base64(span_id),
        "parent_span_id": None if parent_id is None else _base64(parent_id),
        "name": valid(name)[:LONGEST_NAME],
        "start_time_unix_nano": started_ns,
        "end_time_unix_nano": ended_ns,
        "status": {"code": "STATUS_CODE_OK" if error is None else "STATUS_CODE_ERROR", "message": valid(error or "")},
        "attributes": coded,
        "events": events,
    }


def chat(inputs: Any, outputs: Any) -> tuple[Any, Any]:
    """What went into and came out of an LM that was called by itself, in the form from which MLflow's list of traces
    takes the question and the answer. (Beneath a program, MLflow's page of a trace shows DSPy's own form better.)
    """
    if isinstance(inputs, Mapping) and isinstance(inputs.get("prompt"), str) and not inputs.get("messages"):
        inputs = {"messages": [{"role": "user", "content": inputs["prompt"]}]}
    if isinstance(outputs, list) and outputs and all(isinstance(text, str) for text in outputs):
        outputs = {"choices": [{"message": {"role": "assistant", "content": text}} for text in outputs]}
    return inputs, outputs


_SERVED: Final = {"stale": "stale answer", "replayed": "replayed answer"}


def attempt_name(record: CallRecord) -> str:
    """What to call an attempt in the tree."""
    if record.cached:
        return _SERVED.get(record.outcome, "cache")
    # The tree is narrow: a fallback's provider is told by the span's model.
    route = "" if record.route == "primary" else f" ({record.route.rpartition('/')[2]})"
    return f"attempt {record.attempt}{route}"


def attempt_error(record: CallRecord) -> str | None:
    """Why an attempt gave no answer, None if it did."""
    if record.outcome in ANSWERED:
        return None
    status = "" if record.status is None else f" {record.status}"
    return f"{record.outcome}: {record.error}{status}" if record.error else record.outcome


def attempt_attributes(record: CallRecord, breaker: str | None, input_nano: int | None) -> dict[str, Any]:
    """What is told of an attempt.

    Args:
        breaker: the circuit's state when it ended, None without a breaker.
        input_nano: the part of the cost that the prompt caused, None when only the sum is known.
    """
    provider, slash, _ = record.model.partition("/")
    attributes: dict[str, Any] = {  # in the order in which MLflow shows them: what one looks for first
        TYPE: "LLM",
        MODEL: record.model,
        PROVIDER: provider if slash else None,
        COST: cost(record, input_nano),
        USAGE: usage(record),
        "dspy_prod.outcome": record.outcome,
        "dspy_prod.error": record.error,
        "dspy_prod.status": record.status,
        "dspy_prod.cost_usd": record.cost_usd,
        "dspy_prod.unconfirmed": record.estimated,
        "dspy_prod.cache_hit": record.cached,
        "dspy_prod.route": record.route,
        "dspy_prod.attempt": record.attempt,
        "dspy_prod.breaker": breaker,
        "dspy_prod.latency_seconds": round(record.latency, 6),
        "dspy_prod.queue_wait_seconds": round(record.waited, 6),
        "dspy_prod.record_id": record.id,
        "dspy_prod.call_id": record.call_id,
    }
    attributes.update(whose(record))
    return attributes


def whose(source: CallRecord | CallContext) -> dict[str, Any]:
    """On whose behalf and for which variant, as attributes."""
    found = ((name, getattr(source, name)) for name in _WHOSE)
    attributes: dict[str, Any] = {f"dspy_prod.{name}": value for name, value in found if value is not None}
    attributes.update({f"dspy_prod.tag.{name}": value for name, value in source.tags})
    return attributes


def known(node: LeanNode) -> dict[str, Any]:
    """What a call says of itself before any attempt has: the program, and its version."""
    inner = (_mark(module) for module in (node.subject, *reversed(node.callers or ())) if module is not None)
    version = next((mark for mark in inner if mark is not None), None)
    told = {"dspy_prod.program": node.name if node.kind == "CHAIN" else None, "dspy_prod.prompt_version": version}
    return {name: str(value) for name, value in told.items() if value is not None}


def _mark(module: Any) -> str | None:
    try:
        return mark_of(module)
    except TypeError:  # no module: something else of the name that is looked for
        return None


def trace_attributes(whose: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Attributes of a root span that MLflow turns into the trace's user, session, name and tags."""
    attributes: dict[str, Any] = {
        f"{TAG}mlflow.traceName": name[:LONGEST_NAME],
        "user.id": _short(whose.get("dspy_prod.user")),
        "session.id": _short(whose.get("dspy_prod.session")),
    }
    attributes.update({TAG + key: value for key, value in tags_of(whose).items()})
    return attributes


def _short(name: Any) -> str | None:
    return None if name is None else str(name)[:LONGEST_NAME]


def tags_of(whose: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a trace; the prompt version that answered is linked in MLflow's pages."""
    tags = {key: str(value) for key, value in whose.items() if key not in UNTAGGED}
    name, _, version = str(whose.get("dspy_prod.prompt_version") or "").rpartition("/")
    if name and version.isdigit():
        tags["mlflow.linkedPrompts"] = dumped([{"name": name, "version": version}])
    return tags


def cost(record: CallRecord, input_nano: int | None) -> dict[str, float] | None:
    """USD of one attempt, as MLflow's cost attribute; None when the cost is not known, which is never zero."""
    total = record.cost_nano
    if total is None:
        return None
    parts = {}
    if input_nano is not None and 0 <= input_nano <= total:
        parts = {"input_cost": input_nano / NANO, "output_cost": (total - input_nano) / NANO}
    return {**parts, "total_cost": total / NANO}


def usage(record: CallRecord) -> dict[str, int] | None:
    """Tokens of one attempt as the provider told them; None for a cached answer, or when it did not."""
    inputs, outputs = record.input_tokens, record.output_tokens
    if record.cached or inputs is None or outputs is None or record.cost_nano is None:
        return None  # without a price of ours, MLflow would put one of its own to the tokens
    cached = {"cache_read_input_tokens": record.cached_tokens} if record.cached_tokens else {}
    return {**tokens(inputs, outputs), **cached}


def tokens(inputs: int, outputs: int) -> dict[str, int]:
    """Numbers of tokens in MLflow's words."""
    return {"input_tokens": inputs, "output_tokens": outputs, "total_tokens": inputs + outputs}


def record_span_id(record_id: str) -> str:
    """The span of a ledger record: the same for the same record, so that it is written once."""
    return blake2b(record_id.encode(), digest_size=8).hexdigest()


def input_nano(record: CallRecord, rates: Tariff | None, response: Any) -> int | None:
    """What the prompt cost, None when only the sum is known."""
    if record.cost_nano is None or record.estimated or rates is None or response is None or record.cached:
        return None
    try:
        usage = replace(
            response.usage, output_tokens=0, reasoning_tokens=0 if response.usage.reasoning_tokens else None
        )
        return rates.cost(usage)
    except (TypeError, ValueError, AttributeError):
        return None


def _base64(hexadecimal: str) -> str:
    return b64encode(bytes.fromhex(hexadecimal)).decode()
