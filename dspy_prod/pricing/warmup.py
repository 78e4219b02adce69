"""Model metadata, loaded beside the program: the first look at a price would else wait for the network."""

from __future__ import annotations

import logging
import threading

from dspy_prod.compat.dspy import renew_metadata_lock
from dspy_prod.pricing.lookup import preload
from dspy_prod.runtime.forking import IMPORTING, reset_after_fork
from dspy_prod.runtime.threads import begin

_log = logging.getLogger("dspy_prod")


class Warmup:
    """Loads once a process, on a daemon thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless that was done; never waits, never raises."""
        if self._thread is not None:
            return
        self._thread = begin("dspy_prod-warmup", _load)

    def _after_fork(self) -> None:
        running, self._thread = self._thread, None
        if running is not None:
            renew_metadata_lock()


def _load() -> None:
    try:
        with IMPORTING:
            preload()
    except Exception:
        _log.debug("Model metadata could not be loaded ahead; the first call tries again", exc_info=True)


WARMUP = Warmup()
reset_after_fork(WARMUP)
