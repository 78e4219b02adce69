"""DSPy's native engines, on connections of ours, ending their streams as the provider did."""

from __future__ import annotations

from typing import Any

from dspy.clients.engines.lm15_engine import timeouts_for

from dspy_prod.compat.lm15 import HookedAsyncLM15Engine, HookedLM15Engine
from dspy_prod.pipeline.upstream.deadline import MAX_CONNECTIONS
from dspy_prod.pipeline.upstream.finish import truthful
from dspy_prod.pipeline.upstream.pages import without_secrets


class NativeEngine(HookedLM15Engine):
    """The synchronous engine."""

    ended = staticmethod(truthful)
    cleaned = staticmethod(without_secrets)


class AsyncNativeEngine(HookedAsyncLM15Engine):
    """The asynchronous engine."""

    ended = staticmethod(truthful)
    cleaned = staticmethod(without_secrets)


def connections(timeout: Any) -> dict[str, Any]:
    """The arguments of a transport for an LM with this `timeout`."""
    timeouts = timeouts_for(timeout)
    known = {} if timeouts is None else {
        "connect_timeout": timeouts.connect,
        "read_timeout": timeouts.read,
        "write_timeout": timeouts.write,
        "pool_timeout": timeouts.pool,
    }  # fmt: skip
    return {"max_connections": MAX_CONNECTIONS, "user_agent": "dspy-prod", **known}
