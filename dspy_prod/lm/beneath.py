"""What stands beneath an LM, seen from the rooms that it uses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Final, Protocol

from dspy_prod.lm.settings import Settings
from dspy_prod.pipeline.engine import AsyncProdEngine, ProdEngine
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.runtime.forking import reset_after_fork

MAX_VARIANTS: Final = 16

INSTALLED: Final = ("pipeline", "settings", "identity", "_engine_spec", "_async_engine_spec", "_variants")
"""Attributes that `LM._install` sets."""


class Beneath(Protocol):
    """What the rooms beneath need of an LM: its arguments, and what was installed for them."""

    model: str
    model_type: str
    cache: bool
    kwargs: dict[str, Any]
    settings: Settings
    pipeline: Pipeline
    identity: bytes
    _engine_spec: ProdEngine
    _async_engine_spec: AsyncProdEngine
    _variants: Variants

    def _install(self, settings: Settings) -> None: ...


class Variants:
    """LMs with per-call settings, kept so that their cache, connections and pipeline serve the next such call too."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Beneath] = OrderedDict()
        self._lock = threading.Lock()
        reset_after_fork(self)

    def find(self, key: str) -> Beneath | None:
        """The LM for these settings, if it is kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: str, lm: Beneath) -> Beneath:
        """Keep an LM unless another thread was faster; which one it is."""
        with self._lock:
            kept = self._kept.setdefault(key, lm)
            while len(self._kept) > MAX_VARIANTS:
                self._kept.popitem(last=False)
            return kept

    def all(self) -> list[Beneath]:
        """Every LM kept."""
        with self._lock:
            return list(self._kept.values())

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
