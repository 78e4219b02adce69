"""Waiting for everything that MLflow is told: traces of calls, and the runs of optimizations."""

from __future__ import annotations

import time

from dspy_prod.tracking import runs, setup


def flush(timeout: float = 30.0) -> bool:
    """Wait until every trace that has ended, and all that was told of optimizations, is in MLflow or known to be lost.

    Of an optimization that goes on, that is what it came to so far. What it came to is waited for after `disable` too.

    Args:
        timeout: seconds.

    Returns:
        False when that took longer, or tracking is off.

    Example:
        ```python
        lm("hello")
        tracking.flush(30)  # in a notebook, before looking at MLflow's page
        ```
    """
    until = time.monotonic() + timeout
    traces = setup.flush_traces(timeout)
    return runs.flush(max(0.0, until - time.monotonic())) and traces
