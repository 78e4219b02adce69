"""Which process asks upstream for an answer that others want too: locks and notes in a file beside the store's.

A claim is the system's lock of one byte of the file, at a place that the key tells: to look and to claim is one call,
no transaction, and a process that ends in whatever way has no claims left. What stands in the file is notes: whose
flight has just ended, whether another process waits, and when its leader was seen alive. A note that is missing, torn
or wrong makes a process ask for itself, or wait until it looks again; so does a file that cannot be made or used.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
import weakref
from hashlib import blake2b
from math import inf
from pathlib import Path
from struct import Struct
from typing import Final

from dspy_prod.runtime import private
from dspy_prod.runtime.boot import boot, is_this_boot
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.durable.flights import ALONE, FOLLOWS, LANDED, LEADS, LEASE
from dspy_prod.stores.vocabulary import Caller

try:
    import fcntl
except ImportError:  # Windows: each process asks for itself
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("dspy_prod")

MOST: Final = 4_096
"""Claims that a process may have at once; a further one is not shared."""
NOTES: Final = 4_096
GRACE: Final = 8.0
"""Seconds for which a leader may be late to say that it is alive, because its machine is busy."""
RETRY: Final = 30.0
"""Seconds after which a file that could not be used is tried again."""
_LOOK: Final = 1.0
"""Seconds between looks whether the file is still there."""

_HEADER: Final = Struct("<8s40s")
_MAGIC: Final = b"flights1"
_FIRST: Final = 64
_NOTE: Final = Struct("<16sdB7x16s")
"""What was claimed last, until when its leader counts as alive (monotonic), how it stands, what is waited for."""
_UNTIL: Final = 16
_STATE: Final = 24
_WANTED: Final = 32
_SIZE: Final = _FIRST + NOTES * _NOTE.size
_NOTHING: Final = bytes(16)
_FLYING, _ENDED, _VERDICT = 1, 2, 3
_DOUBLE: Final = Struct("<d")


class _Claim:
    """One claim of this process.

    Attributes:
        name: what it is called in the file.
        file: where it is locked; there it is let go, whatever the store uses by then.
        who: whose it is.
        taken: nobody is about to take it any more: it is claimed, or who took it was interrupted.
        ends: a mark of each that wants to end it; the first one does.
    """

    __slots__ = ("ends", "file", "name", "taken", "who")

    def __init__(self, name: bytes, file: _File, who: Caller | None) -> None:
        self.name = name
        self.file = file
        self.who = who
        self.taken = False
        self.ends: list[object] = []


class ClaimsFile:
    """The claims of one process and namespace. Thread-safe; see `durable.flights.Claims`.

    The system's locks belong to the process, not to a thread: it would give a key to each thread that asks, and what
    one of them lets go late would be the next one's. So a key is taken among the threads before it is locked, and free
    for them once it is unlocked, not sooner.

    Args:
        path: the store's file.
        namespace: whose keys they are.
    """

    def __init__(self, path: str, namespace: str) -> None:
        self._path = f"{path}-flights"
        self._namespace = blake2b(namespace.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._file: _File | None = None
        self._retry_at = -inf if fcntl is not None else inf
        self._opening = threading.Lock()
        self._own: dict[bytes, _Claim] = {}  # taken among this process's threads

    def __len__(self) -> int:
        return len(self._own)

    def claimed(self, key: bytes, who: Caller | None = None) -> bool:
        return self._claim_of(key, who) is not None

    def _claim_of(self, key: bytes, who: Caller | None) -> _Claim | None:
        claim = self._own.get(key)
        if claim is None or claim.who is not who:
            return None
        return claim if claim.taken or who is not None else None  # of those unknown, another one may be taking it

    def claimers(self) -> list[tuple[bytes, Caller | None]]:
        return [(key, claim.who) for key, claim in self._taken()]

    def _taken(self) -> list[tuple[bytes, _Claim]]:
        return [each for each in self._own.copy().items() if each[1].taken]

    def claim(self, key: bytes, waited: bool, who: Caller | None = None) -> int:
        own = self._own
        try:
            file = self._file
            if file is None or time.monotonic() >= file.look_at:
                file = self._opened()
            if file is None or len(own) >= MOST:
                return ALONE
            name = blake2b(key, digest_size=16, key=self._namespace).digest()
            claim = _Claim(name, file, who)
            try:
                if own.setdefault(key, claim) is not claim:
                    return FOLLOWS  # another LM of this process
                found = file.claim(name, waited)
                if found < FOLLOWS:
                    claim.taken = True
                else:
                    own.pop(key, None)
            except BaseException:  # interrupted: it may have been claimed
                claim.taken = True
                if own.get(key) is claim:
                    self._end(key, claim)
                raise
        except (OSError, ValueError) as error:
            self._give_up(error)
            return ALONE
        return found

    def followed(self, key: bytes) -> bool:
        claim = self._own.get(key)
        with contextlib.suppress(OSError, ValueError):
            return claim is not None and claim.file.wanted(claim.name)
        return False

    def renew(self, but: set[bytes]) -> None:
        file = self._file
        try:
            if file is not None:
                file.renew([claim.name for key, claim in self._taken() if key not in but and claim.file is file])
        except (OSError, ValueError) as error:
            self._give_up(error)

    def free(self, key: bytes, verdict: bool, who: Caller | None = None) -> None:
        claim = self._claim_of(key, who)
        try:
            if claim is not None:
                self._end(key, claim, _VERDICT if verdict else _ENDED)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _end(self, key: bytes, claim: _Claim, state: int | None = None) -> None:
        """Note how it ended, if there is a `state` to note, and unlock it; then let this process's threads have it.

        Once, however many do so at the same time: as long as none has, the key is this claim's.
        """
        me = object()
        try:
            claim.ends.append(me)
            if claim.ends[0] is not me:
                return
            if state is None:
                claim.file.unlock(claim.name)
            else:
                claim.file.free(claim.name, state)
            self._own.pop(key, None)
        except BaseException:  # interrupted: nobody else ends it
            if claim.ends and claim.ends[0] is me and self._own.get(key) is claim:
                try:
                    claim.file.unlock(claim.name)
                finally:
                    self._own.pop(key, None)
            raise

    def close(self) -> None:
        for key, claim in self._taken():
            self.free(key, False, claim.who)
        self._retry_at, self._file = inf, None

    def _opened(self) -> _File | None:
        with self._opening:
            file = self._file
            if file is not None and not file.gone():
                return file
            if time.monotonic() < self._retry_at:
                return None
            if file is not None:
                self._drop()
            self._file = _file(self._path)
            return self._file

    def _give_up(self, error: Exception) -> None:
        """For a while each process asks for itself."""
        with self._opening:
            if time.monotonic() >= self._retry_at:
                _log.info(
                    "%s cannot be used (%s): several processes' identical calls are not shared", self._path, error
                )
            self._retry_at = time.monotonic() + RETRY
            self._drop()

    def _drop(self) -> None:
        self._file = None
        for key, claim in self._taken():
            with contextlib.suppress(OSError):
                self._end(key, claim)


class _File:
    """The file as this process has it open: once, for whoever closes a file lets go of all its locks in it.

    A forked child has the same file, and none of the locks.
    """

    def __init__(self, path: str) -> None:
        place = Path(path)
        private.own_file(place)
        self._handle = os.open(place, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        self._closing = weakref.finalize(self, os.close, self._handle)
        self._begin()
        self._map = mmap.mmap(self._handle, _SIZE)
        self.look_at = -inf
        self._gone = False

    def claim(self, name: bytes, waited: bool) -> int:
        notes, handle = self._map, self._handle
        if os.lseek(handle, 0, os.SEEK_END) < _SIZE:
            raise ValueError("it has become shorter")  # what is mapped and not there would end this process
        number = int.from_bytes(name[:8], "little")
        place = _FIRST + number % NOTES * _NOTE.size
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SIZE + (number >> 2))
        except (BlockingIOError, PermissionError):
            notes[place + _WANTED : place + _NOTE.size] = name
            last, until, state, _ = _NOTE.unpack_from(notes, place)
            lost = last == name and state == _FLYING and until + GRACE < time.monotonic()
            return ALONE if lost else FOLLOWS
        known = notes[place : place + 16] == name
        if waited and known and notes[place + _STATE] == _VERDICT:
            self.unlock(name)
            return ALONE
        _NOTE.pack_into(notes, place, name, time.monotonic() + LEASE, _FLYING, _NOTHING)
        return LANDED if known or waited else LEADS

    def wanted(self, name: bytes) -> bool:
        place = _place(name)
        return self._whole() and self._map[place + _WANTED : place + _NOTE.size] == name

    def renew(self, names: list[bytes]) -> None:
        if not self._whole():
            raise ValueError("it has become shorter")
        until, notes = time.monotonic() + LEASE, self._map
        for name in names:
            place = _place(name)
            if notes[place : place + 16] == name and notes[place + _STATE] == _FLYING:
                _DOUBLE.pack_into(notes, place + _UNTIL, until)

    def free(self, name: bytes, state: int) -> None:
        notes, place = self._map, _place(name)
        if self._whole() and notes[place : place + 16] == name:
            notes[place + _STATE] = state
        self.unlock(name)

    def gone(self) -> bool:
        """Whether it was deleted, perhaps with the store; looked at now and then."""
        now = time.monotonic()
        if now >= self.look_at:
            self.look_at = now + _LOOK
            self._gone = not os.fstat(self._handle).st_nlink
        return self._gone

    def unlock(self, name: bytes) -> None:
        """Others may claim it."""
        fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _SIZE + (int.from_bytes(name[:8], "little") >> 2))

    def _whole(self) -> bool:
        return os.lseek(self._handle, 0, os.SEEK_END) >= _SIZE

    def _begin(self) -> None:
        """Make the notes anew where they say nothing: they are of another run of the machine, or damaged."""
        handle = self._handle
        magic, run = _HEADER.unpack(os.pread(handle, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
        with contextlib.suppress(UnicodeDecodeError):
            if self._whole() and magic == _MAGIC and is_this_boot(run.rstrip(b"\0").decode()):
                return
        # Written, not only made longer: a full disk must fail here, and not when memory is written to.
        os.pwrite(handle, _HEADER.pack(_MAGIC, boot().encode()[:40]).ljust(_SIZE, b"\0"), 0)
        if not self._whole():
            raise OSError("it cannot be written in full")


def _place(name: bytes) -> int:
    return _FIRST + int.from_bytes(name[:8], "little") % NOTES * _NOTE.size


_FILES: weakref.WeakValueDictionary[str, _File] = weakref.WeakValueDictionary()
_LOCK: Final = RegistryLock()


def _file(path: str) -> _File:
    with _LOCK:
        file = _FILES.get(path)
        if file is None or file.gone():
            file = _FILES[path] = _File(path)
        return file
