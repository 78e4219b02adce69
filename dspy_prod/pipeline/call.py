"""One LM call: what it asks, under which conditions, and what its attempts cost.

The flow (`flow.py`) says in which order things happen; this object knows the details: it builds asks, turns refusals
into errors, and settles every attempt exactly once.
"""

from __future__ import annotations

import itertools
import os
import uuid
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from dspy.lm15 import Request, Response, Usage
from dspy.utils.exceptions import LMTimeoutError

from dspy_prod.bounds import hosted_fees
from dspy_prod.context import CallContext
from dspy_prod.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    RateLimitedError,
    RejectedError,
    StoreUnavailableError,
    UnpricedModelError,
)
from dspy_prod.pipeline.effects import AttemptTimeoutError
from dspy_prod.pipeline.outcome import OWN_DEADLINE, Verdict, judge
from dspy_prod.pipeline.reaper import REAPER
from dspy_prod.policies.breaker import Permit
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.cache import EMPTY_USAGE, Entry
from dspy_prod.pricing import Rates
from dspy_prod.records import CallRecord, usd
from dspy_prod.stores.base import PRIORITIES, Account, Ask, Refusal, Settlement, Ticket

if TYPE_CHECKING:
    from dspy_prod.pipeline.pipeline import Pipeline
    from dspy_prod.pipeline.routes import Route

_DEFAULT_MAX_WAIT = 60.0
_LEASE_GRACE = 30.0
_UNBOUNDED_LEASE = 900.0
_MIN_SHRUNK_TOKENS = 16


