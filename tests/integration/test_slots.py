"""A connection's slot comes back when its answer is given up, not when the garbage is collected."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_prod.pipeline.upstream import native_engines
from dspy_prod.testing import ErrorInStream, Verbatim
from dspy_prod.testing.faults import Fault
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import request

SLOTS = 2
DEEP = "[" * 20_000 + "]" * 20_000
FAULTS = [
    pytest.param(Verbatim(f'data: {{"choices": {DEEP}}}\n\n' + "data: [DONE]\n\n"), id="deeper than the stack"),
    pytest.param(Verbatim(f'{{"choices": {DEEP}}}'), id="deep, and no stream"),
    pytest.param(ErrorInStream(after=1), id="an error"),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two connections for an LM, and a collector that does not come."""
    monkeypatch.setattr(native_engines, "MAX_CONNECTIONS", SLOTS)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_cannot_be_read_keep_no_connection(
    serve: MakeProvider, connect: MakeLM, fault: Fault, way: str
) -> None:
    """Each stream that broke kept its slot until a collection; one in the middle of a deep answer lost it for ever."""
    provider = serve(faults=[fault] * (2 * SLOTS + 1))
    lm = connect(provider, engine="lm15", breaker=False, timeout=5)
    held: list[BaseException] = []  # somebody may look at them for long

    async def ask() -> None:
        for _ in range(2 * SLOTS + 1):
            try:
                async for _event in lm._async_engine_spec.stream(request()):
                    pass
            except Exception as error:
                held.append(error)
        assert [event async for event in lm._async_engine_spec.stream(request())]
        await lm.aclose()

    if way == "async":
        asyncio.run(ask())
        assert len(held) == 2 * SLOTS + 1
        return
    for _ in range(2 * SLOTS + 1):
        with pytest.raises(Exception) as caught:
            list(lm._engine_spec.stream(request()))
        held.append(caught.value)
    assert list(lm._engine_spec.stream(request()))


@pytest.mark.usefixtures("few")
def test_a_stream_that_nobody_hears_out_keeps_no_connection(serve: MakeProvider, connect: MakeLM) -> None:
    """Left in the middle, with the events that were heard still in hand."""
    lm = connect(serve(answer="some words " * 20, chunks=10), engine="lm15", timeout=5)
    left: list[Any] = []
    for _ in range(2 * SLOTS + 1):
        events = lm._engine_spec.stream(request())
        left.append((events, next(events)))
        events.close()
    assert lm("a question") == ["some words " * 20]
