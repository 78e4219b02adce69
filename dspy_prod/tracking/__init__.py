"""Costs, prompt versions and variants of every call in MLflow: `dspy_prod.tracking.enable()`.

From the tap (`nodes`, `calls`) through one queue (`courier`, `traces`, `spans`) to a process of its own (`delivery`,
`process`, `exporter`) that alone writes to MLflow. What a trace shows belongs in `spans` and `content`; calls never
wait for anything here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.tracking.setup import TrackingHealth, disable, enable, flush, status

__getattr__, __dir__ = door(__name__, {"setup": "TrackingHealth disable enable flush status"})

__all__ = ["TrackingHealth", "disable", "enable", "flush", "status"]
