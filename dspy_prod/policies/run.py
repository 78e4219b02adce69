"""A run: what all the calls inside a context may use together, whatever LMs make them and wherever those keep state.

An optimizer, an evaluation or a nightly job calls many LMs: those of its programs, a dearer one that proposes prompts,
a judge in a metric. A budget belongs to an LM; a run belongs to the work.
"""

from __future__ import annotations

import datetime as dt
import threading
import uuid
from collections.abc import Sequence
from math import isfinite
from typing import Any, Final, Literal, NamedTuple

from dspy_prod.errors import BudgetExceededError, ConfigError, OptionError, RunStoppedError
from dspy_prod.options import Caps
from dspy_prod.policies.answers import Answered, AnswerLog
from dspy_prod.policies.outage import Outages
from dspy_prod.policies.waiters import Waiter, Waiters
from dspy_prod.privacy.outward import outward
from dspy_prod.records import NANO
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.switch import disabled
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Account, AccountState, Refusal, Store
from dspy_prod.stores.keys import BETWEEN, joined
from dspy_prod.stores.opening import default_namespace, open_store
from dspy_prod.telemetry.events import BUS

Dimension = Literal["usd", "calls", "tokens"]

DIMENSIONS: Final[tuple[Dimension, ...]] = ("usd", "calls", "tokens")
"""In the order in which an attempt takes them, see `claims_of`."""

_NO_CAP: Final = 2**62

_NO_BUDGET: Final = ""
"""Stands in an account's key where a budget has its name, which is never empty."""


class Used(NamedTuple):
    """What a run has used so far, what calls in flight hold not included; None where it does not count.

    Attributes:
        usd: dollars. unconfirmed_usd: the part of them that is an upper bound, because the provider did not tell.
        held_usd: dollars held by calls in flight.
        calls: upstream attempts. tokens: input and output together.
    """

    usd: float | None
    unconfirmed_usd: float | None
    held_usd: float | None
    calls: int | None
    tokens: int | None