class _Ids:
    """Unique ids, cheap to make: a random prefix per process and a counter."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._prefix = uuid.uuid4().hex[:16]
        self._next = itertools.count(1).__next__

    def make(self) -> str:
        return f"{self._prefix}-{self._next():x}"


IDS = _Ids()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IDS.renew)


class Plan:
    """What one attempt reserves: request, bounds, price and accounts."""

    __slots__ = ("accounts", "bound", "request", "route", "rules", "tokens")

    def __init__(
        self,
        route: Route,
        request: Request,
        tokens: int,
        bound: int | None,
        rules: tuple[BudgetRule, ...],
        accounts: tuple[Account, ...],
    ) -> None:
        self.route = route
        self.request = request
        self.tokens = tokens
        self.bound = bound
        self.rules = rules
        self.accounts = accounts


class Call:
    """See the module's docstring.

    Attributes:
        key: the cache key, or None when the cache does not apply.
        deadline: monotonic time by which the call must end.
        streaming: the answer is delivered event by event.
        visible: a stream event has reached the consumer, so nothing may be tried again.
        records: what this call's attempts were.
    """

    __slots__ = (
        "_wall_offset",
        "cache_mode",
        "context",
        "deadline",
        "degraded",
        "extras",
        "id",
        "key",
        "pipeline",
        "records",
        "request",
        "route_name",
        "streaming",
        "ttl",
        "visible",
        "waited",
    )

    def __init__(
        self,
        pipeline: Pipeline,
        request: Request,
        context: CallContext,
        *,
        key: bytes | None,
        extras: dict[str, Any] | None,
        streaming: bool,
    ) -> None:
        self.pipeline = pipeline
        self.request = request
        self.context = context
        self.key = key
        self.extras = extras
        self.streaming = streaming
        self.deadline = context.deadline
        self.cache_mode = context.cache
        self.ttl = context.ttl
        self.visible = False
        self.degraded = False
        self.waited = 0.0
        self.route_name = ""
        self.records: list[CallRecord] = []
        self.id = IDS.make()

    # -- routes and reservations --------------------------------------------------------------------------------------
    def routes(self) -> tuple[Route, ...]:
        """The routes to try in order; a budget past its soft threshold puts its cheaper model first."""
        pipeline = self.pipeline
        if pipeline.degradable:
            wall = pipeline.clock.time()
            for rule in pipeline.budgets:
                model = rule.degraded(rule.account(self.context, pipeline.primary.model, wall).key)
                if model is not None and model != pipeline.primary.model:
                    self.degraded = True
                    return (pipeline.route_to(model), *pipeline.fallbacks)
        return pipeline.routes

    def plan(self, route: Route) -> Plan:
        """What an attempt on this route needs.

        Raises:
            UnpricedModelError: a budget applies and the cost cannot be bounded.
            BudgetExceededError: a budget requires a scope that the context does not name.
        """
        pipeline = self.pipeline
        request = self.request if route.model == self.request.model else replace(self.request, model=route.model)
        if route.defaults:
            request = _with_defaults(request, route.defaults)
        rules = pipeline.budgets
        if not rules:
            tokens = 0
            if route.limit.tpm is not None:
                bounds = route.bounds(request)
                tokens = route.limiter_tokens(request, bounds)
                self._check_fits(route, request)
            return Plan(route, request, tokens, None, (), ())
        bounds = route.bounds(request)
        tokens = 0
        if route.limit.tpm is not None:
            tokens = route.limiter_tokens(request, bounds)
            self._check_fits(route, request)
        wall = pipeline.clock.time()
        if len(rules) == 1:
            accounts: tuple[Account, ...] = (rules[0].account(self.context, route.model, wall),)
        else:
            accounts = tuple([rule.account(self.context, route.model, wall) for rule in rules])
        return Plan(route, request, tokens, self._bound(route, request, bounds), rules, accounts)

    def ask(self, plan: Plan, number: int) -> Ask | None:
        """The reservation for a plan, None when nothing has to be reserved."""
        route = plan.route
        limited = route.limited or route.state.throttled
        if not limited and not plan.accounts:
            return None
        pipeline = self.pipeline
        context = self.context
        fair_by = route.limit.fair_by
        store = pipeline.store
        now = pipeline.clock.monotonic()
        until = self.attempt_until(route, now)
        return Ask(
            IDS.make(),
            limit_key=route.limit_key if limited else None,
            limit=route.limit if limited else None,
            tokens=plan.tokens,
            accounts=plan.accounts,
            amount=plan.bound or 0,
            priority=PRIORITIES[context.priority],
            fair="" if fair_by is None else (getattr(context, fair_by) or ""),
            horizon=store.now() + (self.wait_until(plan, now) - now),
            lease=_UNBOUNDED_LEASE if until == inf else until - now + _LEASE_GRACE,
            stub=self._record(plan, "", number, "abandoned", None, True, None) if plan.accounts else None,
        )

    def wait_until(self, plan: Plan, now: float) -> float:
        """Monotonic time up to which admission may take."""
        longest = inf
        if plan.route.limit.max_wait is not None:
            longest = plan.route.limit.max_wait
        for rule in plan.rules:
            if rule.options.max_wait is not None:
                longest = min(longest, rule.options.max_wait)
        if longest == inf:
            return self.deadline if self.deadline != inf else now + _DEFAULT_MAX_WAIT
        return min(self.deadline, now + longest)

    def attempt_until(self, route: Route, now: float) -> float:
        """Monotonic time at which an attempt that starts now must end."""
        if route.timeout is None or self.streaming:
            return self.deadline
        return min(self.deadline, now + route.timeout)

    # -- refusals ----------------------------------------------------------------------------------------------------
    def refused(self, plan: Plan, refusal: Refusal) -> RejectedError:
        """The error for a store's refusal."""
        route = plan.route
        if refusal.reason == "budget_exceeded":
            return BudgetExceededError(
                f"Budget {refusal.dimension!r} cannot cover this call: {usd(refusal.spent):.6f} of "
                f"{usd(refusal.limit):.6f} USD is spent and the call may cost up to {usd(refusal.amount):.6f} USD. "
                "Raise the budget, lower max_tokens, or wait for its next window",
                model=route.model,
                route=route.name,
                budget=refusal.dimension,
                limit_usd=usd(refusal.limit),
                spent_usd=usd(refusal.spent),
                held_usd=usd(refusal.held),
                bound_usd=usd(refusal.amount),
            )
        if refusal.reason == "store_unavailable":
            return StoreUnavailableError(
                f"The state store {self.pipeline.store.url} cannot record this call ({refusal.detail}), so it was not "
                "sent. Check its disk and permissions, or use store='memory://'",
                model=route.model,
                route=route.name,
            )
        return self.limited(plan, refusal.dimension, refusal.retry_after)

    def limited(self, plan: Plan, dimension: str, retry_after: float | None) -> RejectedError:
        """The error for a limiter that cannot admit the call in time."""
        route = plan.route
        later = "" if retry_after is None else f"; it could be admitted in {retry_after:.1f} s"
        return RateLimitedError(
            f"The rate limit ({dimension or 'requests'}) of {route.model} cannot admit this call within its longest "
            f"wait{later}. Raise max_wait, the call's deadline, or the limit",
            model=route.model,
            route=route.name,
            retry_after=retry_after,
            dimension=dimension,
        )

    def waited_too_long(self, plan: Plan, ticket: Ticket) -> RejectedError:
        """The error for a wait that ended without a grant."""
        if self.pipeline.clock.monotonic() >= self.deadline:
            return self.too_late(f"while waiting for {ticket.blocked_on or 'admission'}")
        for account in plan.accounts:
            if account.title == ticket.blocked_on:
                state = self.pipeline.store.account(account.key)
                refusal = Refusal(
                    "budget_exceeded", None, account.title, account.limit, state.spent, state.held, plan.bound or 0
                )
                return self.refused(plan, refusal)
        return self.limited(plan, ticket.blocked_on, None)

    def too_late(self, when: str) -> DeadlineExceededError:
        """The error for a deadline of our own that has passed."""
        return DeadlineExceededError(f"The call's deadline passed {when}", model=self.request.model)

    def shrunk(self, plan: Plan, refusal: Refusal) -> Plan | None:
        """The same plan with `max_tokens` clamped to what its budget has left, when the budget allows that."""
        if refusal.reason != "budget_exceeded" or not any(rule.options.shrink_last for rule in plan.rules):
            return None
        rates = plan.route.rates()
        inputs, outputs = plan.route.bounds(plan.request)
        if rates is None or inputs is None or outputs is None:
            return None
        left = refusal.limit - refusal.spent - refusal.held
        fits = min(outputs, rates.max_output_for(left, inputs))
        if fits < _MIN_SHRUNK_TOKENS:
            return None
        request = replace(plan.request, config=replace(plan.request.config, max_tokens=fits))
        bound = plan.route.most(request, inputs, fits)
        return Plan(plan.route, request, min(plan.tokens, inputs + fits), bound, plan.rules, plan.accounts)

    def note_spending(self, plan: Plan, ticket: Ticket) -> None:
        """Notice budgets that passed their soft threshold with this grant."""
        for rule, account, spent in zip(plan.rules, plan.accounts, ticket.spent, strict=False):
            if rule.soft_passed(account.key, spent):
                self.emit(
                    "budget_soft", budget=account.title, spent_usd=usd(spent), limit_usd=usd(account.limit),
                    degrade_to=rule.options.degrade_to,
                )  # fmt: skip

    # -- ends --------------------------------------------------------------------------------------------------------
    def succeeded(
        self, plan: Plan, ticket: Ticket | None, permit: Permit | None, number: int, started: float, response: Response
    ) -> None:
        """Settle an attempt that was answered."""
        pipeline = self.pipeline
        route = plan.route
        usage = response.usage
        latency = pipeline.clock.monotonic() - started
        rates = route.rates()
        cost = route.prices.price_response(rates, response, plan.request)
        estimated = False
        if cost is None and rates is not None:
            cost = plan.bound if plan.bound is not None else self._bound_or_none(route, plan.request)
            estimated = cost is not None
        id = ticket.ask.id if ticket is not None else IDS.make()
        record = self._record(plan, id, number, "ok", cost, estimated, usage, latency=latency)
        if ticket is not None:
            tokens = _used(usage)
            pipeline.store.settle(ticket, Settlement(id, cost, tokens, True, estimated, record))
            if plan.accounts and cost is not None and plan.bound is not None and cost > plan.bound:
                self.emit("budget_overrun", model=route.model, cost_usd=usd(cost), bound_usd=usd(plan.bound))
        else:
            pipeline.store.append(record)
        if permit is not None:
            route.state.breaker.success(permit, latency)  # type: ignore[union-attr]  # a permit came from it
        route.state.retry_budget.success()
        if usage.output_tokens is not None and route.limit.tpm is not None:
            route.state.learn(usage.output_tokens)
        self._remember(record)

    def failed(
        self,
        plan: Plan,
        ticket: Ticket | None,
        permit: Permit | None,
        number: int,
        started: float,
        until: float,
        raised: BaseException,
    ) -> tuple[BaseException, Verdict]:
        """Settle an attempt that raised, and say which error it is and what it means."""
        pipeline = self.pipeline
        route = plan.route
        latency = pipeline.clock.monotonic() - started
        error: BaseException = raised
        late = None
        if isinstance(raised, AttemptTimeoutError):
            late = raised.late
            if until >= self.deadline:
                error = self.too_late("while the upstream was working")
                verdict = OWN_DEADLINE
            else:
                error = LMTimeoutError(
                    f"no answer within timeout={route.timeout:g} s", model=route.model, provider=route.upstream.provider
                )
                verdict = judge(error)
        else:
            verdict = judge(error)
        if permit is None and not isinstance(raised, AttemptTimeoutError):
            verdict = verdict._replace(sent=False, owed=False)
        if permit is not None:
            breaker = route.state.breaker
            assert breaker is not None
            if verdict.failure:
                breaker.failure(permit, latency, _cause(error), getattr(error, "retry_after", None))
            else:
                breaker.release(permit)
        if verdict.throttled:
            self._throttled(route, error)
        if late is not None:
            late.on_end(lambda response, failure: self._settle_late(plan, ticket, number, latency, verdict, response, failure))
        else:
            self._settle_failure(plan, ticket, number, latency, verdict, error)
        return error, verdict

    def hit(self, entry: Entry, outcome: str = "cached") -> Response:
        """Record an answer from the cache, and give it."""
        self.record_cached(outcome)
        return entry.response

    def record_cached(self, outcome: str) -> None:
        """Record that the cache answered."""
        pipeline = self.pipeline
        record = self._record(
            Plan(pipeline.primary, self.request, 0, None, (), ()), IDS.make(), 0, outcome, 0, False, EMPTY_USAGE,
            cached=True,
        )  # fmt: skip
        pipeline.store.append(record)
        self._remember(record)

    def emit(self, name: str, **data: Any) -> None:
        """Tell the listeners."""
        pipeline = self.pipeline
        if pipeline.bus.active:
            context = self.context
            pipeline.bus.emit(
                name, pipeline.clock.time(), call_id=self.id, user=context.user, tenant=context.tenant, **data
            )

    # -- details -----------------------------------------------------------------------------------------------------
    def _settle_failure(
        self, plan: Plan, ticket: Ticket | None, number: int, latency: float, verdict: Verdict, error: BaseException
    ) -> None:
        cost: int | None = 0
        estimated = False
        if verdict.owed:
            cost = plan.bound if plan.accounts else self._bound_or_none(plan.route, plan.request)
            estimated = True
        elif not verdict.sent and not isinstance(error, Exception):
            cost = 0
        id = ticket.ask.id if ticket is not None else IDS.make()
        record = self._record(
            plan, id, number, verdict.outcome, cost, estimated, None, latency=latency, error=error
        )  # fmt: skip
        keep = record if (verdict.sent or verdict.outcome != "cancelled") and not isinstance(error, RejectedError) else None
        if keep is None and isinstance(error, DeadlineExceededError) and verdict.sent:
            keep = record
        self._settle(ticket, Settlement(id, cost, None if verdict.owed else 0, verdict.sent, estimated, keep), error)
        if keep is not None:
            self._remember(keep)
        if self.pipeline.bus.active:
            self.emit(
                "attempt_failed", model=plan.route.model, route=plan.route.name, attempt=number,
                outcome=verdict.outcome, error=_cause(error), latency=latency,
            )  # fmt: skip

    def _settle(self, ticket: Ticket | None, settlement: Settlement, error: BaseException) -> None:
        store = self.pipeline.store
        if ticket is not None:
            work = lambda: store.settle(ticket, settlement)  # noqa: E731
        elif settlement.record is not None:
            record = settlement.record
            work = lambda: store.append(record)  # noqa: E731
        else:
            return
        if isinstance(error, GeneratorExit):
            REAPER.post(work)  # perhaps inside the garbage collector
        else:
            work()

    def _settle_late(
        self,
        plan: Plan,
        ticket: Ticket | None,
        number: int,
        latency: float,
        verdict: Verdict,
        response: Any,
        failure: BaseException | None,
    ) -> None:
        """An abandoned attempt has ended in its worker: its usage is known after all, or it is not."""
        if isinstance(response, Response):
            rates = plan.route.rates()
            cost = plan.route.prices.price_response(rates, response, plan.request)
            if cost is not None or rates is None:
                id = ticket.ask.id if ticket is not None else IDS.make()
                record = self._record(plan, id, number, verdict.outcome, cost, False, response.usage, latency=latency)
                done = Settlement(id, cost, _used(response.usage), True, False, record)
                self._settle(ticket, done, RuntimeError())
                self._remember(record)
                return
        if failure is not None and isinstance(failure, Exception):
            late = judge(_public(failure, plan.route))
            verdict = verdict._replace(owed=late.owed, sent=late.sent)
        self._settle_failure(plan, ticket, number, latency, verdict, TimeoutError("ended late"))

    def _throttled(self, route: Route, error: BaseException) -> None:
        retry_after = getattr(error, "retry_after", None)
        if route.limit.adaptive:
            route.state.throttled = True
            self.pipeline.store.throttled(route.limit_key, route.limit, retry_after)
        self.emit("throttled", model=route.model, route=route.name, retry_after=retry_after)

    def _bound(self, route: Route, request: Request, bounds: tuple[int | None, int | None]) -> int:
        rates = route.rates()
        inputs, outputs = bounds
        problem = None
        if rates is None:
            problem = (
                f"no price is known for {route.model!r}; pass "
                f"prices={{{route.model!r}: dspy_prod.Price(input=..., output=...)}} (USD per million tokens)"
            )
        elif hosted_fees(request):
            problem = "the request uses a tool that the provider runs and bills apart; call it without a budget"
        elif inputs is None:
            problem = (
                "the request has media parts and the model's input limit is unknown; pass "
                f"prices={{{route.model!r}: dspy_prod.Price(..., max_input_tokens=...)}}"
            )
        elif outputs is None:
            problem = (
                "neither max_tokens nor the model's own output limit is known; pass max_tokens=... to the LM or "
                f"prices={{{route.model!r}: dspy_prod.Price(..., max_output_tokens=...)}}"
            )
        if problem is not None:
            raise UnpricedModelError(
                f"A budget applies, but this call's cost cannot be bounded: {problem}", model=route.model, route=route.name
            )
        assert rates is not None and inputs is not None and outputs is not None
        return route.most(request, inputs, outputs)

    def _bound_or_none(self, route: Route, request: Request) -> int | None:
        rates = route.rates()
        if rates is None:
            return None
        inputs, outputs = route.bounds(request)
        return None if inputs is None or outputs is None else route.most(request, inputs, outputs)

    def _check_fits(self, route: Route, request: Request) -> None:
        explicit, tpm = request.config.max_tokens, route.limit.tpm
        if explicit is not None and tpm is not None and explicit > tpm:
            raise RateLimitedError(
                f"max_tokens={explicit} is above tpm={tpm:g} of {route.model}; no minute could ever hold this call. "
                "Lower max_tokens or raise tpm",
                model=route.model,
                route=route.name,
                dimension="tokens",
            )

    def _record(
        self,
        plan: Plan,
        id: str,
        number: int,
        outcome: str,
        cost: int | None,
        estimated: bool,
        usage: Usage | None,
        *,
        latency: float = 0.0,
        cached: bool = False,
        error: BaseException | None = None,
    ) -> CallRecord:
        context = self.context
        route = plan.route
        accounts = plan.accounts
        if usage is None:
            inputs = outputs = cache_read = reasoning = None
        else:
            inputs, outputs = usage.input_tokens, usage.output_tokens
            cache_read, reasoning = usage.cache_read_tokens, usage.reasoning_tokens
        return CallRecord(
            id, self.id, self.pipeline.clock.time() - latency, route.model, route.name, number, outcome, cost, estimated,
            None if error is None else type(error).__name__,
            None if error is None else getattr(error, "status", None),
            inputs, outputs, cache_read, reasoning, cached, latency, self.waited,
            context.user, context.tenant, context.session, context.priority, context.program, context.experiment,
            context.variant, context.prompt_version, context.tags, context.trace_id,
            tuple([account.key for account in accounts]) if accounts else (),
        )  # fmt: skip

    def _remember(self, record: CallRecord) -> None:
        self.records.append(record)
        collected = self.context.records
        if collected is not None:
            collected.append(record)
        if self.pipeline.bus.active:
            self.emit(
                "call_finished" if record.outcome in ("ok", "cached", "stale") else "call_attempted",
                model=record.model, route=record.route, outcome=record.outcome, cost_usd=record.cost_usd,
                cached=record.cached, latency=record.latency, record_id=record.id,
            )  # fmt: skip


def _used(usage: Usage) -> int | None:
    inputs, outputs = usage.input_tokens, usage.output_tokens
    if inputs is None or outputs is None:
        return None
    return inputs + outputs


def _cause(error: BaseException) -> str:
    status = getattr(error, "status", None)
    name = type(error).__name__
    return f"{name} {status}" if status is not None else name


def _public(error: Exception, route: Route) -> BaseException:
    from dspy.clients.errors import wrap_error

    wrapped: BaseException = wrap_error(error, model=route.model, provider=route.upstream.provider)
    return wrapped


def _with_defaults(request: Request, defaults: dict[str, Any]) -> Request:
    """Fill generation settings that the call leaves open with the fallback LM's own."""
    missing = {name: value for name, value in defaults.items() if getattr(request.config, name, value) is None}
    return replace(request, config=replace(request.config, **missing)) if missing else request
