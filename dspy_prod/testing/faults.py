"""What can go wrong at a provider, as values; `plans` says when.

Whether a fault costs money follows what providers do: a request refused with an HTTP error is free, an answer that
was generated is billed even if it never arrived whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_MESSAGES = {
    400: "Invalid request.",
    401: "Incorrect API key provided.",
    403: "You are not allowed to use this model.",
    404: "The model does not exist or you do not have access to it.",
    408: "Request timed out.",
    409: "Conflict.",
    422: "Unprocessable entity.",
    429: "Rate limit reached.",
    500: "The server had an error while processing your request.",
    502: "Bad gateway.",
    503: "The engine is currently overloaded, please try again later.",
    504: "Gateway time-out.",
    529: "Overloaded.",
}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Fault:
    """Base of all faults.

    Example:
        ```python
        def unlucky(call):  # every third call
            return testing.Status(500) if call.index % 3 == 2 else None


        provider = testing.Provider(faults=unlucky)
        ```
    """

    @property
    def name(self) -> str:
        """How `Call.fault` names it: the class name, with the code for `Status`."""
        return type(self).__name__


@dataclass(frozen=True)
class Status(Fault):
    """Refuse with an HTTP error. Never billed.

    Args:
        code: HTTP status, e.g. 400, 401, 404, 408, 429, 500, 502, 503, 504, 529.
        message: the error's text; None is a usual text for the code.
        retry_after: seconds (or an HTTP date) for the Retry-After header; None sends none.
        headers: further headers.
        error_code: the error object's `code`, e.g. "context_length_exceeded"; None is the usual one for `code`.
        delay: seconds before the refusal is sent.

    Example:
        ```python
        provider = testing.Provider(faults=[testing.Status(429, retry_after=2), testing.Status(503)])
        ```
    """

    code: int = 500
    message: str | None = None
    retry_after: float | str | None = None
    headers: Mapping[str, str] | None = field(default=None, hash=False)
    error_code: str | None = None
    delay: float = 0.0

    @property
    def name(self) -> str:
        return f"Status({self.code})"

    def error(self) -> dict[str, object]:
        """The body: OpenAI's error object."""
        kind = _TYPES.get(self.code, "server_error" if self.code >= 500 else "invalid_request_error")
        message = self.message
        if message is None and self.error_code == "context_length_exceeded":
            message = "This model's maximum context length is 8192 tokens. Please reduce the length of the messages."
        if message is None:
            message = _MESSAGES.get(self.code, f"HTTP {self.code}")
        code = self.error_code or _CODES.get(self.code)
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def http_headers(self) -> dict[str, str]:
        """Headers beside the content type."""
        headers = dict(self.headers or {})
        if self.retry_after is not None:
            headers["retry-after"] = self.retry_after if isinstance(self.retry_after, str) else f"{self.retry_after:g}"
        return headers


@dataclass(frozen=True)
class Hang(Fault):
    """Accept the request and never answer, until the client leaves or the server stops.

    Args:
        seconds: close the connection without an answer after this long; None is never.
        billed: whether the answer was generated (and is billed in full) although it is never sent.

    Example:
        ```python
        provider = testing.Provider(faults=testing.Hang(seconds=30, billed=True))
        ```
    """

    seconds: float | None = None
    billed: bool = False


@dataclass(frozen=True)
class Trickle(Fault):
    """A valid answer sent drip by drip, at `bytes_per_second`. Billed, and told once the last byte is sent.

    Example:
        ```python
        provider = testing.Provider(faults=testing.Trickle(bytes_per_second=20))
        ```
    """

    bytes_per_second: float = 100.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be positive, not {self.bytes_per_second!r}")


