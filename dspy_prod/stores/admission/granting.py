"""One attempt to grant, and the lines of those who could not be granted yet. The lower half of the admission core.

A reservation is blocked either by its limiter, and then stands in that limiter's line, or by money that other calls
hold, and then is parked with that account. Money is looked at first, so a caller who waits for money never stands in
the way of callers who only need the limiter. Whoever changes state serves the line; nobody books ahead.
"""

from __future__ import annotations

from math import inf

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.accounts import AccountBook, AccountEntry
from dspy_prod.stores.admission.holds import Backing, Changes, Hold
from dspy_prod.stores.admission.limiter import Debit, LimiterState
from dspy_prod.stores.admission.line import WaitingLine
from dspy_prod.stores.admission.terms import TermsBook
from dspy_prod.stores.admission.turns import FRESH
from dspy_prod.stores.base import (
    GRANTED,
    REFUSED,
    Account,
    AccountState,
    Refusal,
    Reservation,
)


def shared(limit: RateLimit) -> bool:
    """Whether a limit is kept for all processes. One that only reacts to 429s is each core's own: every core slows
    down its own share of the traffic, and nothing needs to outlive it."""
    return limit.rpm is not None or limit.tpm is not None or limit.concurrency is not None


class Granting:
    """State of limiters, accounts, holds and lines, and the steps in which reservations are decided.

    `appended` and `replaced` collect ledger records for the store to write; `decided` collects reservations to wake.
    With a backing, verdicts and everything else that has to be written first are collected in `changes` instead.
    """

    def __init__(self, backing: Backing | None = None) -> None:
        self._backing = backing
        self._process = "" if backing is None else backing.owner
        self.changes: Changes | None = None if backing is None else Changes()
        self.accounts = AccountBook(None if backing is None else backing.load_account)
        self.terms = TermsBook(None if backing is None else backing.load_terms)
        self._limiters: dict[str, LimiterState] = {}
        self._configured: dict[str, RateLimit] = {}  # the latest settings of each key that limit anything
        self._guests: dict[str, LimiterState] = {}  # loaded to give back to, unused by this process
        self._lines: dict[str, WaitingLine] = {}
        self._parked: dict[str, WaitingLine] = {}
        self._timers: dict[str, float] = {}
        self._next_lease = inf
        self._seq = 0
        self.holds: dict[str, Hold] = {}
        self.decided: list[Reservation] = []
        self.appended: list[CallRecord] = []
        self.replaced: list[CallRecord] = []
        self._abandoned: dict[str, Hold] = {}

    # -- one attempt to grant ----------------------------------------------------------------------------------------
    def _attempt(self, reservation: Reservation, now: float) -> str | None:
        """Grant or refuse (None), or say what blocks: an account's key, or "" for the limiter."""
        amount = reservation.amount
        entries, limits = self.accounts.entries, self.terms.limits
        held: Account | None = None
        for account in reservation.accounts:
            state = entries.get(account.key) or self.accounts.get(account.key)
            if now > state.note_at:
                self.accounts.use(account, now)
            limit = limits.get(account.budget)
            if limit is None:
                limit = self.terms.limit(account)
            if state.spent + state.held + amount > limit:
                if state.spent + amount > limit:
                    self._decide(reservation, REFUSED, no_money(account, limit, state, amount))
                    return None
                held = held or account
        if held is not None:  # and no account refuses: waiting may help
            reservation.blocked_on = held.title
            return held.key
        key = reservation.limit_key
        debit: Debit | None = None
        if key is not None:
            assert reservation.limit is not None
            limiter = self.limiter_for(key, reservation.limit, now)
            at = limiter.ready_at(now, reservation.tokens)
            if at > now:
                reservation.blocked_on = limiter.blocked_on
                ahead = self.changes is not None and at <= reservation.horizon
                lead = limiter.lead(self._process, now) if ahead else 0.0
                if at == inf:
                    self._timers.pop(key, None)
                else:
                    self._timers[key] = at - lead
                if at - lead > now:  # as the timer has it
                    return ""
            if turns := limiter.turns:
                scarce = at > now or not limiter.has_room_for(turns.places(self._process), reservation.tokens, now)
                if scarce and turns.belongs_to_another(self._process, reservation.priority, now):
                    reservation.blocked_on = "concurrency" if limiter.limit.concurrency is not None else "requests"
                    limiter.blocked_on = ""  # which says no moment
                    self._timers[key] = now + FRESH / 2  # should they not come
                    return ""
                turns.taken(self._process, reservation.priority)
            debit = limiter.take(now, reservation.tokens, reservation.lease, at)
            reservation.granted_at = max(at, now)
            if self.changes is not None and shared(limiter.limit):
                self.changes.limiters.add(key)
        accounts: tuple[str, ...] = ()
        if reservation.accounts:
            accounts = tuple([account.key for account in reservation.accounts])
            reservation.spent = self.accounts.hold(accounts, amount)
        until = now + reservation.lease
        hold = Hold(reservation.id, accounts, amount, key, debit, until, reservation.stub)
        self.holds[reservation.id] = hold
        if until < self._next_lease:
            self._next_lease = until
        if self.changes is not None:
            self.changes.added[reservation.id] = hold
            self._decide(reservation, GRANTED, None)
        else:
            reservation.state = GRANTED
            if reservation.wake is not None:
                self.decided.append(reservation)
        return None

    def _decide(self, reservation: Reservation, state: int, refusal: Refusal | None) -> None:
        if self.changes is not None:
            self.changes.verdicts.append((reservation, state, refusal))
            return
        reservation.refusal = refusal
        reservation.state = state
        if reservation.wake is not None:  # else its owner has not begun to wait, and `attach` will tell it
            self.decided.append(reservation)

    def _queue(self, reservation: Reservation, blocked: str, now: float) -> None:
        if blocked:
            self._park(reservation, blocked)
        elif not self._refuse_for_time(reservation, now):
            assert reservation.limit_key is not None
            self._line(reservation.limit_key).push(reservation)

    def _refuse_for_money(self, reservation: Reservation) -> bool:
        for account in reservation.accounts:
            state, limit = self.accounts.get(account.key), self.terms.limit(account)
            if state.spent + reservation.amount > limit:
                self._decide(reservation, REFUSED, no_money(account, limit, state, reservation.amount))
                return True
        return False

    def _refuse_for_time(self, reservation: Reservation, now: float) -> bool:
        assert reservation.limit_key is not None
        assert reservation.limit is not None
        limiter = self.limiter_for(reservation.limit_key, reservation.limit, now)
        line = self._lines.get(reservation.limit_key)
        ahead = line.ahead_of(reservation) if line is not None and not reservation.fair else 0
        earliest = limiter.earliest(now, reservation.tokens, ahead)
        if earliest <= reservation.horizon:
            return False
        self._decide(reservation, REFUSED, Refusal("rate_limited", max(0.0, earliest - now), reservation.blocked_on))
        return True

    # -- lines -------------------------------------------------------------------------------------------------------
    def _line(self, key: str) -> WaitingLine:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = WaitingLine()
        return line

    def _must_park(self, reservation: Reservation) -> str | None:
        """The first of the reservation's accounts at which others already wait."""
        if self._parked:
            for account in reservation.accounts:
                if account.key in self._parked:
                    return account.key
        return None

    def _park(self, reservation: Reservation, key: str) -> None:
        line = self._parked.get(key)
        if line is None:
            line = self._parked[key] = WaitingLine()
        line.push(reservation)

    def take_turns(self, now: float) -> None:
        """Say to the other processes for which limiters somebody waits here, and for which nobody does any more."""
        assert self.changes is not None
        for key, line in self._lines.items():
            state, head = self._limiters.get(key), line.head()
            if state is not None and shared(state.limit):
                turns = state.turns
                if turns.leave(self._process) if head is None else turns.wait(self._process, head.priority, now):
                    self.changes.limiters.add(key)

    def _serve_limiter(self, key: str, now: float) -> None:
        line = self._lines.get(key)
        while line:
            reservation = line.head()
            assert reservation is not None
            blocked = self._attempt(reservation, now)
            if blocked == "":
                return  # the timer is set, or a release will come
            line.pop()
            if blocked is not None:
                self._park(reservation, blocked)
        self._timers.pop(key, None)

    def _serve_account(self, key: str, now: float) -> None:
        line = self._parked.get(key)
        if line is None:
            return
        moved: set[str] = set()
        while (reservation := line.head()) is not None:
            limit_key = reservation.limit_key
            if limit_key is not None and self._lines.get(limit_key):
                # Others wait for this limiter; take the old place among them instead of overtaking.
                line.pop()
                self._line(limit_key).push(reservation)
                moved.add(limit_key)
                continue
            blocked = self._attempt(reservation, now)
            if blocked == key:
                break
            line.pop()
            if blocked == "":
                assert limit_key is not None
                self._line(limit_key).push(reservation)
            elif blocked is not None:
                self._park(reservation, blocked)
        if not line:
            del self._parked[key]
        for limit_key in moved:
            self._serve_limiter(limit_key, now)

    def _serve_terms(self, now: float) -> None:
        """A limit changed: refuse whom it can no longer cover, wherever they wait, and serve the others."""
        for lines, serve in ((self._parked, self._serve_account), (self._lines, self._serve_limiter)):
            for key, line in list(lines.items()):
                for reservation in list(line):
                    if self._refuse_for_money(reservation):
                        line.remove(reservation)
                serve(key, now)

    def _touch_limiter(self, key: str, now: float) -> None:
        if self.changes is not None:
            state = self.limiter_state(key)
            if state is not None and shared(state.limit):
                self.changes.limiters.add(key)
        if self._lines.get(key):
            self._serve_limiter(key, now)

    # -- state -------------------------------------------------------------------------------------------------------
    def limiter_state(self, key: str) -> LimiterState | None:
        """The limiter itself, for a durable store to write back."""
        return self._limiters.get(key) or self._guests.get(key)

    def limiter_for(self, key: str, limit: RateLimit, now: float) -> LimiterState:
        """The limiter of a key, under the settings of who uses it now."""
        state = self._limiters.get(key)
        if state is not None and state.limit is limit:
            return state
        if shared(limit):
            self._configured[key] = limit
        else:  # a route that only reacts to 429s does not lift the limit that another route of this key asked for
            limit = self._configured.get(key, limit)
        if state is None:
            state = self._guests.pop(key, None)
            if state is not None:
                state.reconfigure(limit, now)
            else:
                state = self._load_limiter(key, limit, now) or LimiterState(limit, now)
            self._limiters[key] = state
        elif state.limit != limit:  # a copy with other settings: each is held to its own
            stored = None if shared(state.limit) else self._load_limiter(key, limit, now)
            if stored is None:
                state.reconfigure(limit, now)
            else:  # what all processes counted replaces what this one reacted to, but for a pause
                paused_for = state.snapshot(now, key, 0).paused_for
                state = self._limiters[key] = stored
                if paused_for > 0:
                    state.throttled(now, paused_for)
        return state

    def known_limiter(self, key: str, now: float) -> LimiterState | None:
        """A limiter that was used before, by whichever process."""
        return self._limiters.get(key) or self._guests.get(key) or self._visit_limiter(key, now)

    def _visit_limiter(self, key: str, now: float) -> LimiterState | None:
        """A limiter that no reservation of this process has used yet, with the settings it was last used with."""
        state = self._load_limiter(key, None, now)
        if state is not None:
            self._guests[key] = state
        return state

    def _load_limiter(self, key: str, limit: RateLimit | None, now: float) -> LimiterState | None:
        if self._backing is None or (limit is not None and not shared(limit)):
            return None
        stored = self._backing.load_limiter(key)
        if stored is None:
            return None
        try:
            return LimiterState.load(stored[0], limit or stored[1], now)
        except ValueError:  # of another version, or of another time: start afresh, for it describes one minute only
            return None


def no_money(account: Account, limit: int, state: AccountEntry | AccountState, amount: int) -> Refusal:
    return Refusal("budget_exceeded", None, account.title, limit, state.spent, state.held, amount)
