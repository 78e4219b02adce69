"""Demos with values that JSON does not know: published as they are rendered, or refused by name."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import dspy
import pytest

from dspy_prod import ConfigError, registry
from tests.registry.published.test_publish_and_load import sent


def having(*demos: Any, signature: str = "a -> b") -> dspy.Predict:
    """A program with these demos."""
    program = dspy.Predict(signature)
    program.demos = list(demos)
    return program


@pytest.mark.parametrize(
    "demo",
    [
        {"a": float("nan"), "b": float("inf")},
        {"a": decimal.Decimal("1.10"), "b": dt.timedelta(1)},
        {"a": 10**40, "b": 1e22},
        {"a": True, "b": None},
        {"a": "\ud83d", "b": "a\x00b\r\n\u2028"},
        {"a": {1: 2}, "b": b"bytes"},
        dspy.Prediction(a="1", b="2"),
    ],
)
def test_an_odd_value_is_rendered_as_before(store: str, demo: Any) -> None:
    """What the model sees of it is the same, byte for byte."""
    program = having(demo)
    registry.publish(program, "it")
    assert sent(registry.load("it/1", dspy.Predict("a -> b"))) == sent(program)


@pytest.mark.parametrize("value", [(1, 2), frozenset([1])])
def test_a_value_that_would_be_rendered_differently_is_refused(store: str, value: Any) -> None:
    """DSPy renders a tuple in a text field, but fails on the list that JSON makes of it: the error names the demos."""
    with pytest.raises(ConfigError, match=r"demos of predictor 'self'.*replace them"):
        registry.publish(having({"a": value, "b": "x"}), "it")
    assert registry.programs() == []


def test_a_tuple_in_a_field_of_tuples_comes_back(store: str) -> None:
    """The field's type says what the list was."""
    program = having({"pair": (1, 2), "b": "x"}, signature="pair: tuple[int, int] -> b")
    registry.publish(program, "it")
    assert sent(registry.load("it/1", dspy.Predict("pair: tuple[int, int] -> b"))) == sent(program)
