"""A record is written by position; each fact must stand under its own name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dspy.lm15 import Usage

from dspy_prod.context.current import CallContext
from dspy_prod.pipeline.call import Call
from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.ids import IDS


class Refused(Exception):
    status = 418


BY_THE_MACHINE = SimpleNamespace(clock=SYSTEM_CLOCK)


def call(pipeline: Any = BY_THE_MACHINE) -> Call:
    """A call whose context has another value in each field."""
    context: Any = CallContext(**{name: f"the context's {name}" for name in CallContext._fields})
    return Call(pipeline, None, context, None, None, False, [])  # type: ignore[arg-type]  # no record looks at it


@pytest.mark.parametrize("estimated", [True, False])
def test_each_field_of_a_record_has_its_own_fact(estimated: bool) -> None:
    """A field added in one place alone would shift all after it: a user's name under `tenant`, money under tokens."""
    asked = call()
    asked.waited = 0.5
    route: Any = SimpleNamespace(model="the model", name="the route")
    usage = Usage(input_tokens=21, output_tokens=22, cache_read_tokens=23, reasoning_tokens=24, cache_write_tokens=25)
    record = asked.record(
        route, "the id", 7, "the outcome", 11, 1.5, estimated=estimated, usage=usage, latency=2.5,
        cached=not estimated, error=Refused(), accounts=("an account",),
    )  # fmt: skip
    facts = {
        "id": "the id",
        "call_id": asked.id,
        "started_at": 1.5,
        "model": "the model",
        "route": "the route",
        "attempt": 7,
        "outcome": "the outcome",
        "cost_nano": 11,
        "estimated": estimated,
        "error": "Refused",
        "status": 418,
        "input_tokens": 21,
        "output_tokens": 22,
        "cached_tokens": 23,
        "reasoning_tokens": 24,
        "cached": not estimated,
        "latency": 2.5,
        "waited": 0.5,
        "accounts": ("an account",),
        "reason": None,
        "saved_nano": None,
    }
    of_context = set(CallContext._fields) & set(CallRecord._fields)
    facts.update({name: f"the context's {name}" for name in of_context})
    assert type(record) is CallRecord
    assert len(record) == len(CallRecord._fields)
    assert record._asdict() == facts


def test_a_record_of_nothing_told_has_the_defaults_of_its_type() -> None:
    """What `record` leaves out must read as what `CallRecord(...)` leaves out."""
    asked = Call(None, None, CallContext(), None, None, False, [])  # type: ignore[arg-type]
    route: Any = SimpleNamespace(model="m", name="r", operation="chat")
    record = asked.record(route, "id", 1, "ok", None, 0.0)
    assert record == CallRecord("id", asked.id, 0.0, "m", "r", 1, "ok", None)


def test_a_record_reaches_the_call_its_node_who_collects_and_who_meters() -> None:
    """One attempt, told once to each."""
    told: list[Any] = []
    collected: list[CallRecord] = []
    node: Any = SimpleNamespace(attempt=lambda *facts: told.append(facts))
    metered: list[Any] = []
    bus: Any = SimpleNamespace(hears_calls=False, meters=(metered.append,))
    context = CallContext(records=collected, node=node)
    asked = Call(SimpleNamespace(bus=bus), None, context, None, None, False, [])  # type: ignore[arg-type]
    route: Any = SimpleNamespace(model="m", name="r", operation="chat")
    record = asked.record(route, "id", 1, "ok", None, 0.0)

    asked.remember(record, route)

    assert (asked.records, collected, told) == ([record], [record], [(record, route, None, None)])
    assert metered == [(record, None, "chat")]


def test_ids_are_unique_ordered_and_new_in_a_child() -> None:
    """A database's index stays dense, and a fork never repeats its parent's ids."""
    before = [IDS.make() for _ in range(3)]
    assert before == sorted(set(before))
    IDS._after_fork()
    assert IDS.make().partition("-")[0] != before[0].partition("-")[0]
