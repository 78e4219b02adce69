"""DSPy's LiteLLM engines, sending what a plain `dspy.LM` sends."""

from __future__ import annotations

import time
from math import ceil, inf
from typing import Any, Final

from dspy.lm15 import Request, Response

from dspy_prod.compat.dspy import import_locks, is_openai_reasoning_model
from dspy_prod.compat.litellm import HookedAsyncLiteLLMEngine, HookedLiteLLMEngine
from dspy_prod.compat.litellm_forked import leave_to_the_parent
from dspy_prod.pipeline.upstream.finish import untold_in, without_end
from dspy_prod.pipeline.upstream.litellm_usage import told, told_before, told_end
from dspy_prod.pipeline.upstream.ordinary import as_sent, signed
from dspy_prod.pipeline.upstream.pages import without_secrets
from dspy_prod.runtime.forking import PATIENCE, Stage, hold_while_forking, reset_after_fork

_TIMEOUTS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Time-outs given to LiteLLM for an attempt's remaining time: few, as each distinct one opens a new connection."""


def wire_timeout(timeout: Any, until: float) -> Any:
    """LiteLLM's time-out: not less than the attempt has left, as the driver bounds it exactly.

    Without it a worker thread, and the hold of an attempt that was given up, would last as long as the upstream hangs.

    Args:
        timeout: the LM's own `timeout`, also as an `httpx.Timeout`.
        until: monotonic time at which the attempt is given up.
    """
    if timeout is not None and not isinstance(timeout, (int, float)):
        return timeout
    own = None if timeout is None else float(ceil(timeout))
    if until == inf:
        return own
    left = until - time.monotonic()
    rung = next((rung for rung in _TIMEOUTS if rung >= left), None)
    if rung is None or own is None:
        return own if rung is None else rung
    return min(own, rung)


def _sent(data: dict[str, Any], request: Request) -> dict[str, Any]:
    # DSPy's conversion says max_completion_tokens, which watsonx, replicate, zai and others do not take.
    if "max_completion_tokens" in data and not is_openai_reasoning_model(request.model):
        data["max_tokens"] = data.pop("max_completion_tokens")
    return data


def _received(response: Response, raw: Any, text: str) -> Response:
    response = told(response, raw, text)
    return without_end(response) if response.finish_reason == "stop" and untold_in(text) else response


class _Extended:
    """Adds arguments outside the canonical request, says `max_tokens` as every provider knows it, and believes only a
    usage that the provider told."""

    client_options: dict[str, Any]
    model_type: str
    wire_model: str | None
    body: dict[str, Any] | None = None
    sent = staticmethod(_sent)
    received = staticmethod(_received)
    ended = staticmethod(told_end)
    cleaned = staticmethod(without_secrets)
    broken = staticmethod(told_before)

    def extended(self, extras: dict[str, Any]) -> Any:
        """The engine with arguments of LiteLLM's own vocabulary, which DSPy's engine refuses at construction."""
        self.client_options.update(extras)
        return self

    def saying(self, body: dict[str, Any]) -> Any:
        """The engine for one ordinary call, which is sent as it stands."""
        self.body = body
        return self

    def ordinary(self, request: Request) -> dict[str, Any] | None:
        """The arguments of an ordinary call."""
        if self.body is None:
            return None
        data = {**as_sent(self.body, self.model_type), **self.client_options}
        data["model"] = self.wire_model or request.model
        return signed(data)


class ExtendedLiteLLMEngine(_Extended, HookedLiteLLMEngine):
    """The synchronous engine."""


class AsyncExtendedLiteLLMEngine(_Extended, HookedAsyncLiteLLMEngine):
    """The asynchronous engine."""


class _Shared:
    """LiteLLM's clients, threads and locks, which all LMs of the process share."""

    def _after_fork(self) -> None:
        leave_to_the_parent()


_SHARED: Final = _Shared()
reset_after_fork(_SHARED)


class _Imports:
    """DSPy's locks of LiteLLM and the like, taken in every call: a forked child must find them free."""

    def __init__(self) -> None:
        self._locks: list[Any] = []

    def before_fork(self) -> None:
        self._locks = [lock for lock in import_locks() if lock.acquire(timeout=PATIENCE)]

    def after_fork_in_parent(self) -> None:
        while self._locks:
            self._locks.pop().release()

    _after_fork = after_fork_in_parent  # the child's one thread is the one that took them


_IMPORTS: Final = _Imports()
hold_while_forking(_IMPORTS, Stage.IMPORTS)
