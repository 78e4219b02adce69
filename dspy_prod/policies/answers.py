"""The answers of a run: each is written down before its caller gets it, and given again when the run is done again.

Unlike the response cache it forgets nothing, whatever its age, and keeps what no cache may: answers that were cut off,
that refuse, or that a fallback gave. Only errors are not kept.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from math import inf
from typing import Any, Final

import orjson
from dspy.lm15 import Request, Response

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.policies.entries import LOCAL, Entry, cacheable
from dspy_prod.policies.written import dumped, loaded
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.base import Store

_log = logging.getLogger("dspy_prod")

KEY_VERSION: Final = b"dspy_prod:answers:1:"
"""Part of every key; raised when the meaning of a key or value changes."""

STRANGERS: Final = 0.05
"""Share of the kept answers. So many questions that were never asked before mean that a run takes another path."""

SHOWS: Final = "The first one was: "
"""After these words a warning quotes a prompt."""

LEEWAY: Final = 16
"""So few never do: questions that were on their way when the run ended have no answer, and answers to what was asked
because a dear call was refused just before the end are asked for no more."""

_SHOWN: Final = 200


class AnswerLog:
    """What a run of this name was answered before, as far as it was not given again yet, and what it is answered now.

    Identical questions that no cache answers are exchangeable: each gets another of the answers that were kept, in
    the order in which they came.

    Attributes:
        kept_before: how many answers there were when it was opened.
        asked: calls so far. replayed: those answered from here. first_new: which call was the first that was not,
            counted from 1.
        strangers: calls that were not, although answers to others were still left.
        unkept: answers that could not be kept.

    Raises:
        StoreUnavailableError: the store cannot be read.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store = store  # whose `runs` are others in a forked child
        self._run = run
        kept = self._store.runs.answers(run)
        self.kept_before = self._left = len(kept)
        self.asked = self.replayed = self.strangers = self.unkept = 0
        self.first_new: int | None = None
        self._few = max(STRANGERS * self.kept_before, LEEWAY)
        self._astray = 0  # strangers while more than a few answers are left
        self._first_strange: Request | None = None
        self._waiting: dict[bytes, deque[int]] = {}
        self._beside: set[tuple[bytes, int]] = set()
        self._order = kept
        for key, ordinal in kept:
            self._waiting.setdefault(key, deque()).append(ordinal)
        self._known = set(self._waiting)
        self._given: dict[bytes, int] = {}
        self._missed: set[bytes] = set()
        self._told = False
        self._after_fork()
        reset_after_fork(self)

    def count(self) -> int:
        """How many answers are kept by now."""
        return self._store.runs.count(self._run)

    def set_beside(self, parts: Sequence[tuple[int, int | None]]) -> None:
        """Say which kept answers, by place, whoever goes on need not ask for: they are not waited for by strangers.

        An optimization's finalists are evaluated when it ends, wherever that was.
        """
        with self._lock:
            for first, end in parts:
                self._beside.update(self._order[first:end])
            self._left = sum(
                (key, ordinal) not in self._beside for key, waiting in self._waiting.items() for ordinal in waiting
            )

    def key(self, key: bytes | None, tenant: str | None) -> bytes | None:
        """Under what a call's answer is kept, None when it cannot be.

        Args:
            key: the call's cache key, also where no cache is used.
        """
        if key is None or key.startswith(LOCAL):
            self._cannot_keep(
                "its arguments are no JSON"
                if key is None
                else "its engine is an object without a name that holds in other processes: give it a cache_key"
            )
            return None
        return hashlib.sha256(KEY_VERSION + orjson.dumps(tenant) + key).digest()

    def find(self, key: bytes, reuse: bool, request: Request) -> Entry | None:
        """The kept answer for a call, None when it has to be asked.

        Args:
            reuse: one answer serves every call that asks the same, as in a cache.
        """
        with self._lock:
            self.asked += 1
            ordinal = self._next(key)
            first = ordinal is not None
            if ordinal is None and reuse:
                ordinal = self._given.get(key)
            if ordinal is None:
                self._miss(key, reuse, request)
                return None
            self._given[key] = ordinal
            number = self.asked
        found = self._read(key, ordinal)
        with self._lock:
            if found is None or not (first or cacheable(found[0])):
                self._new(number)
                return None
            self.replayed += 1
        response, list_nano = found
        return Entry(response, inf, inf, 0, list_nano)

    def has(self, key: bytes, reuse: bool) -> bool:
        """Whether `find` would answer, as far as is known without reading it. Nothing is counted or given out."""
        with self._lock:
            return key in self._waiting or (reuse and key in self._given)

    def keep(self, key: bytes, response: Response, again: bool, list_nano: int | None = None) -> Future[int] | None:
        """Have an answer written down; None when there is nothing to wait for.

        Args:
            list_nano: what it cost.
            again: also when the key has an answer. One that comes from a cache is there already.
        """
        with self._lock:
            if key in self._known and not again:
                return None
            self._known.add(key)
        try:
            value = dumped(response, list_nano)
        except (TypeError, ValueError) as error:
            self._cannot_keep(f"it cannot be written as JSON ({type(error).__name__})")
            return None
        return self._store.runs.keep(self._run, key, value, response.model or "", again)

    def kept(self, key: bytes, future: Future[int]) -> None:
        """An answer has been waited for: see to it that it is durable."""
        if not future.done():
            self._cannot_keep("the store is too slow")
            return
        error = future.exception()
        if error is not None:
            with self._lock:
                self._known.discard(key)  # the cache may give it once more, when it can be kept
            self._cannot_keep(str(error))

    @property
    def diverged(self) -> str | None:
        """What to tell when much was asked that had not been asked before; None while all is as it was."""
        if self._first_strange is None or self._astray <= self._few:
            return None
        asked = _shortened(self._first_strange)
        return (
            f"{self._astray} calls differ from all that the run {outward(repr(self._run))} has answers of, although "
            f"it had {self.kept_before}: the program, its data or a seed is another, it asks for the time, the web or "
            f"a random number, or it was refused something that it may ask now. {SHOWS}{asked}"
        )

    def _next(self, key: bytes) -> int | None:
        waiting = self._waiting.get(key)
        if waiting is None:
            return None
        ordinal = waiting.popleft()
        if not waiting:
            del self._waiting[key]
        if (key, ordinal) not in self._beside:
            self._left -= 1
        return ordinal

    def _miss(self, key: bytes, reuse: bool, request: Request) -> None:
        if reuse and key in self._missed:  # the cache has it, or will
            return
        self._missed.add(key)
        self._new(self.asked)
        if self._left and self.strangers < self.kept_before:
            self.strangers += 1
        if self._left > self._few and self._astray < self.kept_before:
            self._astray += 1
            self._first_strange = self._first_strange or request

    def _new(self, number: int) -> None:
        if self.first_new is None:
            self.first_new = number

    def _read(self, key: bytes, ordinal: int) -> tuple[Response, int | None] | None:
        try:
            value = self._store.runs.answer(self._run, key, ordinal)
            return None if value is None else loaded(value)
        except StoreUnavailableError as error:
            _log.warning("A kept answer of the run %r cannot be read (%s); it is asked again", self._run, error)
        except Exception as error:  # whatever a damaged row makes the decoder raise
            _log.warning("A kept answer of the run %r is damaged (%s)", self._run, type(error).__name__)
        return None

    def _cannot_keep(self, why: str) -> None:
        with self._lock:
            self.unkept += 1
            told, self._told = self._told, True
        if not told:
            _log.warning(
                "An answer of the run %r cannot be kept, and will have to be paid again: %s. Others are not reported",
                self._run,
                outward(why),
            )

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


