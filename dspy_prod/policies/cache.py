"""The response cache: fresh answers in memory, above the store.

The memory tier is an LRU bounded in entries and bytes. A key is exact: it covers the whole request, the arguments
outside it, `rollout_id`, the candidate's index and the tenant, so two different requests never share one. Values in
the store are JSON; a row that cannot be read is a miss.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from math import inf
from typing import NamedTuple

from dspy.lm15 import Response

from dspy_prod.options import Cache
from dspy_prod.policies.entries import LOCAL, Entry, cacheable, dump, size_of, store_key
from dspy_prod.policies.written import loaded
from dspy_prod.runtime.brief import brief
from dspy_prod.stores.base import CachedAnswer, Caller, Store

_log = logging.getLogger("dspy_prod")


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
        with brief(self._lock):
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
        with brief(self._lock):
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

    def lead(self, key: bytes, name: bytes, waited: bool = False, who: Caller | None = None) -> Entry | bool:
        """True: this process asks upstream for a `shared` key, and must `leave` it then. False: another one does, ask
        again soon. Or the answer of another one, which counts as a hit.

        Args:
            name: what the store calls it, `store_key(key)`.
            waited: it was asked before, and the answer was False.
            who: the caller, which is asked for again by `leave`.
        """
        flights = self._store.flights
        assert flights is not None
        found = flights.join(name, waited, who)
        if isinstance(found, bool):
            return found
        entry = self._taken(key, found)
        if entry is None or entry.expires_at <= self._now():
            return True
        with brief(self._lock):
            self.hits += 1
        return entry

    def leave(self, name: bytes, verdict: bool = False, who: Caller | None = None) -> None:
        """This caller asks upstream no more, see `stores.base.Flights`. Posted."""
        flights = self._store.flights
        assert flights is not None
        flights.leave(name, verdict, who)

    def put(self, key: bytes, response: Response, ttl: float | None, list_nano: int | None = None) -> None:
        """Keep an answer and what it cost, if it is `cacheable`. `ttl` overrides the option, in seconds."""
        if not cacheable(response):
            return
        options = self.options
        expires_at, stale_until = self.times(ttl)
        entry = Entry(response, expires_at, stale_until, size_of(key, response), list_nano)
        if entry.size > options.max_bytes:
            return
        self._insert(key, entry)
        if self._writes(key):
            value = dump(entry.response, list_nano)
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
        with brief(self._lock):
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        """Size and use."""
        with brief(self._lock):
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
        with brief(self._lock):
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
        entry = Entry(response, row.expires_at, row.stale_until, size_of(key, response), list_nano)
        if entry.expires_at > self._now():
            self._insert(key, entry)
        return entry

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
