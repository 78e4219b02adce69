"""What the helpers of an LM need of it: its arguments and what runs beneath."""

from __future__ import annotations

from typing import Any, Protocol

from dspy_prod.compat.dspy import Engined
from dspy_prod.lm.settings import Settings
from dspy_prod.pipeline.pipeline import Pipeline


class Beneath(Engined, Protocol):
    """An LM, seen from the rooms that it uses."""

    model_type: Any
    cache: bool
    kwargs: dict[str, Any]
    settings: Settings
    pipeline: Pipeline
    identity: Any
    _variants: Any

    def _install(self, settings: Settings, pipeline: Pipeline | None = None) -> None: ...