@dataclass(frozen=True)
class Reset(Fault):
    """Break the connection with a TCP RST.

    Args:
        when: "before" any byte of the answer, "after_headers", or "during" the body (half of it is sent).
        billed: whether the answer, generated in full, is billed; None is: not for "before", else yes.

    Example:
        ```python
        provider = testing.Provider(faults=testing.Reset("during"))
        ```
    """

    when: Literal["before", "after_headers", "during"] = "before"
    billed: bool | None = None

    @property
    def is_billed(self) -> bool:
        """`billed`, or its default for `when`."""
        return self.when != "before" if self.billed is None else self.billed


@dataclass(frozen=True)
class TruncatedStream(Fault):
    """The stream stops without usage or [DONE] and the connection is closed. The whole answer is billed, not told.

    Without `stream` the body ends before its announced length.

    Args:
        after: how many text chunks are sent; None is half of them.

    Example:
        ```python
        provider = testing.Provider(faults=testing.TruncatedStream(after=2))
        ```
    """

    after: int | None = None


@dataclass(frozen=True)
class ErrorInStream(Fault):
    """An error event takes the place of the rest of a stream. Billed up to the chunks sent, not told.

    Without `stream`: status 200 with an error object as its body, billed in full (some gateways do this).

    Args:
        after: how many text chunks are sent before it.
        message: the error's text.
        code: the error object's `code`.

    Example:
        ```python
        provider = testing.Provider(faults=testing.ErrorInStream(after=1, code="overloaded"))
        ```
    """

    after: int = 1
    message: str = "The server had an error while processing your request."
    code: str | int | None = "server_error"

    def error(self) -> dict[str, object]:
        """The error object that is sent."""
        return {"error": {"message": self.message, "type": "server_error", "param": None, "code": self.code}}


@dataclass(frozen=True)
class MalformedJson(Fault):
    """Status 200 with a body (or, streamed, one event) that is not JSON. Billed, not told.

    Example:
        ```python
        provider = testing.Provider(faults=testing.MalformedJson())
        ```
    """


@dataclass(frozen=True)
class WrongUsage(Fault):
    """The usage told, *and billed*, is not what the texts' lengths say; it may exceed `max_tokens`.

    Args:
        factor: multiplies input and output.
        input_tokens: replaces the input; None multiplies.
        output_tokens: replaces the output; None multiplies.

    Example:
        ```python
        provider = testing.Provider(faults=testing.WrongUsage(output_tokens=5_000))  # more than max_tokens
        ```
    """

    factor: float = 1.0
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class MissingUsage(Fault):
    """A complete answer without usage. Billed, not told.

    Example:
        ```python
        provider = testing.Provider(faults=testing.MissingUsage())
        ```
    """


@dataclass(frozen=True)
class EmptyChoices(Fault):
    """Status 200 with an empty list of choices (outputs). Billed, told.

    Example:
        ```python
        provider = testing.Provider(faults=[testing.EmptyChoices()])
        ```
    """


@dataclass(frozen=True)
class Verbatim(Fault):
    """Send exactly this body, whatever was asked: what a gateway or a foreign server may say.

    An HTTP error or a redirect is not billed; anything else is, in full, and counts as told when its text tells a
    usage.

    Args:
        body: bytes, text, or a value that is sent as JSON.
        status: HTTP status.
        content_type: of the body; None is `application/json`, or `text/event-stream` for a body that begins as one.
        headers: further headers.

    Example:
        ```python
        page = testing.Verbatim("<html>Bad gateway</html>", status=502, content_type="text/html")
        provider = testing.Provider(faults=page)
        ```
    """

    body: object = b""
    status: int = 200
    content_type: str | None = None
    headers: Mapping[str, str] | None = field(default=None, hash=False)

    def data(self) -> bytes:
        """The body as it is sent."""
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()

    def http_headers(self) -> dict[str, str]:
        """The content type and further headers."""
        events = self.data().lstrip().startswith((b"data:", b"event:"))
        kind = self.content_type or ("text/event-stream" if events else "application/json")
        return {"content-type": kind, **(self.headers or {})}
