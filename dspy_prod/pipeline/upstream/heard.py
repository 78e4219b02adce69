"""What is certain about an error: what the provider said by HTTP, and whether it was asked at all.

LiteLLM says 500 for whatever it cannot explain, and makes up responses to go with it. Its own errors are hearsay; what
stands behind them, from the library that spoke to the provider, is evidence.
"""

from __future__ import annotations

import re
from contextlib import suppress
from json import JSONDecodeError
from traceback import walk_tb
from typing import Any, Final, NamedTuple

from dspy.utils.exceptions import LMError, LMServerError, LMTimeoutError, LMTransportError
from pydantic import ValidationError

from dspy_prod.compat.stay import Mark, mark_of
from dspy_prod.pipeline.upstream.ends import SealedError, causes_of
from dspy_prod.pipeline.upstream.vocabulary import status_meant_by
from dspy_prod.runtime.patterns import Pattern


class Heard(NamedTuple):
    """See the module's docstring.

    Attributes:
        status: HTTP status that the provider certainly sent; None when it sent none.
        hearsay: status that LiteLLM names without a response to show; None when it names none or 500.
        code: the provider's error code.
        text: the provider's error text.
        begun: the error came inside an answer that had begun.
        local: nothing was sent, for a reason that lies here.
        unreached: no connection was made.
        shape: `garbled`, `unusable` or `filtered`: what was wrong with an answer.
        should_retry: what the header `x-should-retry` asks for.
    """

    status: int | None
    hearsay: int | None
    code: str | None
    text: str
    begun: bool
    local: bool
    unreached: bool
    shape: str | None
    should_retry: bool | None


_CONNECT_ERRORS: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"})
_TRANSPORTS: Final = frozenset({"httpx", "httpcore", "h11", "aiohttp", "requests", "urllib3"})
_BROKEN: Final = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
_NO_CREDENTIALS: Final = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "NoRegionError", "ProfileNotFound", "DefaultCredentialsError",
    "CredentialUnavailableError", "NoAuthTokenError",
})  # fmt: skip
_LOCAL: Final = Pattern(
    r"not JSON serializable|missing credentials|missing .{0,40}api[ _]key|no key is set|unable to locate credentials|"
    r"default credentials were not found|no module named|LLM provider not provided|environment variable|"
    r"_id not set|api_key client option must be set|pip install",
    re.IGNORECASE,
)
_GARBLED: Final = Pattern(r"invalid response object|empty or invalid response from LLM endpoint", re.IGNORECASE)
_OVER: Final = Pattern(r"SSE (line|event) exceeds limit|chunk line exceeds limit|response head exceeded limit")
"""What lm15 says of a part of an answer above its own bounds."""
_STUMBLES: Final = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError)
"""What LiteLLM falls over an event that it did not expect."""
_UNUSABLE: Final = Pattern(r"provider returned 'choices' that is not a list", re.IGNORECASE)


_HEARD: Final = "_dspy_prod_heard"


def keep_heard(error: Exception) -> None:
    """Keep with an error what is heard of it now: what is said of it later, of other attempts, is no evidence.

    To be called of an error that nobody else has. An engine that asks by a call of its own may raise it on: it means
    what it meant there.
    """
    with suppress(AttributeError):
        setattr(error, _HEARD, heard(error))


def heard(error: Exception) -> Heard:
    """What is certain about an error that an attempt raised."""
    kept = getattr(error, _HEARD, None)
    if isinstance(kept, Heard):
        return kept
    causes, mark = list(causes_of(error)), mark_of(error)
    if mark.rejected or mark.unasked:
        return _said_by_user(mark, causes)
    litellm = [cause for cause in causes if _of_litellm(cause)]
    status = _status_of(error, causes, bool(litellm))
    text = _text_of(causes)
    code = getattr(error, "provider_code", None)
    if code is None:  # LiteLLM leaves that of an error inside a stream behind
        code = next((cause.code for cause in causes if _package(cause) == "openai" and hasattr(cause, "code")), None)
    in_body = next((cause for cause in causes if type(cause) is Exception and hasattr(cause, "status_code")), None)
    came = mark.came if status is None else None
    begun = status is None and (
        came is not None
        or (bool(getattr(error, "begun", False)) and not litellm)
        or in_body is not None
        or any(type(cause).__name__ == "APIError" and _package(cause) == "openai" for cause in causes)
    )
    hearsay = _hearsay(error, litellm) if in_body is None else _in_body(in_body)
    shape = None
    if status is None or status < 300:
        if any(_unreadable(cause) for cause in causes) or (_GARBLED if litellm else _OVER).search(text):
            shape = "garbled"
        elif litellm and _UNUSABLE.search(text):
            shape = "unusable"
        elif litellm and (came == "whole" or (came and any(isinstance(cause, _STUMBLES) for cause in causes))):
            shape = None if any(_of_traffic(cause) for cause in causes) else "garbled"
    return Heard(
        status,
        hearsay,
        None if code is None else str(code),
        text,
        begun,
        status is None and not begun and _never_left(causes, text, bool(litellm)),
        isinstance(error, (LMTransportError, LMServerError, LMTimeoutError))
        and not mark.left
        and _never_connected(causes),
        shape,
        getattr(error, "should_retry", None),
    )


