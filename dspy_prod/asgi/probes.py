"""Pages for who runs the service: is the process alive, and should requests be sent to it?"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dspy_prod import ConfigError, Health, health
from dspy_prod.asgi.serving import serving

Cause = Literal["store", "draining", "circuits", "any_circuit", "degraded"]

PATIENCE: Final = 2.0
"""Seconds that a look at the stores may take; then the service is not ready."""

FRESH: Final = 1.0
"""Seconds for which a look is believed, however often anybody asks."""

_OPEN: Final = ("open", "forced_open")


def probe_routes(
    unready: Collection[Cause] = ("store", "draining"), *, alive: str = "/healthz", ready: str = "/readyz"
) -> list[Route]:
    """Routes for the probes of an orchestrator or load balancer. They call no provider and show no secret.

    `/healthz` answers 200 while the process can answer at all. `/readyz` answers 200, or 503 with the reasons:
    `{"status": "unready", "reasons": ["draining"], "models": {"openai/gpt-4o-mini": "open"}, "in_flight": 12}`.

    Args:
        unready: what makes a worker unready: `"store"`, a store that cannot be used; `"draining"`, from SIGTERM on;
            `"circuits"`, every circuit is open; `"any_circuit"`, one is; `"degraded"`, whatever `dspy_prod.health()`
            calls degraded. Circuits are left out by default: all workers meet the same provider, and no worker is left
            that could answer with a fallback.
        alive, ready: the paths.

    Raises:
        ConfigError: an unknown cause, or a path that is none.

    Example:
        ```python
        app = Starlette(routes=[*dspy_prod.asgi.probe_routes(unready=["store", "draining", "circuits"])])
        ```
    """
    if not isinstance(unready, Collection):
        raise ConfigError(f"unready={unready!r}: give a list of causes, such as ['store', 'draining']")
    for name, path in (("alive", alive), ("ready", ready)):
        if not isinstance(path, str) or not path.startswith("/"):
            raise ConfigError(f"{name}={path!r}: give a path that begins with '/', such as '/{name}'")
    if alive == ready:
        raise ConfigError(f"alive={alive!r}, ready={ready!r}: give each a path of its own")
    for cause in unready:
        if cause not in get_args(Cause):
            raise ConfigError(f"unready: {cause!r} is unknown; use some of {', '.join(map(repr, get_args(Cause)))}")
    look = Look()

    async def is_alive(request: Request) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def is_ready(request: Request) -> JSONResponse:
        duty = serving(request.app)
        found = await look.health()
        reasons = [cause for cause in unready if _holds(cause, found, duty.draining)]
        body: dict[str, Any] = {"status": "unready" if reasons else "ready", "reasons": reasons}
        if found is not None:
            body["models"] = {one.model: one.state for one in found.breakers}
        body["in_flight"] = max(0, duty.in_flight - 1)  # this one aside
        return JSONResponse(body, 503 if reasons else 200, {"Cache-Control": "no-store"})

    return [Route(alive, is_alive, include_in_schema=False), Route(ready, is_ready, include_in_schema=False)]


def _holds(cause: Cause, found: Health | None, draining: bool) -> bool:
    if cause == "draining":
        return draining
    if found is None:  # the stores did not answer in time, or there was no thread to ask them with
        return cause in ("store", "degraded")
    if cause == "store":
        return any(not store.available for store in found.stores)
    if cause == "degraded":
        return found.status == "degraded"
    states = [one.state in _OPEN for one in found.breakers]
    return any(states) if cause == "any_circuit" else bool(states) and all(states)


class Look:
    """Health, asked in a thread of its own: of those for endpoints all may be busy, and a store may hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._asked: Any = None
        self._found: Health | None = None
        self._until = 0.0

    async def health(self) -> Health | None:
        """Health of the last second; None when it takes too long, or no thread can be started now."""
        with self._lock:
            if self._found is not None and time.monotonic() < self._until:
                return self._found
            if self._asked is None:  # else one look is under way, and one is enough
                self._pool = ThreadPoolExecutor(1, "dspy_prod-probe")
                try:
                    self._asked = self._pool.submit(self._ask)
                except RuntimeError:  # as many threads as it may have: it is tried again when next asked
                    return None
                finally:
                    self._pool.shutdown(wait=False)  # the thread ends with the look
            asked = self._asked
        await asyncio.wait([asyncio.wrap_future(asked)], timeout=PATIENCE)
        if not asked.done() or asked.exception() is not None:
            return None
        found: Health = asked.result()
        return found

    def _ask(self) -> Health:
        try:
            found = health()
            with self._lock:
                self._found, self._until = found, time.monotonic() + FRESH
            return found
        finally:
            with self._lock:
                self._asked = None
