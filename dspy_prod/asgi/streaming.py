"""`EventStream`: what `dspy.streamify` gives, as server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import dspy
import orjson
from dspy.streaming import StatusMessage, StreamResponse
from starlette.responses import StreamingResponse

from dspy_prod.asgi.leaving import Send
from dspy_prod.asgi.refusing import reason_of, told

_log = logging.getLogger("dspy_prod")


class EventStream(StreamingResponse):
    """A response of server-sent events, one for each item of a streaming program:

    - `data: {"chunk": "Ber", "field": "answer", "predictor": "self"}` for a part of an output;
    - `data: {"status": "..."}` for a status message;
    - `data: {"prediction": {"answer": "Berlin"}}` at the end;
    - `data: {"error": {"reason": "upstream_error", "detail": "..."}}` instead, when it fails after the first item;
    - `data: [DONE]`, in any case.

    The response starts with the first item, so a call that is refused before has a status of its own, as with any other
    endpoint (see `exception_handlers`). A client that leaves ends the program; make the program with
    `dspy.streamify(program, is_async_program=True)`, for one in a thread runs to its end.

    Args:
        items: what calling the streaming program returned.
        headers: further headers.

    Example:
        ```python
        stream = dspy.streamify(program, stream_listeners=[...], is_async_program=True)

        @app.get("/stream")
        async def answer(question: str):
            return EventStream(stream(question=question))
        ```
    """

    def __init__(self, items: AsyncGenerator[Any, None], *, headers: Mapping[str, str] | None = None) -> None:
        kept = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(_lines(items), headers=kept, media_type="text/event-stream")

    async def stream_response(self, send: Send) -> None:
        """Send the items; all of it in one task, as the program's own stream needs it."""
        started = False
        async with aclosing(self.body_iterator) as lines:  # type: ignore[type-var]
            try:
                async for line in lines:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            except Exception as error:
                if not started:
                    raise
                reason = reason_of(error)
                if reason is None:
                    _log.exception("A streamed program failed with an unexpected error")
                failure = told(error, reason or "unexpected_error")
                await send({"type": "http.response.body", "body": _line({"error": failure}), "more_body": True})
        if not started:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _lines(items: AsyncGenerator[Any, None]) -> AsyncIterator[bytes]:
    async with aclosing(items):
        async for item in items:
            yield _line(_shown(item))


def _shown(item: Any) -> Any:
    if isinstance(item, dspy.Prediction):
        return {"prediction": dict(item.items(include_dspy=False))}
    if isinstance(item, StreamResponse):
        return {"chunk": item.chunk, "field": item.signature_field_name, "predictor": item.predict_name}
    if isinstance(item, StatusMessage):
        return {"status": item.message}
    dump = getattr(item, "model_dump", None)  # a chunk as LiteLLM has it
    return {"chunk": dump(mode="json") if callable(dump) else item}


def _line(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else str(value)
