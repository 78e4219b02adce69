"""Cached answers that differ in nothing but when they were given: noted as they come, and made records of together.

A record of its own would cost its caller, and then the writer, more than the answer does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import IDS


class Serving(Protocol):
    """An inbox, see `Inbox.serve`."""

    def serve(self, kind: Kind, at: float) -> None: ...


class Writing(Protocol):
    """A writer."""

    ended: bool

    @property
    def inbox(self) -> Serving: ...


class Reaching(Protocol):
    """A mailbox."""

    closed: bool

    @property
    def writer(self) -> Writing: ...

    def alive(self) -> bool: ...

    def refuse_stragglers(self) -> None: ...


class Kind:
    """Cached answers whose records are alike, of any thread.

    Args:
        like: a record such as theirs; its ids and its time stand for nothing.
        mailbox: how the writer is reached.

    Attributes:
        times: when those were given that the writer has not taken yet.
        listed: the writer knows that there are some.
    """

    __slots__ = ("_inbox", "_mailbox", "like", "listed", "times")

    def __init__(self, like: CallRecord, mailbox: Reaching) -> None:
        self.like = like
        self.times: deque[float] = deque()
        self.listed = False
        self._mailbox = mailbox
        self._inbox = mailbox.writer.inbox

    @property
    def ended(self) -> bool:
        return self._mailbox.closed or self._mailbox.writer.ended

    def served(self, at: float) -> bool:
        """Note that one was given, in seconds since the epoch; False where nothing is written any more."""
        mailbox = self._mailbox
        if not mailbox.alive():
            return False
        self._inbox.serve(self, at)
        if mailbox.writer.ended:  # just now
            mailbox.refuse_stragglers()
        return True

    def take(self) -> list[float]:
        """The times so far; the writer's."""
        self.listed = False  # before it is looked how many there are: whoever adds one from now on lists it again
        pop = self.times.popleft
        return [pop() for _ in range(len(self.times))]


class Served:
    """Some cached answers that were taken together.

    Attributes:
        like: see `Kind`.
        times, ids, call_ids: of each.
    """

    __slots__ = ("call_ids", "ids", "like", "times")

    def __init__(self, like: CallRecord, times: list[float]) -> None:
        made = IDS.several(2 * len(times))
        self.like, self.times, self.call_ids, self.ids = like, times, made[0::2], made[1::2]

    @classmethod
    def together(cls, taken: Sequence[Served]) -> list[Served]:
        """Those of one kind as one; what was taken stays as it is, for it may have to be written again."""
        if len(taken) < 2:
            return list(taken)
        kinds: dict[int, Served] = {}
        for some in taken:
            whole = kinds.get(id(some.like))
            if whole is None:
                whole = kinds[id(some.like)] = cls(some.like, [])
            whole.times += some.times
            whole.ids += some.ids
            whole.call_ids += some.call_ids
        return list(kinds.values())

    def __len__(self) -> int:
        return len(self.times)

    def records(self) -> list[CallRecord]:
        """The record of each."""
        whole = zip(self.ids, self.call_ids, self.times, strict=True)
        return [self.like._replace(id=id, call_id=call_id, started_at=at) for id, call_id, at in whole]
