"""What the writer reads from and writes to Redis: the core's `Backing`, and its transactions.

A transaction is decided on what is known here, and applied by one call of a script that checks whether that is still
so. What money is taken from needs not be unchanged: it is enough that it still suffices. A limiter must be unchanged.
Nobody is locked out while somebody decides; only who found something changed has it to himself for a moment.

Keys, all beginning with the namespace (`Connection.key`):

    meta            hash: `born` tells whether the server lost what it had, `n` counts commits, `terms` their version
    account:<key>   hash: spent, held, unconfirmed, version; kept for a window and two hours after its use
    names           sorted set of accounts, for prefixes; ends: by when their windows end; bounded by the accounts
    window:<a>:<b>  sorted set: the accounts of a budget in a window by what they spent; kept as long as they
    limiter:<key>   hash: state, settings, version; kept for a day after its last use
    terms           hash: title -> terms of a budget; one for each budget
    owners, homes   the processes that hold something: until when their lease goes, and where they run
    holds:<owner>, drawn:<owner>    hash: what one holds, for single calls and for several; gone with its lease
    abandoned:<id>  what was charged for one that is gone; kept for a week
    done:<owner>    its last commit, for a day; lock, turns, bell:<owner>: for a moment
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.accounts import PRUNE_AFTER
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import AccountState, Reservation, Terms
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.bell import Bell
from dspy_prod.stores.redis.caching import Caching
from dspy_prod.stores.redis.cells import NoCells
from dspy_prod.stores.redis.changed import Changed
from dspy_prod.stores.redis.commits import Commit, Commits
from dspy_prod.stores.redis.committing import Committing
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.known import Known
from dspy_prod.stores.redis.owners import Owners
from dspy_prod.stores.redis.parts import Parts
from dspy_prod.stores.redis.timing import RedisTime

_log = logging.getLogger("dspy_prod")


class RedisTables(Committing):
    """One namespace of one server; see the module's docstring. Not thread-safe.

    Args:
        connection: used by nobody else.
        owner: this process's id.
        timing: told the server's time.
        parts: what else is kept there, see `Parts`.
        bell: told the revision of the board.
    """

    kind, noun = "redis", "data on the server"

    def __init__(self, connection: Connection, owner: str, timing: RedisTime, parts: Parts, bell: Bell) -> None:
        super().__init__()
        self.connection = connection
        self.path = connection.shown
        self.owner = owner
        self.cells = NoCells()
        self.batch = Batch()
        self.served: list[Served] = []
        self.ledger, self.programs, self.answers = parts.ledger, parts.programs, parts.answers
        self.cache = Caching(self)
        self._timing = timing
        self._bell = bell
        self._commits = Commits(connection, owner)
        self._known = Known(connection, timing)
        self._owners = Owners(self)
        self._leased = False
        self._unowned = False
        self._renewed = False
        self._name = ""  # that the server's data gets with the transaction under way
        self._core: AdmissionCore | None = None
        self._commit: Commit | None = None
        self._sent: list[Any] | None = None
        self._busy_since: float | None = None
        self._lost_to_others = 0  # tries of the transaction under way
        self._after: list[tuple[int, Callable[[Any], object]]] = []

    # -- what the core asks for ----------------------------------------------------------------------------------------
    def load_account(self, key: str) -> AccountState | None:
        if key not in self._known.accounts:
            self._look([key], [])
        return self._known.account(key)

    def load_terms(self, title: str) -> Terms | None:
        return self._known.terms.get(title)

    def load_limiter(self, key: str) -> tuple[bytes, RateLimit] | None:
        if key not in self._known.limiters:
            self._look([], [key])
        return self._known.limiter(key)

    def load_abandoned(self, id: str) -> Hold | None:
        return self._owners.abandoned(id)

    def load_own(self) -> list[Hold]:
        return self._owners.own()

    def foresee(self, core: AdmissionCore, operations: Sequence[Any]) -> None:
        """Fetch together what these operations and those who wait will need."""
        accounts: dict[str, None] = {}
        limiters: dict[str, None] = {}
        known = self._known
        asked = any(kind is Transactions.answer for kind, _, _ in operations)
        if asked:  # for what is now, not for what was known last
            known.stale()
        needs = _needs(core.heads())
        anew = known.behind and (asked or (core.waiting() > 0 and not known.current(*needs)))
        for kind, one, other in operations:
            if kind is Transactions.admit:
                keys, limit_key = [account.key for account in one.accounts], one.limit_key
                keys = [key for key in keys if key not in known.accounts]
                limit_key = limit_key if one.limit is not None and shared(one.limit) else None
            elif kind is Transactions.settle:
                hold = core.holds.get(one.id)
                keys = [] if hold is None else [key for key in hold.accounts if key not in known.accounts]
                limit_key = None if hold is None or hold.debit is None else hold.limit_key
            elif kind is Transactions.settle_alone:
                keys = [account.key for account in other.accounts if account.key not in known.accounts]
                limit_key = other.limit_key
            elif kind is Transactions.settle_drawn:
                keys, limit_key = [], other.limit_key
            else:
                continue
            accounts.update(dict.fromkeys(keys))
            if limit_key is not None and not (limit_key in known.limiters and known.current((), (limit_key,))):
                limiters[limit_key] = None
        if anew:
            accounts.update(dict.fromkeys(needs[0]))
            limiters.update(dict.fromkeys(needs[1]))
        if accounts or limiters or anew:
            self._look(accounts, limiters, part=not anew)

    def changed(self) -> bool:
        """Whether others have changed what is known here."""
        news, self._known.news = self._known.news or self._unowned, False
        if news:
            self.programs.forget()
        return news

    def stale(self) -> bool:
        """Whether others have written since; only looking."""
        try:
            return not self._opened or self._known.stale()
        except StoreUnavailableError:
            return True  # the transaction that follows tells

    def probe(self, now: float) -> None:
        """Write something in any case."""
        self.batch.call("HSET", self._commits.reserved[0], "recovered_at", now)

    def after_commit(self, place: int, function: Callable[[Any], object]) -> None:
        """Once the transaction is durable, give the reply of the command at this place of the batch to `function`."""
        self._after.append((place, function))

    # -- leases --------------------------------------------------------------------------------------------------------
    def owned(self) -> bool:
        """Whether this process's lease is still there: whoever reaps it deletes it."""
        if self._unowned:
            self._unowned = self._leased = False
            return False
        return True

    def renew(self, until: float) -> None:
        """Extend this process's lease on all its holds."""
        self._owners.renew(until)
        self._renewed = True

    def resign(self) -> None:
        """This process holds nothing any more. Where that cannot be written, the lease runs out."""
        if self._leased:
            self._owners.resign()
            self._leased = False

    def owners(self, now: float) -> int:
        """Other processes that hold something."""
        return self._owners.others(now)

    def expired(self, now: float, most: int) -> list[Hold]:
        """Holds of processes whose lease ran out; an owner without holds is deleted."""
        return self._owners.expired(now, most)

    def held_by(self, pid: int) -> list[Hold]:
        """Holds of a process of this machine that is gone, whatever its lease says."""
        return self._owners.held_by(pid)

    def drop_accounts(self, prefix: str) -> None:
        """Delete the accounts whose keys begin so and that hold nothing."""
        for key, state in self._known.beginning(prefix):
            if not state.held:
                name = carried(key)
                self.batch.call("DEL", self.connection.key("account", key))
                for index in ("names", "ends"):
                    self.batch.call("ZREM", self.connection.key(index), name)
                window = self._known.window(key)
                if window is not None:
                    self.batch.call("ZREM", window, name)
                self._known.accounts.pop(key, None)

    def sweep(self, now: float, most: int) -> bool:
        """Delete what nothing can refer to any more, at most `most` of each; whether there may be more."""
        ends, names = self.connection.key("ends"), self.connection.key("names")
        (over,) = self.connection.read([("ZRANGEBYSCORE", ends, "-inf", repr(now - PRUNE_AFTER), "LIMIT", 0, most)])
        if over:
            self.batch.call("ZREM", ends, *over)
            self.batch.call("ZREM", names, *over)
            for name in over:
                window = self._known.window(name.decode("utf-8", "replace"))
                if window is not None:  # that of runs goes on when one of them is over
                    self.batch.call("ZREM", window, name)
        more = self.answers.purge(self.batch, now, most)
        return len(over) >= most or bool(more)

    # -- writing back --------------------------------------------------------------------------------------------------
    def write(self, core: AdmissionCore, now: float) -> list[CallRecord]:
        """Have ready what the core changed, and what it was decided on."""
        assert core.changes is not None
        self._core = core
        self._commit = commit = Commit(self.batch, self._commits.reserved)
        Changed(self.connection, self.owner, self._known, self.batch, commit).add(core, now)
        self._owners.write(commit, core.changes.reaped)
        if core.changes.stray is not None and self._known.older:
            self._name = uuid.uuid4().hex
            self.batch.call("HSET", self._commits.reserved[0], "born", self._name)
        self.programs.write(self.batch, now)
        return self.ledger.write(self.batch, core.appended, core.replaced, self.served)


def _needs(heads: Iterable[Reservation]) -> tuple[list[str], list[str]]:
    """The accounts and limiters that those depend on who are served next."""
    heads = list(heads)
    limiters = [head.limit_key for head in heads if head.limit_key is not None]
    return [account.key for head in heads for account in head.accounts], limiters
