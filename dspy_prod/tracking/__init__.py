"""Costs, prompt versions and variants of every call in MLflow: `dspy_prod.tracking.enable()`.

From the tap (`nodes`) through one queue (`courier`, `traces`, `spans`) to a process of its own (`process`, `exporter`)
that alone writes to MLflow. What a trace shows belongs in `spans` and `content`; calls never wait for anything here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_prod.tracking.setup import TrackingHealth, disable, enable, flush, status

__all__ = ["TrackingHealth", "disable", "enable", "flush", "status"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dspy_prod.tracking' has no attribute {name!r}")
    value = getattr(import_module("dspy_prod.tracking.setup"), name)
    globals()[name] = value
    return value
