"""What the provider answers besides completions: its models, its health, and its records for other processes."""

from __future__ import annotations

import asyncio
from typing import Any

from dspy_prod.testing.faults import Reset, Status
from dspy_prod.testing.wire import Connection, response


async def serve_page(provider: Any, connection: Connection, method: str, path: str) -> None:
    """Answer a request that is no call. `/_bill` and `/_calls` are readable even while the provider is down."""
    down = provider.down_fault
    if path == "/_bill":
        connection.write(response(200, provider.bill.as_dict()))
    elif path == "/_calls":
        connection.write(response(200, [call.as_dict() for call in provider.calls]))
    elif isinstance(down, Status):
        connection.write(response(down.code, down.error(), down.http_headers()))
    elif isinstance(down, Reset):
        connection.reset()
    elif down is not None:
        await asyncio.get_running_loop().create_future()
    elif path == "/health":
        connection.write(response(200, {"status": "ok"}))
    elif path == "/models" and method == "GET":
        names = provider.bill.models
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in names]
        connection.write(response(200, {"object": "list", "data": models}))
    else:
        connection.write(response(404, Status(404, f"Unknown request: {method} {path}").error()))
