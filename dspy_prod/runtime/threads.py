"""Threads of this library: how they begin, and what is done when none can.

A process may have as many threads as it is allowed, for a moment or for long. Whoever needs one then goes on without,
tries again when it is next asked for something, and health says so meanwhile.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

_log = logging.getLogger("dspy_prod")

_MISSING: Final[dict[str, str]] = {}


def begin(name: str, body: Callable[..., None], *args: Any) -> threading.Thread | None:
    """Start a daemon thread.

    Args:
        name: what it is called in stack traces, and in health while it cannot be started.
        body: what it does.
        args: what `body` is given.

    Returns:
        The thread; None when none can be started now, because the process has as many as it may, or is ending.
    """
    thread = threading.Thread(target=body, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        if name not in _MISSING and not sys.is_finalizing():
            _log.warning("The thread %s could not be started (%s); it is tried again", name, error)
        _MISSING[name] = str(error)
        return None
    _MISSING.pop(name, None)
    return thread


def missing() -> dict[str, str]:
    """Threads that could not be started when they were last needed, each with the reason."""
    return dict(_MISSING)
