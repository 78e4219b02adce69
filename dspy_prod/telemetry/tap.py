"""Where tracking looks into a call. Nothing is imported and nothing costs more than one read while nobody looks.

The pipeline tells a `Tap` of program calls, LM calls and attempts; `dspy_prod.tracking` is the one that ships. A tap
never waits and never raises: what it cannot do, it counts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

    from dspy_prod.records import CallRecord


class Way(Protocol):
    """What is told of the route an attempt took."""

    @property
    def breaker(self) -> Any:
        """Its breaker, or None."""
        ...

    def rates(self) -> Any:
        """Its model's prices, None when unknown."""
        ...


class Node(Protocol):
    """An open piece of a trace: one call of a program or of an LM."""

    def answered(self, outputs: Any, **attributes: Any) -> None:
        """Note what it gives back, and attributes of its span."""
        ...

    def attempt(self, record: CallRecord, route: Way, request: Request | None, response: Response | None) -> None:
        """Add an upstream attempt, or an answer from the cache, perhaps after the node has ended."""
        ...


class Tap(Protocol):
    """Sees every call."""

    def program_call(self, name: str, inputs: dict[str, Any]) -> AbstractContextManager[Node | None]:
        """The scope of one call of a `Production`; it puts a context with `trace_id` and `node` in force."""
        ...

    def lm_call(self, name: str, inputs: dict[str, Any]) -> AbstractContextManager[Node | None]:
        """The scope of one call of an LM, likewise."""
        ...


class _Slot:
    """Holds the one active tap."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active: Tap | None = None


TAP = _Slot()
