"""Which process asks upstream for an answer that others want too: a key for each such answer, that ends by itself.

To look into the cache and to claim is one step of the server, in one round trip. Keys: `answers:flight:<key>`, the
flight: the process that asks, and which of its flights; or `-` for a moment after upstream said what is not shared.
`<that>:wanted`, whether others wait.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.durable.flights import ALONE, FOLLOWS, LEADS, LEASE
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.answers import unpacked
from dspy_prod.stores.redis.batch import STEPS
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.vocabulary import CachedAnswer, Caller

MOST: Final = 4_096
"""Claims that a process may have at once; a further one is not shared."""
_AT_ONCE: Final = 256
_LEASE: Final = int(LEASE * 1000)

# Keys: the answer, those used, the claim, whether it is wanted. Arguments: the answer's key, the flight, whether it
# waited, now, and the lease. An earlier flight of the same process is over: its end is on the way.
_CLAIM: Final = """
local value = redis.call('GET', KEYS[1])
if value and #value >= 24 and redis.call('ZSCORE', KEYS[2], ARGV[1]) then
    if struct.unpack('>d', value) > tonumber(ARGV[4]) then return value end
end
local who = redis.call('GET', KEYS[3])
if who and who ~= '-' and string.sub(who, 1, 32) ~= string.sub(ARGV[2], 1, 32) then
    redis.call('SET', KEYS[4], 1, 'PX', ARGV[5])
    return 1
end
if who == '-' and ARGV[3] == '1' then return 2 end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[5])
redis.call('UNLINK', KEYS[4])
return 0
"""
_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1 + redis.call('PEXPIRE', KEYS[2], ARGV[2])
"""
END: Final = "flight_end"
STEPS[END] = """function(key, args)
    if redis.call('GET', key) ~= args[1] then return 0 end
    if args[2] == '1' then redis.call('SET', key, '-', 'PX', args[3]) else redis.call('UNLINK', key) end
    return 1
end"""


class _Claim:
    """One flight of this process.

    Attributes:
        flight: its name, unlike any other's.
        who: whose it is.
        wanted: others wait for it.
    """

    __slots__ = ("flight", "wanted", "who")

    def __init__(self, flight: bytes, who: Caller | None) -> None:
        self.flight = flight
        self.who = who
        self.wanted = False


