"""Whether whoever waited for a call has gone: what it raises then is no failure of it, and nobody is to be answered."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Final

import anyio

from dspy_prod.production.reasons import LONGEST_CHAIN

LEFT: Final = "_dspy_prod_left"
"""What an `Exception` is marked with that only says that nobody reads the stream any more: nothing has failed."""

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
