"""Costs, prompt versions and variants of every call in MLflow: `dspy_prod.tracking.enable()`.

From the tap (`nodes`, `calls`) through one queue (`courier`, `traces`, `spans`) to a process of its own (`delivery`,
`process`, `exporter`, `sink`) that alone writes to MLflow. What a trace shows belongs in `spans`, `endings` and
`content`; calls never wait for anything here. Runs and feedback that are told while calls are served (`run_messages`)
go the same way. A piece of work that keeps runs with artifacts (`runs`), such as an optimization, has such a process of
its own (`runs_exporter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.tracking.run_messages import RunMessages, TrackedRun
    from dspy_prod.tracking.setup import TrackingHealth, disable, enable, status
    from dspy_prod.tracking.waiting import flush

__getattr__, __dir__ = door(
    __name__,
    {
        "run_messages": "RunMessages TrackedRun",
        "setup": "TrackingHealth disable enable status",
        "waiting": "flush",
    },
)

__all__ = ["RunMessages", "TrackedRun", "TrackingHealth", "disable", "enable", "flush", "status"]