class RedisClaims:
    """The claims of one process and namespace. Thread-safe; see `durable.flights.Claims`.

    Args:
        connection: where it is asked.
        mailbox: how the writer is reached, which ends claims.
        now: the store's time.
    """

    def __init__(self, connection: Connection, mailbox: Mailbox, now: Callable[[], float]) -> None:
        self._connection = connection
        self._mailbox = mailbox
        self._now = now
        self._base = connection.key("answers").encode()
        self._me = uuid.uuid4().hex.encode()
        self._numbers = itertools.count()
        self._own: dict[bytes, _Claim] = {}
        self._ends = threading.Lock()  # who has it takes no other one, and does not wait
        self._ended: deque[tuple[str, str, int]] = deque()  # where it is claimed, the flight, whether by a verdict
        self._ending = 0  # how many more are in notes
        self._noted = False  # there is a note that will take those

    def __len__(self) -> int:
        return len(self._own)

    def claimed(self, key: bytes, who: Caller | None = None) -> bool:
        claim = self._own.get(key)
        return claim is not None and claim.who is who

    def claimers(self) -> list[tuple[bytes, Caller | None]]:
        return [(key, claim.who) for key, claim in self._own.copy().items()]

    def claim(self, key: bytes, waited: bool, who: Caller | None = None) -> int | CachedAnswer:
        if key in self._own:
            return FOLLOWS  # another LM of this process
        if len(self._own) >= MOST or self._mailbox.writer.failing is not None:
            return ALONE
        claim = _Claim(b"%s:%d" % (self._me, next(self._numbers)), who)
        try:
            if self._own.setdefault(key, claim) is not claim:
                return FOLLOWS
            found = self._claimed(key, claim, waited)
        except BaseException:  # interrupted: the server may have it
            self._end(key, claim, False)
            raise
        if found != LEADS:
            self._own.pop(key, None)
        return found

    def _claimed(self, key: bytes, claim: _Claim, waited: bool) -> int | CachedAnswer:
        base, flight = self._base, self._key(key)
        asked = ("EVAL", _CLAIM, 4, base + b":of:" + key, base + b":used", flight, flight + b":wanted")
        try:
            (found,) = self._connection.read([(*asked, key, claim.flight, int(waited), repr(self._now()), _LEASE)])
        except StoreUnavailableError:
            return LEADS  # the server may have it: others wait for its end, which is told in any case
        if isinstance(found, bytes):
            return unpacked(found) or ALONE
        return (LEADS, FOLLOWS, ALONE)[found]

    def followed(self, key: bytes) -> bool:
        claim = self._own.get(key)
        return claim is not None and claim.wanted

    def renew(self, but: set[bytes]) -> None:
        own = [each for each in self._own.copy().items() if each[0] not in but]
        for first in range(0, len(own), _AT_ONCE):
            some = own[first : first + _AT_ONCE]
            flights = [(self._key(key), claim.flight) for key, claim in some]
            asked = [("EVAL", _RENEW, 2, at, at + b":wanted", flight, _LEASE) for at, flight in flights]
            try:
                found = self._connection.read(asked)
            except StoreUnavailableError:
                return  # the leases end, and each process asks for itself
            for (_, claim), told in zip(some, found, strict=True):
                claim.wanted = told == 2

    def free(self, key: bytes, verdict: bool, who: Caller | None = None) -> None:
        claim = self._own.get(key)
        if claim is not None and claim.who is who:
            self._end(key, claim, verdict)

    def _end(self, key: bytes, claim: _Claim, verdict: bool) -> None:
        with self._ends:
            if self._own.get(key) is not claim:
                return  # it has ended, and perhaps another one has the key
            del self._own[key]
        if len(self._ended) + self._ending < MOST:  # else it ends with its lease
            self._ended.append((self._key(key).decode(), claim.flight.decode(), int(verdict)))
        if not self._noted:
            note = _Note(self)
            try:
                self._noted = True
                self._mailbox.post((Transactions.note, note.write, note))
                self._mailbox.post((Transactions.nudge, None, None))
            except BaseException:  # interrupted: perhaps there is none
                self._noted = False
                raise

    def take_ends(self) -> list[tuple[str, str, int]]:
        """Those that are not in a note; the writer's."""
        self._noted = False  # first: who comes from now on notes it anew
        count, pop = len(self._ended), self._ended.popleft
        self._ending += count
        return [pop() for _ in range(count)]

    def ends_done(self, count: int) -> None:
        """So many that were taken are written, or never will be; the writer's."""
        self._ending -= count

    def close(self) -> None:
        """What is claimed ends by itself."""
        self._own.clear()

    def _key(self, key: bytes) -> bytes:
        return self._base + b":flight:" + key.hex().encode()


class _Note:
    """Writes all ends that there are when it is done first: one for many, for the writer may be held up.

    Its own `Fate`. What it took and cannot write ends by itself.
    """

    def __init__(self, claims: RedisClaims) -> None:
        self._claims = claims
        self._ends: list[tuple[str, str, int]] = []  # it may have to write them again

    def write(self, tables: Any, now: float) -> None:
        self._ends += self._claims.take_ends()
        for at, flight, verdict in self._ends:
            tables.batch.call(END, at, flight, verdict, _LEASE)

    def written(self) -> None:
        self._claims.ends_done(len(self._ends))

    def lost(self, why: str) -> int:
        if not self._ends:  # perhaps it was never tried: the next end is noted anew
            self._ends = self._claims.take_ends()
        self.written()
        return 0
