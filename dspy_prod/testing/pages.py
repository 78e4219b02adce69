"""What the provider answers besides completions: its models, its health, and its records for other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dspy_prod.testing.bill import Bill
from dspy_prod.testing.calls import Call
from dspy_prod.testing.faults import Fault, Reset, Status
from dspy_prod.testing.wire import Connection, response


async def serve_page(
    connection: Connection, method: str, path: str, *, bill: Bill, calls: Sequence[Call], down: Fault | None
) -> None:
    """Answer a request that is no call. `/_bill` and `/_calls` are readable even while the provider is down."""
    if path == "/_bill":
        connection.write(response(200, bill.as_dict()))
    elif path == "/_calls":
        connection.write(response(200, [call.as_dict() for call in calls]))
    elif isinstance(down, Status):
        connection.write(response(down.code, down.error(), down.http_headers()))
    elif isinstance(down, Reset):
        connection.reset()
    elif down is not None:
        await asyncio.get_running_loop().create_future()
    elif path == "/health":
        connection.write(response(200, {"status": "ok"}))
    elif path == "/models" and method == "GET":
        names = bill.models
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in names]
        connection.write(response(200, {"object": "list", "data": models}))
    else:
        connection.write(response(404, Status(404, f"Unknown request: {method} {path}").error()))
