"""What processes do in the tests of controllers; imported by the process that they are forked from."""

from __future__ import annotations

import threading
from typing import Any

from dspy_prod.experiments.attending import attend
from dspy_prod.experiments.opened import Opened
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.sqlite.store import SqliteStore

PRELOADED = SqliteStore
"""What takes long to import, and is then there in every process."""


def attending(url: str, every: float, begun: Any) -> None:
    """A controller that says when it begins, and goes on until it is killed, or the experiment is over."""
    opened = Opened(open_store(url, "test"), "e")
    begun.set()
    attend(opened, every, threading.Event())
