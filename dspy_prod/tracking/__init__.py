"""Costs, prompt versions and variants of every call in MLflow: `dspy_prod.tracking.enable()`.

From the tap (`nodes`, `calls`) through one queue (`courier`, `traces`, `spans`) to a process of its own (`delivery`,
`process`, `exporter`) that alone writes to MLflow. What a trace shows belongs in `spans` and `content`; calls never
wait for anything here. Runs that somebody keeps in MLflow while his work goes on (`runs`) have such a process of their
own (`runs_exporter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.tracking.setup import TrackingHealth, disable, enable, status
    from dspy_prod.tracking.waiting import flush

__getattr__, __dir__ = door(__name__, {"setup": "TrackingHealth disable enable status", "waiting": "flush"})

__all__ = ["TrackingHealth", "disable", "enable", "flush", "status"]
