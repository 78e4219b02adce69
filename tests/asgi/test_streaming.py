"""A streaming program as server-sent events, that ends well in every way it can end."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import dspy
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from dspy_prod import Budget
from dspy_prod.asgi import EventStream, install
from dspy_prod.testing import ErrorInStream, Provider
from tests.asgi.support import Answer, exchange, until
from tests.e2e.support import PRICES, account, make_lm, upstream

ANSWER = "[[ ## answer ## ]]\n" + "one two three four " * 20 + "\n\n[[ ## completed ## ]]"


def service(lm: Any) -> Starlette:
    """An application that streams a program."""

    async def endpoint(request: Any) -> Any:
        program = dspy.Predict("question -> answer")
        program.set_lm(lm)
        listeners = [dspy.streaming.StreamListener("answer")]
        return EventStream(dspy.streamify(program, stream_listeners=listeners, is_async_program=True)(question="q"))

    return install(Starlette(routes=[Route("/", endpoint, methods=["POST"])]))


def events(answer: Answer) -> list[Any]:
    """The data of each event; the last one as text."""
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_parts_then_the_prediction_then_the_end() -> None:
    """The parts of a field, put together, are the field of the prediction."""
    with Provider(prices=PRICES, chunks=20) as provider:
        lm = make_lm(provider.url)
        answer = asyncio.run(exchange(service(lm), "/"))
        *parts, prediction, end = events(answer)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert end == "[DONE]"
        assert len(parts) > 1
        assert "".join(part["chunk"] for part in parts) == prediction["prediction"]["answer"]
        assert {part["field"] for part in parts} == {"answer"}
        assert sum(record.cost_nano or 0 for record in upstream(lm)) == provider.bill.nano
        lm.close()


def test_what_is_refused_before_the_first_part_has_a_status() -> None:
    """As any other endpoint, instead of a stream that begins with an error."""
    lm = make_lm("http://127.0.0.1:9/v1")
    lm.breaker("force_open")
    answer = asyncio.run(exchange(service(lm), "/"))
    assert (answer.status, answer.json()["reason"]) == (503, "circuit_open")
    lm.breaker("reset")
    lm.close()


def test_what_fails_midway_is_told_in_the_stream() -> None:
    """After the parts that came; no text of the provider's."""
    with Provider(prices=PRICES, chunks=20, faults=ErrorInStream(after=15), answer=ANSWER) as provider:
        lm = make_lm(provider.url)
        found = events(asyncio.run(exchange(service(lm), "/")))
        assert found[-1] == "[DONE]"
        assert found[-2]["error"]["reason"] == "upstream_error"
        assert found[-2]["error"]["detail"] == "The model could not answer."
        lm.close()


def test_an_unexpected_error_is_logged_and_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """A defect in the program is no business of the client's."""

    async def items() -> Any:
        yield dspy.streaming.StatusMessage("begins")
        yield {"own": "chunk"}
        raise KeyError("sk-secret-1")

    async def endpoint(request: Any) -> Any:
        return EventStream(items(), headers={"X-Own": "1"})

    app = install(Starlette(routes=[Route("/", endpoint, methods=["POST"])]))
    with caplog.at_level(logging.ERROR, "dspy_prod"):
        answer = asyncio.run(exchange(app, "/"))
    begun, chunk, failure, end = events(answer)
    assert (begun, chunk, end) == ({"status": "begins"}, {"chunk": {"own": "chunk"}}, "[DONE]")
    assert failure["error"]["reason"] == "unexpected_error"
    assert answer.headers["x-own"] == "1"
    assert b"sk-secret-1" not in answer.body
    assert "unexpected error" in caplog.text


def test_a_stream_without_items_is_empty() -> None:
    """It begins and ends."""

    async def items() -> Any:
        return
        yield

    async def endpoint(request: Any) -> Any:
        return EventStream(items())

    answer = asyncio.run(exchange(Starlette(routes=[Route("/", endpoint, methods=["POST"])]), "/"))
    assert (answer.status, events(answer)) == (200, ["[DONE]"])


@pytest.mark.parametrize("when", ["before the first part", "between two parts"])
def test_a_client_that_leaves_ends_the_program(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """What it held is charged as unconfirmed, nothing is held, and nobody complains about how it ended."""
    early = when == "before the first part"
    with Provider(prices=PRICES, chunks=50, latency=20.0 if early else 0.0, chunk_delay=0.0 if early else 0.05,
                  answer=ANSWER) as provider:  # fmt: skip
        lm = make_lm(provider.url, budget=Budget(usd=1.0), engine="lm15")
        parts: list[bytes] = []

        async def listened(scope: Any, receive: Any, send: Any) -> None:
            async def heard(message: Any) -> None:
                if message["type"] == "http.response.body":
                    parts.append(message["body"])
                await send(message)

            await app(scope, receive, heard)

        async def main() -> None:
            await exchange(listened, "/", leave=lambda: until(lambda: provider.in_flight if early else len(parts) > 3))
            await lm.aclose()

        app = service(lm)
        with caplog.at_level(logging.WARNING):
            asyncio.run(main())
        (record,) = upstream(lm)
        assert record.estimated
        assert account(lm) == (record.cost_nano, 0, record.cost_nano)
        assert b"[DONE]" not in b"".join(parts)
        assert [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR] == []