class Answered:
    """What a run tells of its answers; nothing where it keeps none.

    Attributes:
        answers: its log, if it keeps one.
    """

    answers: AnswerLog | None

    @property
    def asked(self) -> int:
        """Calls inside so far, with `keep_answers`."""
        return 0 if self.answers is None else self.answers.asked

    @property
    def replayed(self) -> int:
        """Those that its log has answered."""
        return 0 if self.answers is None else self.answers.replayed

    @property
    def first_new(self) -> int | None:
        """Which call, counted from 1, was the first that its log did not answer; None while there is none."""
        return None if self.answers is None else self.answers.first_new

    @property
    def strangers(self) -> int:
        """Calls that its log did not answer, although it still had answers to others.

        A few were on their way when the run ended before; many mean that it takes another path, see `diverged`.
        """
        return 0 if self.answers is None else self.answers.strangers

    @property
    def unkept(self) -> int:
        """Answers that could not be kept, for reasons that were logged."""
        return 0 if self.answers is None else self.answers.unkept

    @property
    def diverged(self) -> str | None:
        """A warning, with the first such prompt, when more than 5 % were strangers; None while that is not so."""
        return None if self.answers is None else self.answers.diverged


def log_of(guards: Sequence[Any]) -> AnswerLog | None:
    """Where the answers inside these runs are kept: by the innermost that keeps any."""
    for run in reversed(guards):
        log: AnswerLog | None = getattr(run, "answers", None)
        if log is not None:
            return log
    return None


def _shortened(request: Request) -> str:
    """The end of what a request says last, as it may leave the process: half a secret is known to nobody."""
    texts = [part.text for message in request.messages for part in message.parts if part.type == "text"]
    text = outward(texts[-1]) if texts else ""
    return repr(text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}")
