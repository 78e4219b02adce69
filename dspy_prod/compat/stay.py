"""One attempt as httpx sees it: what was answered, whatever a client above makes of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from math import inf
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any, Final, Literal, NamedTuple, Protocol

Came = Literal["whole", "begun"]

_FETCHING: Final = frozenset({"GET", "HEAD"})
_FORM: Final = "application/x-www-form-urlencoded"
"""How a token is asked for, see RFC 6749; no model is."""
_SENDS_ON: Final = frozenset({307, 308})
"""Statuses that have a request sent elsewhere as it is: who says them has not worked on it. A 303 says that it was
taken, and what it came to is elsewhere; httpx makes the same of 301 and 302."""
_BEFORE: Final = frozenset({"pre_call_rules", "async_pre_call_deployment_hook"})
"""Functions of LiteLLM by which its user can stop a request before it is sent."""
_REJECTING: Final = frozenset({"post_call_rules", "validate_schema", "async_post_call_success_deployment_hook"})
"""Functions of LiteLLM by which it rejects an answer that it has read, for its user has said so."""
_ASIDE: Final = _BEFORE | _REJECTING | {
    "pre_call", "post_call", "success_handler", "async_success_handler", "failure_handler", "async_failure_handler",
    "async_post_call_failure_deployment_hook", "_call_post_streaming_deployment_hook",
    "get_model_info", "get_model_info_helper",
}  # fmt: skip
"""Functions of LiteLLM that send what asks no model: logs, rules and hooks of its user's, and Ollama's `/api/show`.
They run in the attempt, and in threads and tasks of their own, which have the attempt's context, also after its end."""


class Mark(NamedTuple):
    """What an attempt with LiteLLM says of its error.

    Attributes:
        came: how much of an answer had come, see `Stay.came`.
        rejected: see `Stay.rejects`.
        unasked: LiteLLM's user stopped it when no model had been asked.
        left: the request went out: that a further one met nobody says nothing of it.
    """

    came: Came | None = None
    rejected: bool = False
    unasked: bool = False
    left: bool = False


UNMARKED: Final = Mark()
_MARK: Final = "_dspy_prod_mark"


def mark_of(error: BaseException) -> Mark:
    """What was said of an error here: an engine's own error may have attributes of any name."""
    found = getattr(error, _MARK, None)
    return found if isinstance(found, Mark) else UNMARKED


def set_mark(error: BaseException, mark: Mark) -> None:
    """Say it of an error; one that takes no attributes has none."""
    with suppress(AttributeError):
        setattr(error, _MARK, mark)


class Body(Protocol):
    """The body of an answer that a thread reads."""

    def shut(self) -> None:
        """End the reading, at once and from any thread; nothing when it has ended."""
        ...


