"""The response cache: fresh answers in memory, above the store.

The memory tier is an LRU bounded in entries and bytes. A key is exact: it covers the whole request, the arguments
outside it, `rollout_id`, the candidate's index and the tenant, so two different requests never share one. Values in
the store are JSON; a row that cannot be read is a miss.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, Final, NamedTuple

from dspy.lm15 import Response, Usage

from dspy_prod.options import Cache
from dspy_prod.policies.written import dumped, loaded
from dspy_prod.stores.base import CachedAnswer, Store

_log = logging.getLogger("dspy_prod")

KEY_VERSION: Final = b"dspy_prod:1:"
"""Part of every key; raised when the meaning of a key or value changes."""

LOCAL: Final = b"local:"
"""Keys that begin so mean something in this process only; their answers are not written to the store."""

_OVERHEAD: Final = 512
"""Bytes added to each entry's size for the objects around its text."""

EMPTY_USAGE: Final = Usage()


class Entry:
    """A kept answer.

    Attributes:
        text: the answer's text when it is text and nothing else.
        expires_at, stale_until: store time.
        size: bytes it counts for.
        list_nano: what it cost when it was asked upstream, in nano-USD; None when that is not known.
    """

    __slots__ = ("_answer", "_emptied", "_mutable", "expires_at", "list_nano", "size", "stale_until", "text")

    def __init__(
        self, answer: Response, expires_at: float, stale_until: float, size: int, list_nano: int | None = None
    ) -> None:
        self._mutable = any(part.type in _MUTABLE for part in answer.message.parts)
        self._answer = _own(answer) if self._mutable else answer
        self._emptied = False
        self.text = _text_alone(answer)
        self.expires_at = expires_at
        self.stale_until = stale_until
        self.size = size
        self.list_nano = list_nano

    @property
    def response(self) -> Response:
        """The answer with empty usage, because serving it used nothing; whoever gets it may change what is in it."""
        if not self._emptied:
            self._answer = _without_usage(self._answer)
            self._emptied = True
        return _own(self._answer) if self._mutable else self._answer


class CacheStats(NamedTuple):
    """Size and use of the memory tier."""

    entries: int
    max_entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int


