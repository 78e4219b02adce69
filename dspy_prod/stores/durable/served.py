"""Cached answers that differ in nothing but when they were given and what each would have cost: noted as they come, and
made records of together.

A record of its own would cost its caller, and then the writer, more than the answer does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import IDS

Given = tuple[float, "int | None"]
"""When a cached answer was given, and what it would have cost."""


class Serving(Protocol):
    """An inbox, see `Inbox.serve`."""

    def serve(self, kind: Kind, given: Given) -> None: ...


class Writing(Protocol):
    """A writer."""

    ended: bool

    @property
    def inbox(self) -> Serving: ...


class Reaching(Protocol):
    """A mailbox."""

    @property
    def writer(self) -> Writing: ...

    def alive(self) -> bool: ...

    def refuse_stragglers(self) -> None: ...


class Kind:
    """Cached answers whose records are alike, of any thread.

    Args:
        like: a record such as theirs; its ids, its time and its `saved_nano` stand for nothing.
        mailbox: how the writer is reached.

    Attributes:
        given: when those were given that the writer has not taken yet, and what each would have cost.
        listed: the writer knows that there are some.
    """

    __slots__ = ("_inbox", "_mailbox", "given", "like", "listed")

    def __init__(self, like: CallRecord, mailbox: Reaching) -> None:
        self.like = like
        self.given: deque[Given] = deque()
        self.listed = False
        self._mailbox = mailbox
        self._inbox = mailbox.writer.inbox

    def served(self, at: float, saved: int | None = None) -> bool:
        """Note that one was given, in seconds since the epoch; False where nothing is written any more.

        Args:
            saved: what it would have cost, in nano-USD.
        """
        mailbox = self._mailbox
        if not mailbox.alive():
            return False
        self._inbox.serve(self, (at, saved))
        if mailbox.writer.ended:  # just now
            mailbox.refuse_stragglers()
        return True

    def take(self) -> list[Given]:
        """Those so far; the writer's."""
        self.listed = False  # before it is looked how many there are: whoever adds one from now on lists it again
        pop = self.given.popleft
        return [pop() for _ in range(len(self.given))]


class Served:
    """Some cached answers that were taken together.

    Attributes:
        like: see `Kind`.
        times, saved, ids, call_ids: of each.
        tried: they were written before, which may have succeeded; else nobody has their ids yet.
    """

    __slots__ = ("call_ids", "ids", "like", "saved", "times", "tried")

    def __init__(self, like: CallRecord, given: Sequence[Given]) -> None:
        self.tried = False
        made = IDS.several(2 * len(given))
        self.like, self.call_ids, self.ids = like, made[0::2], made[1::2]
        times, saved = zip(*given, strict=True) if given else ((), ())
        self.times, self.saved = list(times), list(saved)

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
            whole.saved += some.saved
            whole.ids += some.ids
            whole.call_ids += some.call_ids
            whole.tried = whole.tried or some.tried
        return list(kinds.values())

    def __len__(self) -> int:
        return len(self.times)

    def records(self) -> list[CallRecord]:
        """The record of each."""
        whole = zip(self.ids, self.call_ids, self.times, self.saved, strict=True)
        return [
            self.like._replace(id=id, call_id=call_id, started_at=at, saved_nano=saved)
            for id, call_id, at, saved in whole
        ]