class Stay:
    """One attempt, as httpx sees it: what was answered, whatever the client above makes of it.

    At the end of a `with` block it is over and lets its answer go, though tasks and threads may go on in its context.

    Args:
        until: when nobody waits for it any more (monotonic).

    Attributes:
        answer: httpx's answer to the last request that asked a model; None while that is not answered, or when the
            attempt is over.
        left: a request that asks a model went out, as its transport tells, or its answer.
        over: nothing that is sent from now on is for it.
        within: the code of the function that sends for it: who called that says nothing of what is sent.
        odd: a counter of tokens in it was no whole number, see `httpx_reading`.
        uncounted: a part of Anthropic's stream came after the last count of its output.
        reason: why it ended, as it says; the last such reason in it, empty where it says none.
        code: that of an error which it tells in Anthropic's language; None where it tells none.
    """

    __slots__ = (
        "_asked", "_body", "_dropped", "_home", "_moved", "_outside", "_untold", "answer", "code", "left", "odd",
        "over", "reason", "uncounted", "until", "within",
    )  # fmt: skip

    def __init__(self, until: float = inf) -> None:
        self.until = until
        self.over = False
        self.within: CodeType | None = None
        self._asked = self._untold = self._moved = self._dropped = self.left = False
        self._body: Body | None = None
        self._home = _here()
        self._outside = sys.exc_info()[1]  # what its caller handles is the context of all that is raised in it
        self._forget()

    def _forget(self) -> None:
        self.answer: Any = None
        self.odd = False
        self.uncounted = False
        self.reason = ""
        self.code: str | None = None

    def sends(self, request: Any, tells: bool) -> bool:
        """Hear of httpx's request that is to go out: if it asks a model, no earlier answer is the attempt's.

        A picture that LiteLLM fetched, or a token, came with 200, and says nothing of a model that cannot be reached.

        Args:
            tells: its transport can tell when the request goes out.

        Returns:
            Whether it is to: it asks a model.
        """
        if not self._asks(request):
            return False
        self._asked = True
        self._forget()
        if not tells or self._home != _here():  # what another thread or task sends need not end with the attempt
            self._untold = True
        return tells

    def goes(self) -> None:
        """Hear that such a request goes out now."""
        self.left, self._moved = True, False

    @property
    def waits(self) -> bool:
        """Whether a model was to be asked and certainly was not, as no connection was made before the attempt ended."""
        return self._asked and not (self.left or self._untold)

    @property
    def moved(self) -> bool:
        """Whether whoever the request went to has only sent it on, and it certainly has not gone out again."""
        return self._moved and not self._untold

    def hears(self, response: Any) -> bool:
        """Take httpx's answer for the attempt's own, if it is to a request that asked a model; whether it is."""
        own = self._asks(response.request)
        if own:
            self.answer = response
            self.left, self._moved = True, response.status_code in _SENDS_ON
        return own

    def reads(self, body: Body) -> None:
        """Hear what its answer is read from; shut at once where nobody wants it any more."""
        self._body = body
        if self._dropped:
            body.shut()

    def drop(self) -> None:
        """Read no more of its answer, for nobody wants it: whoever waits for a part of it hears so at once.

        From any thread, also in the garbage collector.
        """
        self._dropped = True
        if (body := self._body) is not None:
            body.shut()

    def _asks(self, request: Any) -> bool:
        if self.over or _aside(self.within):
            return False
        if request.method in _FETCHING:  # several providers are asked by POST and tell where the answer will be
            return self._asked
        return _FORM not in request.headers.get("content-type", "")

    def goes_on(self) -> None:
        """Say that what was shown of it comes back from its consumer, who may handle another error by now."""
        self._outside = sys.exc_info()[1]

    def __enter__(self) -> Stay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._outside = None
        if kind is None or issubclass(kind, Exception):  # one that is cancelled may still be sending, in a thread
            self.over = True
            self.answer = self._body = None

    @property
    def came(self) -> Came | None:
        """How much came of an answer that its status calls a success; None of any other."""
        if self.answer is None or not 200 <= self.answer.status_code < 300:
            return None
        return "whole" if hasattr(self.answer, "_content") else "begun"

    @property
    def body(self) -> bytes:
        """The body of such an answer; empty where it did not come whole, or is read as a stream."""
        return bytes(self.answer.content) if self.came == "whole" else b""

    @property
    def path(self) -> str:
        """What was asked: the path of the address."""
        return "" if self.answer is None else str(self.answer.request.url.path)

    def rejects(self, error: Exception) -> bool:
        """Whether it was raised for an answer that LiteLLM could read: a rule, schema or hook of its user's says no.

        By whatever error: that a service which they ask is down says nothing of the model.
        """
        return _raised_in(_REJECTING, error, self._outside)

    def mark(self, error: Exception) -> None:
        """Say of the error what it was raised for, see `Mark`, and the code told: LiteLLM makes up a status."""
        unasked = not self._asked and _raised_in(_BEFORE, error, self._outside)
        set_mark(error, Mark(self.came, self.rejects(error), unasked, self.left and not self.moved))
        with suppress(AttributeError):
            if self.code is not None and getattr(error, "provider_code", None) is None:
                error.provider_code = self.code  # type: ignore[attr-defined]


class Attending:
    """An engine on LiteLLM, which knows how far its last request has come.

    Attributes:
        until: when nobody waits for the answer any more (monotonic).
        stay: the last attempt; None before the first.
    """

    until: float = inf
    stay: Stay | None = None

    @property
    def waits(self) -> bool:
        """Whether the last request certainly did not go out, see `Stay.waits`. To be asked when it has ended."""
        return self.stay is None or self.stay.waits

    @property
    def moved(self) -> bool:
        """Whether nobody has worked on the last request, though it went out, see `Stay.moved`."""
        return self.stay is not None and self.stay.moved

    def attend(self) -> Stay:
        """Begin an attempt, in the thread or task that sends."""
        self.stay = stay = Stay(self.until)
        return stay


def _here() -> tuple[int, int]:
    """Which thread, and which task, this is."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs
        task = None
    return threading.get_ident(), id(task)


def _raised_in(functions: frozenset[str], error: BaseException, outside: BaseException | None) -> bool:
    """Whether one of these functions of LiteLLM's raised it, or what it was raised from."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and cause is not outside and id(cause) not in seen:
        if any(_is_of_litellm(frame, functions) for frame, _ in walk_tb(cause.__traceback__)):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def _aside(within: CodeType | None) -> bool:
    """Whether LiteLLM sends this for a log, a hook or the like: a model that these ask has an attempt of its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not within:
        if _is_of_litellm(frame, _ASIDE):
            return True
        frame = frame.f_back
    return False


def _is_of_litellm(frame: FrameType, functions: frozenset[str]) -> bool:
    """Whether a frame is of one of these functions of LiteLLM's; others may have functions of the same name."""
    if frame.f_code.co_name not in functions:
        return False
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "litellm"
