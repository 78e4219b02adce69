"""What stands beneath an LM, seen from the rooms that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from dspy_prod.compat.dspy import ENGINES, Engined
from dspy_prod.lm.settings import Settings
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.runtime.recent import Recent

MAX_VARIANTS: Final = 16
"""LMs with per-call settings that an LM keeps, so that connections and cache serve the next such call too."""

INSTALLED: Final = ("pipeline", "settings", "identity", "watched", "_variants", *ENGINES)
"""Attributes that `LM._install` sets."""


class Watching(Protocol):
    """See `watching.Watched`."""

    elsewhere: bool

    def holds(self, model: str, kwargs: Mapping[str, Any]) -> bool: ...


class Beneath(Engined, Protocol):
    """What the rooms beneath need of an LM: its arguments, and what was installed for them."""

    model_type: str
    cache: bool
    kwargs: dict[str, Any]
    settings: Settings
    pipeline: Pipeline
    identity: bytes
    watched: Watching
    _variants: Recent[Beneath]

    def _install(self, settings: Settings) -> None: ...