class Run(Answered):
    """Caps on everything inside `call_context(run=...)`: dollars, upstream attempts, tokens.

    Every attempt of every `dspy_prod.LM` takes what it may use before it is sent, and gives back what it did not. The
    caps hold across threads, tasks and LMs with stores of their own, and across processes that name the same run in
    the same store: there a run goes on where it was left, also after `kill -9`, with other caps if you like. What
    happens in a run within another one counts for both, and the caps of both hold. A run follows DSPy into its threads;
    a thread that a program starts itself has to enter it again.

    Args:
        name: what it is called in the ledger (`records(run=)`, `costs(by="run")`); made up when not given.
        usd: dollars, at most. An attempt whose cost cannot be bounded is refused (`UnpricedModelError`).
        calls: upstream attempts, at most; answers from the cache are none.
        tokens: input and output tokens together, at most.
        outage: seconds (or a timedelta) that an outage may last. A call that no route answers for a reason of the
            upstreams (an open circuit, no connection, a time-out, a 5xx, a 429) then waits and tries again instead of
            failing, and every answer ends the waits for its upstream. When nothing has answered for so long, calls
            raise `OutageError`. 0: nobody waits.
        store: where the run is counted, as for `LM`. namespace: as for `LM`.
        keep_answers: write every answer into the store before it is returned, as it is, prompts aside; and answer from
            there what a run of this name was answered before, for nothing: after a crash, or `kill -9`, the same
            program does the same work again and goes on where it was. Kept are answers of every kind, errors are not;
            neither age nor size ends them, nor `cache_clear`, only `dspy-prod optimizations rm NAME`. Another object of
            the same name gives all of them again, this one each once. Within several runs the innermost that keeps
            answers is asked. How much was answered so is told by `asked`, `replayed`, `first_new` and `diverged`.

    Raises:
        ConfigError: an impossible cap, or one on what a run of this name was not counted by from its beginning; no
            policy is on (`DSPY_PROD_DISABLED`), so that nothing could be capped.
        StoreUnavailableError: the store cannot be used.

    Example:
        ```python
        run = dspy_prod.Run("nightly", usd=5.0, calls=10_000)
        with dspy_prod.call_context(run=run):
            evaluate(program)
        print(run.used().usd)
        ```
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        usd: float | None = None,
        calls: int | None = None,
        tokens: int | None = None,
        outage: float | dt.timedelta = 0.0,
        store: str | Store | None = None,
        namespace: str | None = None,
        keep_answers: bool = False,
    ) -> None:
        if disabled():
            raise ConfigError("DSPY_PROD_DISABLED is set, so that no policy holds: a run could not be capped. Unset it")
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigError(f"Run: name: must be a non-empty string, got {name!r}")
        self.name = name or uuid.uuid4().hex
        self.caps = _caps(usd=usd, calls=calls, tokens=tokens)
        self.outages = Outages(_seconds(outage))
        self.store = open_store(store if store is not None else default_store_url(), default_namespace(namespace))
        self._keys = {dimension: joined(_NO_BUDGET, "run", self.name, dimension) for dimension in DIMENSIONS}
        self._counted = self._counts(begins=name is None)
        if keep_answers and not self.store.durable:
            raise ConfigError(
                f"Run: keep_answers: {self.store.url} ends with its process, and the answers with it. Keep them in a "
                "file: store='sqlite:///runs.db'"
            )
        self.answers = AnswerLog(self.store, self.name) if keep_answers else None
        self._stopped: str | None = None
        self._after_fork()
        reset_after_fork(self)

    def __repr__(self) -> str:
        given = {name: value for name in DIMENSIONS if (value := getattr(self.caps, name)) is not None}
        caps = "".join([f", {name}={value:{'g' if name == 'usd' else ''}}" for name, value in given.items()])
        return outward(f"Run({self.name!r}{caps})")

    def __copy__(self) -> Run:
        return self  # a copy of a program that keeps one belongs to the same run

    def __deepcopy__(self, memo: Any) -> Run:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"A Run cannot be pickled. In the other process, make dspy_prod.Run({self.name!r}, store=...)")

    # -- what it may use -----------------------------------------------------------------------------------------------
    def allow(self, *, usd: float | None = None, calls: int | None = None, tokens: int | None = None) -> None:
        """Set other caps; what is used stays, and a call that waits or is refused under the old ones asks once more.

        Another process that has this run goes on with the caps that it was given there.

        Raises:
            ConfigError: an impossible cap, or one on what this run has not counted from its beginning.
        """
        every: dict[str, Any] = {"usd": usd, "calls": calls, "tokens": tokens}
        given = {name: value for name, value in every.items() if value is not None}
        with self._lock:
            new = [name for name in given if name not in self._counted]
            if new:
                raise ConfigError(f"Run: {new[0]}: this run does not count it; begin one with {new[0]}=...")
            now: dict[str, Any] = {name: getattr(self.caps, name) for name in DIMENSIONS}
            self.caps = _caps(**{**now, **given})
            watchers = self._watchers.all()
        for each in watchers:
            each.tell()

    def used(self) -> Used:
        """What it has used so far.

        Raises:
            StoreUnavailableError: the store cannot be read.
        """
        found: dict[str, AccountState] = {each.dimension: self.store.account(each.key) for each in self.claims}
        usd, calls, tokens = (found.get(name) for name in DIMENSIONS)
        return Used(
            None if usd is None else usd.spent / NANO,
            None if usd is None else usd.unconfirmed / NANO,
            None if usd is None else usd.held / NANO,
            None if calls is None else calls.spent,
            None if tokens is None else tokens.spent,
        )

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What an attempt needs the leave of."""
        return tuple([Claim(self, dimension, self.store, self._keys[dimension]) for dimension in self._counted])

    def takes_over(self, other: object) -> bool:
        """Whether another object stands for the same run; what that one counts is then counted on."""
        if not isinstance(other, Run) or other.name != self.name or other.store is not self.store:
            return False
        self._counted = tuple([name for name in DIMENSIONS if name in self._counted or name in other._counted])
        self.answers = self.answers or other.answers
        return True

    def limit(self, dimension: Dimension) -> int:
        """The cap of now; dollars in nano-USD."""
        limit = self.caps.usd_nano if dimension == "usd" else getattr(self.caps, dimension)
        return _NO_CAP if limit is None else int(limit)

    def granted(self, name: Dimension, amount: int) -> None:
        """An attempt holds so much of it now; for those who want to know."""

    def refused(self, name: Dimension, refusal: Refusal, model: str, route: str) -> BudgetExceededError:
        """The error for an attempt that the caps do not cover."""
        scale, unit = (NANO, "USD") if name == "usd" else (1, name)
        digits = ".6f" if name == "usd" else ","
        used, cap, bound = (
            f"{number / scale if name == 'usd' else number:{digits}}"
            for number in (refusal.spent + refusal.held, refusal.limit, refusal.amount)
        )
        smaller = "" if name == "calls" else ", or lower max_tokens"
        return BudgetExceededError(
            f"The run {self.name!r} cannot cover this call: {used} of {cap} {unit} are used or held by calls in "
            f"flight, and the call may use up to {bound}. Raise the cap, Run.allow({name}=...){smaller}",
            model=model, route=route, budget=f"run {self.name}: {name}", limit_usd=refusal.limit / scale,
            spent_usd=refusal.spent / scale, held_usd=refusal.held / scale, bound_usd=refusal.amount / scale,
        )  # fmt: skip

    # -- stopping ------------------------------------------------------------------------------------------------------
    @property
    def stopped(self) -> str | None:
        """Why it was stopped; None while it goes on."""
        return self._stopped

    def stop(self, reason: str = "it was stopped") -> None:
        """Send nothing more: whoever waits for a limit, a budget or a retry is refused at once, and so is who comes.

        Attempts that are under way end by themselves. Calls that the cache answers go on.
        """
        with self._lock:
            if self._stopped is not None:
                return
            self._stopped = reason
            watchers = self._watchers.all()
        for each in watchers:
            each.tell()
        BUS.emit("run_stopped", SYSTEM_CLOCK.time(), run=self.name, reason=reason)

    def check(self) -> None:
        """Go on, unless it was stopped.

        Raises:
            RunStoppedError
        """
        if self._stopped is not None:
            raise RunStoppedError(
                f"The run {self.name!r} sends nothing more: {self._stopped}. Begin another one, or call without it",
                run=self.name,
            )

    def watch(self, waiter: Waiter) -> bool:
        """Tell it when the run is stopped or its caps change; False when it is stopped."""
        with self._lock:
            if self._stopped is None:
                self._watchers.add(waiter)
            return self._stopped is None

    def unwatch(self, waiter: Waiter) -> None:
        """Forget a `watch`; takes no lock, so that the garbage collector may."""
        self._watchers.discard(waiter)

    def _counts(self, begins: bool) -> tuple[Dimension, ...]:
        """What it counts: what it caps, and what it was counted by before, so that no cap comes back too large.

        Of a cap on anything else nobody knows how much is left.
        """
        capped = [name for name in DIMENSIONS if getattr(self.caps, name) is not None]
        if begins:
            return tuple(capped)
        known = dict(self.store.accounts(accounts_of(self.name), "", len(DIMENSIONS)))
        missing = [name for name in capped if self._keys[name] not in known]
        if missing and any(state.spent for state in known.values()):
            raise ConfigError(
                f"Run: {missing[0]}: the run {self.name!r} has been without this cap, so nobody knows how much of it "
                f"is used. Leave {missing[0]}= out, or begin a run of another name"
            )
        return tuple([name for name in DIMENSIONS if name in capped or self._keys[name] in known])

    def _after_fork(self) -> None:
        self.outages.after_fork()
        self._lock = threading.RLock()  # `stop` may be called by a signal handler
        self._watchers = Waiters()


