"""Costs, prompt versions and variants of every call in MLflow: `dspy_prod.tracking.enable()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.tracking.setup import TrackingHealth, disable, enable, flush, status

__getattr__, __dir__ = door(__name__, {"setup": "TrackingHealth disable enable flush status"})

__all__ = ["TrackingHealth", "disable", "enable", "flush", "status"]
