"""One attempt as httpx sees it: what was answered, whatever a client above makes of it."""

from __future__ import annotations

from contextlib import suppress
from math import inf
from typing import Any, Literal

Came = Literal["whole", "begun"]


class Stay:
    """One attempt, as httpx sees it: what was answered, whatever the client above makes of it.

    Args:
        until: when nobody waits for it any more (monotonic).

    Attributes:
        answer: httpx's last answer; None when nothing was answered.
        odd: a counter of tokens in it was no whole number, see `httpx_reading`.
        uncounted: a part of Anthropic's stream came after the last count of its output.
        reason: why it ended, as it says; the last such reason in it, empty where it says none.
        code: that of an error which it tells in Anthropic's language; None where it tells none.
    """

    __slots__ = ("answer", "code", "odd", "reason", "uncounted", "until")

    def __init__(self, until: float = inf) -> None:
        self.until = until
        self.answer: Any = None
        self.odd = False
        self.uncounted = False
        self.reason = ""
        self.code: str | None = None

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

    def mark(self, error: Exception) -> None:
        """Have the error say as `came` what it was raised for: LiteLLM makes up a status for it."""
        with suppress(AttributeError):
            error.came = self.came  # type: ignore[attr-defined]
            if self.code is not None and getattr(error, "provider_code", None) is None:
                error.provider_code = self.code  # type: ignore[attr-defined]
