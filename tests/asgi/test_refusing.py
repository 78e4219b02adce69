"""A refused or failed call has a status, a word, and no text that only the service may know."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMAuthError,
    LMError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
)
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from dspy_prod import (
    BudgetExceededError,
    CircuitOpenError,
    ConfigError,
    DeadlineExceededError,
    OutageError,
    RateLimitedError,
    RunStoppedError,
    StoppedError,
    StoreUnavailableError,
    UnpricedModelError,
)
from dspy_prod.asgi import exception_handlers
from dspy_prod.asgi.refusing import STATUSES
from tests.asgi.support import exchange

PRIVATE = "the text of acme's provider"
ERRORS: list[tuple[Exception, int, str, int | None]] = [
    (RateLimitedError(PRIVATE, retry_after=2.2), 429, "rate_limited", 3),
    (RateLimitedError(PRIVATE), 429, "rate_limited", None),
    (BudgetExceededError(PRIVATE, retry_after=3600), 402, "budget_exceeded", 3600),
    (BudgetExceededError(PRIVATE, limit_usd=1, bound_usd=2), 413, "too_large", None),
    (BudgetExceededError(PRIVATE, missing="tenant"), 400, "caller_unknown", None),
    (RateLimitedError(PRIVATE, never=True), 413, "too_large", None),
    (StoreUnavailableError(PRIVATE, retry_after=1.0), 503, "store_unavailable", 1),
    (CircuitOpenError(PRIVATE, retry_after=0.0), 503, "circuit_open", 1),
    (StoreUnavailableError(PRIVATE), 503, "store_unavailable", None),
    (OutageError(PRIVATE), 503, "outage", None),
    (RunStoppedError(PRIVATE), 503, "run_stopped", None),
    (StoppedError(PRIVATE, retry_after=60), 503, "stopped", 60),
    (UnpricedModelError(PRIVATE), 503, "unpriced_model", None),
    (DeadlineExceededError(PRIVATE), 504, "deadline_exceeded", None),
    (LMTimeoutError(PRIVATE), 504, "upstream_timeout", None),
    (LMServerError(PRIVATE), 502, "upstream_error", None),
    (LMAuthError(PRIVATE), 502, "upstream_error", None),
    (LMRateLimitError(PRIVATE, retry_after=7), 503, "upstream_rate_limited", 7),
    (ContextWindowExceededError(message=PRIVATE), 413, "input_too_long", None),
    (AdapterParseError("chat", dspy.Signature("question -> answer"), PRIVATE), 502, "parse_error", None),
]


class Question(BaseModel):
    text: str


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
@pytest.mark.parametrize(("error", "status", "reason", "after"), ERRORS, ids=lambda value: type(value).__name__)
def test_each_error_is_an_answer(framework: str, error: Exception, status: int, reason: str, after: int | None) -> None:
    """In both frameworks, with a Retry-After of whole seconds where it is known."""

    async def endpoint(request: Any = None) -> Any:
        raise error

    app: Any
    if framework == "fastapi":
        app = FastAPI(exception_handlers=exception_handlers())
        app.post("/")(endpoint)
    else:
        app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], exception_handlers=exception_handlers())
    answer = asyncio.run(exchange(app, "/"))
    assert (answer.status, answer.json()["reason"]) == (status, reason)
    assert answer.headers.get("retry-after") == (None if after is None else str(after))
    assert answer.json().get("retry_after") == after
    assert PRIVATE.encode() not in answer.body


@pytest.mark.parametrize(("error", "code"), [(RateLimitedError("full"), 1013), (LMServerError(PRIVATE), 1011)])
def test_a_websocket_is_closed_with_the_reason(error: LMError, code: int) -> None:
    """The client may come back later, or the service failed."""

    async def endpoint(socket: Any) -> None:
        await socket.accept()
        raise error

    app = Starlette(routes=[WebSocketRoute("/", endpoint)], exception_handlers=exception_handlers())
    answer = asyncio.run(exchange(app, "/", kind="websocket", pieces=()))
    assert answer.messages[-1]["type"] == "websocket.close"
    assert answer.messages[-1]["code"] == code
    assert answer.messages[-1]["reason"] in STATUSES


def test_other_errors_stay_what_they_are() -> None:
    """A defect is no refusal, and what FastAPI says of a caller's mistake stays."""

    app = FastAPI(exception_handlers=exception_handlers())

    @app.post("/")
    async def endpoint(question: Question) -> str:
        raise KeyError("a defect")

    sent = {"Content-Type": "application/json"}
    answer = asyncio.run(exchange(app, "/", headers=sent, pieces=(b"{}",)))
    assert answer.status == 422
    with pytest.raises(KeyError):
        asyncio.run(exchange(app, "/", headers=sent, pieces=(b'{"text": "q"}',)))


def test_a_service_may_choose_other_statuses() -> None:
    """For the reasons it names; the others keep theirs."""

    async def endpoint(request: Any) -> Any:
        raise BudgetExceededError("acme has spent all of it")

    handlers = exception_handlers({"budget_exceeded": 429})
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], exception_handlers=handlers)
    assert asyncio.run(exchange(app, "/")).status == 429


@pytest.mark.parametrize(
    ("statuses", "word"), [({"budget": 429}, "'budget'"), ({"outage": 200}, "200"), ({"outage": "503"}, "'503'")]
)
def test_a_status_that_cannot_be_meant_is_refused(statuses: Any, word: str) -> None:
    """The message names it, and what there is."""
    with pytest.raises(ConfigError, match=word):
        exception_handlers(statuses)


def test_every_reason_has_a_sentence_of_its_own() -> None:
    """No answer falls back to the most general one by an oversight."""
    from dspy_prod.asgi.refusing import told

    sentences = {reason: told(LMError(""), reason)["detail"] for reason in STATUSES}
    assert [reason for reason, text in sentences.items() if text == "The call was refused."] == ["rejected"]
    assert JSONResponse(sentences).status_code == 200
