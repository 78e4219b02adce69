"""Callbacks hear of each call once, with what went in and out."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback

from dspy_prod.testing import Provider, Status
from tests.dspy_suite.conftest import Make


class Listening(BaseCallback):  # type: ignore[misc]
    """Writes everything down."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.parents: dict[str, Any] = {}

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.parents[call_id] = ACTIVE_CALL_ID.get()
        self.heard.append(("module_start", inputs))

    def on_module_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        self.heard.append(("module_end", exception))

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.parents[call_id] = ACTIVE_CALL_ID.get()
        self.heard.append(("lm_start", inputs))

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        self.heard.append(("lm_end", outputs if exception is None else exception))

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.heard.append(("format_start", None))

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        self.heard.append(("parse_end", outputs))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("where", ["lm", "settings"])
def test_an_lm_call_is_heard(make: Make, where: str, way: str) -> None:
    ear = Listening()
    lm = make(**({"callbacks": [ear]} if where == "lm" else {}))
    with dspy.context(**({"callbacks": [ear]} if where == "settings" else {})):
        asyncio.run(lm.acall("?", temperature=0.4)) if way == "async" else lm("?", temperature=0.4)
    (start, inputs), (end, outputs) = ear.heard
    assert (start, end) == ("lm_start", "lm_end")
    assert (inputs["prompt"], inputs["kwargs"] if "kwargs" in inputs else inputs["temperature"]) in [
        ("?", 0.4), ("?", {"temperature": 0.4}),
    ]  # fmt: skip
    assert outputs == ["ok"]


def test_a_cached_answer_is_heard_too(make: Make) -> None:
    ear = Listening()
    lm = make(callbacks=[ear])
    lm("?")
    lm("?")
    assert ear.names == ["lm_start", "lm_end"] * 2


def test_a_failure_is_heard(make: Make, provider: Provider) -> None:
    ear = Listening()
    provider.faults = Status(400)
    with pytest.raises(Exception, match="nvalid request") as caught:
        make(callbacks=[ear])("?")
    assert ear.heard[-1] == ("lm_end", caught.value)


def test_calls_nest(lm: Any) -> None:
    ear = Listening()
    with dspy.context(lm=lm, callbacks=[ear]):
        dspy.ChainOfThought("question -> answer")(question="?")
    assert ear.names == [
        "module_start", "module_start", "format_start", "lm_start", "lm_end", "parse_end", "module_end", "module_end",
    ]  # fmt: skip
    parents = list(ear.parents.values())
    assert parents[0] is None
    assert all(parent is not None for parent in parents[1:])