class ResponseCache:
    """Answers by key, shared by all LMs with the same store, namespace and options.

    Args:
        options: bounds and lifetimes.
        store: where answers survive the process; used when `options.persist`.
        rand: source of TTL jitter.
    """

    def __init__(self, options: Cache, store: Store, rand: Callable[[], float] = random.random) -> None:
        self.options = options
        self._store = store
        self._durable = options.persist and store.durable
        self._now = store.now
        self._rand = rand
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._bytes = 0
        self.hits = 0
        self.misses = 0

    def fresh(self, key: bytes) -> Entry | None:
        """The fresh answer in memory, or None. No I/O; safe on an event loop."""
        entry = self.peek(key)
        if entry is not None:
            self.used(key)
        return entry

    def peek(self, key: bytes) -> Entry | None:
        """`fresh` for a caller who may not use the answer: it counts as nothing until `used`."""
        entry = self._entries.get(key)
        return None if entry is None or (entry.expires_at != inf and entry.expires_at <= self._now()) else entry

    def used(self, key: bytes) -> None:
        """Count a hit in memory."""
        with self._lock:
            self.hits += 1
            try:
                self._entries.move_to_end(key)
            except KeyError:
                pass  # it was dropped meanwhile

    def get(self, key: bytes) -> Entry | None:
        """The fresh answer in memory or, if answers are persistent, in the store."""
        entry = self.fresh(key)
        return entry if entry is not None else self.load(key)

    def load(self, key: bytes) -> Entry | None:
        """The fresh answer in the store, for a caller who has asked the memory already."""
        entry = self.stored(key)
        if entry is None:
            self.misses += 1
            return None
        with self._lock:
            self.hits += 1
        return entry

    def stored(self, key: bytes) -> Entry | None:
        """`load` for a caller who may not use the answer: it is in memory then, and counts as nothing until `used`."""
        entry = self._load(key) if self._writes(key) else None
        return entry if entry is not None and entry.expires_at > self._now() else None

    def stale(self, key: bytes) -> Entry | None:
        """An expired answer that may still be served because every route failed, or None."""
        entry = self._entries.get(key) or (self._load(key) if self._writes(key) else None)
        return entry if entry is not None and entry.stale_until > self._now() else None

    def shared(self, key: bytes) -> bool:
        """Whether other processes may ask for the same answer, and find it here."""
        return self._durable and self._store.flights is not None and not key.startswith(LOCAL)

    def lead(self, key: bytes, name: bytes, waited: bool = False) -> Entry | bool:
        """True: this process asks upstream for a `shared` key, and must `leave` it then. False: another one does, ask
        again soon. Or the answer of another one, which counts as a hit.

        Args:
            name: what the store calls it, `store_key(key)`.
            waited: it was asked before, and the answer was False.
        """
        flights = self._store.flights
        assert flights is not None
        found = flights.join(name, waited)
        if isinstance(found, bool):
            return found
        entry = self._taken(key, found)
        if entry is None or entry.expires_at <= self._now():
            return True
        with self._lock:
            self.hits += 1
        return entry

    def leave(self, name: bytes, verdict: bool = False) -> None:
        """This process asks upstream no more, see `stores.base.Flights`. Posted."""
        flights = self._store.flights
        assert flights is not None
        flights.leave(name, verdict)

    def put(self, key: bytes, response: Response, ttl: float | None, list_nano: int | None = None) -> None:
        """Keep an answer and what it cost, if it is `cacheable`. `ttl` overrides the option, in seconds."""
        if not cacheable(response):
            return
        options = self.options
        expires_at, stale_until = self.times(ttl)
        entry = Entry(response, expires_at, stale_until, _size(key, response), list_nano)
        if entry.size > options.max_bytes:
            return
        self._insert(key, entry)
        if self._writes(key):
            value = _dump(entry.response, list_nano)
            if value is not None:
                self._store.cache_put(
                    store_key(key),
                    CachedAnswer(value, expires_at, stale_until),
                    max_entries=options.max_entries,
                    max_bytes=options.max_bytes,
                )

    def times(self, ttl: float | None) -> tuple[float, float]:
        """(until when what is kept now is fresh, until when it may stand in for an error), in store time."""
        options = self.options
        lifetime = options.ttl if ttl is None else ttl
        if lifetime is None:
            return inf, inf
        expires_at = self._now() + lifetime * (1.0 - options.ttl_jitter * self._rand())
        return expires_at, expires_at + options.stale_if_error

    def clear(self) -> None:
        """Forget every answer in memory; the store forgets its own by `Store.cache_clear`."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        """Size and use."""
        with self._lock:
            return CacheStats(
                len(self._entries),
                self.options.max_entries,
                self._bytes,
                self.options.max_bytes,
                self.hits,
                self.misses,
            )

    def _writes(self, key: bytes) -> bool:
        return self._durable and not key.startswith(LOCAL)

    def _stored_as(self, key: bytes) -> bytes:
        return store_key(key)

    def _insert(self, key: bytes, entry: Entry) -> None:
        entries, options = self._entries, self.options
        with self._lock:
            old = entries.pop(key, None)
            if old is not None:
                self._bytes -= old.size
            entries[key] = entry
            self._bytes += entry.size
            while len(entries) > options.max_entries or self._bytes > options.max_bytes:
                _, dropped = entries.popitem(last=False)
                self._bytes -= dropped.size

    def _load(self, key: bytes) -> Entry | None:
        row = self._store.cache_get(store_key(key))
        return None if row is None else self._taken(key, row)

    def _taken(self, key: bytes, row: CachedAnswer) -> Entry | None:
        """A row of the store as an entry, which is in memory then; None when it cannot be used."""
        try:
            response, list_nano = loaded(row.value)
        except Exception as error:  # whatever a damaged row makes the decoder raise, it is a miss
            _log.warning("A cached answer could not be read (%s); treated as a miss", type(error).__name__)
            return None
        if not cacheable(response):  # kept by an earlier version
            return None
        entry = Entry(response, row.expires_at, row.stale_until, _size(key, response), list_nano)
        if entry.expires_at > self._now():
            self._insert(key, entry)
        return entry

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def cacheable(response: Response) -> bool:
    """Whether an answer may be kept: complete, with something in it, and not a refusal."""
    if response.finish_reason not in ("stop", "tool_call"):
        return False
    if not has_substance(response):
        return False
    parts = response.message.parts
    if len(parts) == 1:
        return bool(parts[0].type != "refusal")
    return all(part.type != "refusal" for part in parts)


def has_substance(response: Response) -> bool:
    """Whether there is anything in an answer but white space and the model's own thoughts."""
    for part in response.message.parts:
        kind = part.type
        if kind == "text":
            text = part.text
            if text and not text.isspace():
                return True
        elif kind != "thinking":
            return True
    return False


def _text_alone(response: Response) -> str | None:
    parts = response.message.parts
    if len(parts) == 1 and parts[0].type == "text" and response.logprobs is None:
        text: str = parts[0].text
        return text
    return None


_MUTABLE: Final = frozenset({"tool_call", "tool_result", "data"})
"""Kinds of parts that may hold a dict or list."""


def _own(response: Response) -> Response:
    """The answer with dicts and lists of its own."""
    message = response.message
    return replace(response, message=replace(message, parts=copy.deepcopy(message.parts)))


def _without_usage(response: Response) -> Response:
    return Response(
        id=response.id,
        model=response.model,
        message=response.message,
        finish_reason=response.finish_reason,
        usage=EMPTY_USAGE,
        logprobs=response.logprobs,
        provider_data=None,
        adaptations=response.adaptations,
        logprobs_complete=response.logprobs_complete,
    )


def _size(key: bytes, response: Response) -> int:
    size = len(key) + _OVERHEAD
    parts = response.message.parts
    if len(parts) == 1 and parts[0].type == "text":
        return size + len(parts[0].text)
    for part in parts:
        for name in ("text", "data"):
            value: Any = getattr(part, name, None)
            if isinstance(value, str):
                size += len(value)
        if part.type == "tool_call":
            size += len(repr(part.input))
    return size


def _dump(response: Response, list_nano: int | None) -> bytes | None:
    try:
        return dumped(response, list_nano)
    except (TypeError, ValueError) as error:
        _log.warning("An answer cannot be written as JSON (%s); it is cached in memory only", type(error).__name__)
        return None


def store_key(key: bytes) -> bytes:
    """What the store calls a key."""
    import hashlib

    return hashlib.sha256(KEY_VERSION + key).digest()
