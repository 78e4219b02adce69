"""Who writes a parameter's state, and who reads it."""

from __future__ import annotations

from typing import Any

from dspy.predict.parameter import Parameter


def is_parameter(program: Any) -> bool:
    """Whether a program is one itself, as `dspy.Predict` and `dspy.Flex`: its state is that of the program."""
    return isinstance(program, Parameter)
