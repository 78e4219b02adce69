"""What a memory store knows of runs, for as long as its process lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.vocabulary import Size


class MemoryRuns:
    """See `Runs`.

    Args:
        forget_accounts: forgets the accounts whose keys begin so.
    """

    def __init__(self, forget_accounts: Callable[[str], None]) -> None:
        self._forget_accounts = forget_accounts
        self._answers: dict[str, dict[tuple[bytes, int], bytes]] = {}
        self._counts: dict[tuple[str, bytes], int] = {}
        self._notes: dict[tuple[str, str], str] = {}
        self._after_fork()
        reset_after_fork(self)

    def answers(self, run: str) -> list[tuple[bytes, int]]:
        with self._lock:
            return list(self._answers.get(run, ()))

    def answer(self, run: str, key: bytes, ordinal: int) -> bytes | None:
        with self._lock:
            return self._answers.get(run, {}).get((key, ordinal))

    def keep(self, run: str, key: bytes, response: bytes, served_model: str, again: bool) -> Future[int]:
        kept: Future[int] = Future()
        with self._lock:
            count = self._counts.get((run, key), 0)
            if again or not count:
                self._answers.setdefault(run, {})[key, count] = response
                self._counts[run, key] = count + 1
            else:
                count -= 1
        kept.set_result(count)
        return kept

    def count(self, run: str) -> int:
        with self._lock:
            return len(self._answers.get(run, ()))

    def answered(self) -> list[str]:
        with self._lock:
            return sorted(self._answers)

    def sizes(self, run: str | None = None) -> dict[str, Size]:
        with self._lock:
            kept = {name: list(answers.values()) for name, answers in self._answers.items() if run in (None, name)}
        return {name: Size(len(each), sum(map(len, each))) for name, each in kept.items()}

    def note(self, run: str, name: str) -> str | None:
        with self._lock:
            return self._notes.get((run, name))

    def noted(self, name: str) -> dict[str, str]:
        with self._lock:
            return {run: value for (run, each), value in sorted(self._notes.items()) if each == name}

    def put_note(self, run: str, name: str, value: str | None) -> None:
        with self._lock:
            if value is None:
                self._notes.pop((run, name), None)
            else:
                self._notes[run, name] = value

    def swap_note(self, run: str, name: str, before: str | None, value: str) -> bool:
        with self._lock:
            if self._notes.get((run, name)) != before:
                return False
            self._notes[run, name] = value
            return True

    def remove(self, run: str, accounts: str | None) -> None:
        with self._lock:
            self._answers.pop(run, None)
            self._counts = {known: count for known, count in self._counts.items() if known[0] != run}
            self._notes = {known: note for known, note in self._notes.items() if known[0] != run}
        if accounts is not None:
            self._forget_accounts(accounts)

    def bury(self, pid: int) -> None:
        """Whoever holds something here died with it."""

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