class Claim(NamedTuple):
    """One cap that an attempt needs the leave of: whose it is, and the account that counts it."""

    run: Run
    dimension: Dimension
    store: Store
    key: str

    def account(self) -> Account:
        """The account, with the cap of now."""
        run, dimension = self.run, self.dimension
        return Account(self.key, run.limit(dimension), f"run {run.name}: {dimension}")


def accounts_of(name: str) -> str:
    """How the keys of a run's accounts begin."""
    return joined(_NO_BUDGET, "run", name) + BETWEEN


def refused_by(run: Run, error: BaseException) -> bool:
    """Whether it is this run that said no: its caps, or that it was stopped; and no budget or run beside it."""
    if isinstance(error, RunStoppedError):
        return error.run == run.name
    return isinstance(error, BudgetExceededError) and error.budget in [f"run {run.name}: {each}" for each in DIMENSIONS]


def claims_of(runs: tuple[Run, ...]) -> Sequence[Claim]:
    """The caps of all runs that a call belongs to.

    They come in the same order wherever the same runs meet, whichever is within which: else two calls could each hold
    what the other one waits for.
    """
    if len(runs) == 1:
        return runs[0].claims
    return sorted([claim for run in runs for claim in run.claims], key=_place)


def _place(claim: Claim) -> tuple[str, int, int]:
    return claim.run.name, id(claim.store), DIMENSIONS.index(claim.dimension)


def _seconds(outage: float | dt.timedelta) -> float:
    seconds = outage.total_seconds() if isinstance(outage, dt.timedelta) else outage
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not isfinite(seconds) or seconds < 0:
        raise ConfigError(f"Run: outage: must be a number of seconds or a timedelta, 0 or more, got {outage!r}")
    return float(seconds)


def _caps(**given: Any) -> Caps:
    try:
        return Caps(**given)
    except OptionError as error:
        raise OptionError(f"Run: {error.field}: {error.problem}", field=error.field, problem=error.problem) from None
