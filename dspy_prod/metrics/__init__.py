"""Numbers for dashboards and alarms: `dspy_prod.metrics.enable()`, and `prometheus()` for who has no OpenTelemetry.

A call puts its record into a queue (`inbox`), nothing more. What the records and events come to is summed elsewhere
(`sums`), what is true at the moment is looked up when somebody asks (`standing`), and `instruments` shows both to
OpenTelemetry under the names of the `catalogue`. `exposition` is the way from there to Prometheus.

A new number belongs in the catalogue first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.metrics.serving import Endpoint, prometheus, prometheus_app
    from dspy_prod.metrics.setup import disable, enable

__getattr__, __dir__ = door(
    __name__,
    {
        "serving": "Endpoint prometheus prometheus_app",
        "setup": "disable enable",
    },
)

__all__ = ["Endpoint", "disable", "enable", "prometheus", "prometheus_app"]
