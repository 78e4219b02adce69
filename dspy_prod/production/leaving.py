"""Whether whoever waited for a call has gone: what it raises then is no failure of it, and nobody is to be answered."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Final

import anyio
from dspy.dsp.utils.settings import settings as dspy_settings
from dspy.streaming.messages import StatusMessage

from dspy_prod.compat.dspy import InForce
from dspy_prod.production.reasons import LONGEST_CHAIN

_RUN_FINISHED: Final[tuple[type[Exception], ...]] = tuple(
    [kind for kind in [getattr(anyio, "RunFinishedError", None)] if kind is not None]  # of newer releases
)

_HERE: Final[ContextVar[None]] = ContextVar("dspy_prod_here")


class Here:
    """Where a call goes on. The garbage collector closes what nobody waits for, and comes by from elsewhere: what gives
    back contexts complains then with a `ValueError`, of which a program may make what it likes."""

    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token: Token[None] | None = None

    def begin(self) -> None:
        """The call begins."""
        self._token = _HERE.set(None)

    def end(self) -> bool:
        """The call ends; whether it does where it began. A token knows its own context from the copies of it that the
        threads and tasks of the call have."""
        token, self._token = self._token, None
        if token is None:
            return False
        try:
            _HERE.reset(token)
        except ValueError:
            return False
        return True

    def closed(self) -> bool:
        """Whether what is raised comes of closing the call. Of something else that the program closed the same may be
        raised, and the caller waits."""
        here = self.end()
        if here:
            self.begin()
        return not here


class Reader:
    """A stream that knows whether something of an answer was sent through it, and whether its reader has gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.visible = self.left = False

    async def send(self, item: Any) -> None:
        """Send an item."""
        if not isinstance(item, StatusMessage):
            self.visible = True
        try:
            await self._stream.send(item)
        except Exception:
            self.left = True
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Caller:
    """Who waits for a call, and perhaps reads it as a stream.

    Each call watches its own: an error may be that of many, as of a task that all of them wait for, and says nothing of
    who waits for any.
    """

    __slots__ = ("_here", "_reader", "_scope")

    def __init__(self) -> None:
        self._here = Here()
        self._reader: Reader | None = None
        self._scope: InForce | None = None

    def begin(self) -> None:
        """The call begins: what it sends is seen."""
        self._here.begin()
        stream = dspy_settings.send_stream
        if stream is not None:
            self._reader = Reader(stream)
            self._scope = InForce(send_stream=self._reader)

    def end(self) -> None:
        """The call ends."""
        if self._scope is not None:
            self._scope.end()
        self._here.end()

    @property
    def sees_something(self) -> bool:
        """Whether something of a streamed answer was sent."""
        return self._reader is not None and self._reader.visible

    def left(self, error: BaseException) -> bool:
        """Whether what the call raises only says that nobody waits, so that nobody is to be answered: the reader of the
        stream has gone, the loop with the reader in it, or all who held the call. Perhaps inside the garbage
        collector."""
        reader = self._reader
        return (reader is not None and (reader.left or loop_ended(error))) or self._here.closed()


def loop_ended(error: BaseException) -> bool:
    """Whether an error comes of sending, from a thread, to a loop that has ended with the reader in it."""
    found: BaseException | None = error
    for _ in range(LONGEST_CHAIN):
        if found is None:
            return False
        if isinstance(found, _RUN_FINISHED):
            return True
        found = found.__cause__ or found.__context__
    return False
