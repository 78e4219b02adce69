"""A stream through LiteLLM that is left ends at the provider at once, not when the garbage collector comes by."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest

from dspy_prod.pipeline.upstream.litellm_engines import ExtendedLiteLLMEngine
from dspy_prod.testing.server import LoopbackServer
from dspy_prod.testing.wire import Connection, HttpRequest, head
from tests.e2e.support import request
from tests.integration.test_litellm_usage import OPENAI, OTHERS, Script, options

DIALECTS = {"openai": OPENAI["running"][0]} | {
    name: OTHERS[name][0] for name in ("anthropic", "gemini", "ollama", "ollama-chat", "bedrock")
}


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("script", DIALECTS.values(), ids=DIALECTS)
def test_the_provider_notices_at_once_that_its_stream_is_left(script: Script) -> None:
    """It went on generating, and billing, until a collection; which could wait for ever for its own thread's lock."""
    left = threading.Event()

    async def serve(connection: Connection, _: HttpRequest) -> None:
        headers = {"content-type": script.content_type}
        connection.write(head(200, headers, length=len(script.body) + 1) + script.body)  # one byte is still to come
        try:
            await connection.drain()
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            left.set()
            raise

    server = LoopbackServer(serve)
    try:
        extras = options(f"http://127.0.0.1:{server.port}{'/v1' * script.model.startswith('openai')}", script)
        events = ExtendedLiteLLMEngine().extended(extras).stream(request(model=script.model))
        next(iter(events))
        assert not left.is_set()
        events.close()  # type: ignore[attr-defined]
        assert left.wait(30)
    finally:
        server.stop()