def _said_by_user(mark: Mark, causes: list[BaseException]) -> Heard:
    """LiteLLM's user has said no, to an answer or before anything was sent: what else was asked for it is no evidence.

    A guardrail raises what the service that it asks has said: a 503 of that is not the provider's.
    """
    return Heard(
        status=None, hearsay=None, code=None, text=_text_of(causes), begun=mark.rejected, local=not mark.rejected,
        unreached=False, shape="filtered" if mark.rejected else None, should_retry=None,
    )  # fmt: skip


def _text_of(causes: list[BaseException]) -> str:
    return "\n".join(dict.fromkeys(str(getattr(cause, "message", None) or cause) for cause in causes))


def _status_of(error: Exception, causes: list[BaseException], hearsay: bool) -> int | None:
    for cause in causes:
        if not _of_litellm(cause) and not isinstance(cause, LMError) and not _of_dspy(cause):
            found = _int(getattr(cause, "response", None), "status_code")
            if found is not None:
                return found
    return None if hearsay else _int(error, "status")


def _hearsay(error: Exception, litellm: list[BaseException]) -> int | None:
    status = _int(error, "status") if litellm else None
    return None if status is None or status == 500 else status


def _in_body(error: BaseException) -> int:
    """The status that LiteLLM makes of an error object in a 200; it says 422 when the object has no code."""
    told: Any = getattr(error, "status_code", None)
    return status_meant_by(None if told == 422 else str(told)) or 500


def _int(value: Any, name: str) -> int | None:
    found = getattr(value, name, None)
    return found if type(found) is int and 100 <= found < 600 else None


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _unreadable(error: BaseException) -> bool:
    """Whether it says that what came cannot be read: no text, no JSON, none that Python reads, or other fields.

    LiteLLM takes a number in what pydantic says of the fields for the status.
    """
    return isinstance(error, (JSONDecodeError, UnicodeDecodeError, ValidationError, SealedError)) or any(
        frame.f_code.co_name == "raw_decode" for frame, _ in walk_tb(error.__traceback__)
    )


def _of_litellm(error: BaseException) -> bool:
    return _package(error) == "litellm"


def _of_traffic(error: BaseException) -> bool:
    return _package(error) in _TRANSPORTS or isinstance(error, OSError)


def _of_dspy(error: BaseException) -> bool:
    return _package(error) == "dspy"


def _never_left(causes: list[BaseException], text: str, litellm: bool) -> bool:
    """Whether the errors show that the request was never made; a sign of traffic refutes it."""
    if any(_of_traffic(cause) for cause in causes):
        return False
    if any(isinstance(cause, ImportError) for cause in causes):
        return True
    if any(isinstance(cause, TypeError) and "not JSON serializable" in str(cause) for cause in causes):
        return True
    if any(isinstance(cause, UnicodeEncodeError) for cause in causes):  # half a character, which no UTF-8 can say
        return True
    named = {type(cause).__name__ for cause in causes}
    return litellm and (
        bool(named & _NO_CREDENTIALS)
        or any(type(cause).__name__ == "OpenAIError" and _package(cause) == "openai" for cause in causes)
        or _LOCAL.search(text) is not None
    )


def _never_connected(causes: list[BaseException]) -> bool:
    """Whether the chain of causes says that no connection was made, so that nothing was sent.

    LiteLLM's asynchronous transport also says `ConnectError` for a connection that was reset after sending. And it
    connects once more by itself: what the second connection met comes first, and the first one stands behind it.
    """
    latest = next((cause for cause in causes if _package(cause) in _TRANSPORTS), None)
    if latest is not None and type(latest).__name__ not in _CONNECT_ERRORS:
        return False
    if any(isinstance(cause, _BROKEN) or type(cause).__name__ == "ClientOSError" for cause in causes):
        return False
    return any(type(cause).__name__ in _CONNECT_ERRORS or isinstance(cause, ConnectionRefusedError) for cause in causes)
