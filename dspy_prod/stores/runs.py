"""What every store keeps of runs, see `base`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from dspy_prod.stores.vocabulary import Size


class Runs(Protocol):
    """What is kept of runs until somebody removes it: every answer they were given, and notes about them."""

    def answers(self, run: str) -> list[tuple[bytes, int]]:
        """(key, ordinal) of every answer, in the order in which they were kept.

        Raises:
            StoreUnavailableError: it cannot be read. So do the others here, `keep` excepted.
        """
        ...

    def answer(self, run: str, key: bytes, ordinal: int) -> bytes | None:
        """One answer."""
        ...

    def keep(self, run: str, key: bytes, response: bytes, served_model: str, again: bool) -> Future[int]:
        """Keep an answer under the next ordinal of its key, or, unless `again`, only when the key has none. Posted.

        The future has the ordinal once the answer is durable, or the error that it is not.
        """
        ...

    def count(self, run: str) -> int:
        """How many answers a run has, without looking at them."""
        ...

    def answered(self) -> list[str]:
        """The names of the runs that have answers, in order."""
        ...

    def sizes(self, run: str | None = None) -> dict[str, Size]:
        """How many answers each run (or this one) has, and how long they are. Those of all runs take a second for every
        100,000 answers."""
        ...

    def note(self, run: str, name: str) -> str | None:
        """A note about a run."""
        ...

    def noted(self, name: str) -> dict[str, str]:
        """The notes of one name, by run."""
        ...

    def put_note(self, run: str, name: str, value: str | None) -> None:
        """Write a note, or with None remove it; durable on return."""
        ...

    def swap_note(self, run: str, name: str, before: str | None, value: str) -> bool:
        """Write a note where it still says `before` (None: there is none); False, and nothing done, where it does not.

        Of several processes that begin the same thing at once, one is told that it may.
        """
        ...

    def remove(self, run: str, accounts: str | None) -> None:
        """Forget a run: its answers and notes, and the accounts whose keys begin so and hold nothing; None: none."""
        ...

    def bury(self, pid: int) -> None:
        """Charge at once, in full, what a process of this machine holds that has died, instead of at its lease's end.

        Who waits for what it holds waits in vain.
        """
        ...
