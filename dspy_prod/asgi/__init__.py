"""A DSPy program as a service, for Starlette, FastAPI and any other ASGI application.

    app = FastAPI()
    dspy_prod.asgi.install(app, headers={"user": "X-User"})

`install` adds what the other names give one by one: for whom and until when each request is served
(`CallContextMiddleware`), answers to what was refused (`exception_handlers`), pages for an orchestrator
(`probe_routes`), and an end that loses nothing (`lifespan`). `EventStream` sends what `dspy.streamify` gives.

The room stands on top, beside `cli`, and uses what any application may use: the public names of `dspy_prod`.
"""

from __future__ import annotations

from importlib.util import find_spec

from dspy_prod import ConfigError

if find_spec("starlette") is None:
    raise ConfigError("dspy_prod.asgi needs Starlette: pip install 'dspy-prod[asgi]'")

from dspy_prod.asgi.ending import lifespan
from dspy_prod.asgi.installing import install
from dspy_prod.asgi.middleware import CallContextMiddleware
from dspy_prod.asgi.probes import probe_routes
from dspy_prod.asgi.refusing import exception_handlers
from dspy_prod.asgi.streaming import EventStream

__all__ = ["CallContextMiddleware", "EventStream", "exception_handlers", "install", "lifespan", "probe_routes"]
