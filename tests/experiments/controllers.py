"""What processes do in the tests of controllers; imported by the process that they are forked from."""

from __future__ import annotations

import threading

from dspy_prod.experiments.attending import attend
from dspy_prod.experiments.opened import Opened
from dspy_prod.stores.opening import open_store


def attending(url: str, every: float) -> None:
    """A controller that goes on until it is killed, or the experiment is over."""
    attend(Opened(open_store(url, "test"), "e"), every, threading.Event())
