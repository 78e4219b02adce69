"""`install`: all of this room on one application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from dspy_prod import ConfigError
from dspy_prod.asgi.ending import Flush, check_ending, lifespan
from dspy_prod.asgi.middleware import CallContextMiddleware, Identify
from dspy_prod.asgi.probes import Cause, probe_routes
from dspy_prod.asgi.refusing import exception_handlers

App = TypeVar("App")


def install(
    app: App,
    *,
    headers: Mapping[str, str] | Iterable[str] = (),
    identify: Identify | None = None,
    deadline: float | None = None,
    cancel: bool = True,
    statuses: Mapping[str, int] | None = None,
    unready: Collection[Cause] = ("store", "draining"),
    alive: str = "/healthz",
    ready: str = "/readyz",
    timeout: float = 10.0,
    flush: Sequence[Flush] = (),
) -> App:
    """Make a Starlette or FastAPI application one that calls LMs in production.

    Adds a `CallContextMiddleware`, `exception_handlers` (those of your own stay), `probe_routes`, and a `lifespan`
    around the one it has. Call it once, before the application serves.

    Args:
        app: the application.
        headers, identify, deadline, cancel: of `CallContextMiddleware`.
        statuses: of `exception_handlers`.
        unready, alive, ready: of `probe_routes`.
        timeout, flush: of `lifespan`.

    Returns:
        The application.

    Raises:
        ConfigError: an impossible argument, or no Starlette application.

    Example:
        ```python
        app = FastAPI()
        dspy_prod.asgi.install(app, headers={"user": "X-User"}, deadline=30)
        ```
    """
    target: Any = app
    router: Any = getattr(target, "router", None)
    if not hasattr(router, "lifespan_context") or not hasattr(target, "add_middleware"):
        raise ConfigError(f"install() takes a Starlette or FastAPI application, got {type(app).__name__}")
    if isinstance(headers, Iterable) and not isinstance(headers, (str, Mapping)):
        headers = list(headers)  # the middleware is built when the application is
    CallContextMiddleware(target, headers=headers, identify=identify, deadline=deadline, cancel=cancel)
    check_ending(timeout, flush)  # what is wrong is told now, and nothing of it is added
    routes = probe_routes(unready, alive=alive, ready=ready)
    handlers = exception_handlers(statuses)
    target.add_middleware(CallContextMiddleware, headers=headers, identify=identify, deadline=deadline, cancel=cancel)
    for error, handler in handlers.items():
        if error not in target.exception_handlers:
            target.add_exception_handler(error, handler)
    router.routes[:0] = routes  # before anything that catches every path
    own = router.lifespan_context

    @asynccontextmanager
    async def around(served: Any) -> AsyncIterator[Any]:
        async with lifespan(served, timeout=timeout, flush=flush), own(served) as state:
            yield state

    router.lifespan_context = around
    return app
