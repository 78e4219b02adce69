"""One LM call: what it asks, under which conditions, and what its attempts were.

The flow (`flow.py`) says in which order things happen; `plan.py` says what an attempt reserves, `settling.py` what it
cost, `refusals.py` how a refusal reads.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

from dspy.lm15 import Request, Response, Usage

from dspy_prod.context.current import CallContext
from dspy_prod.policies.entries import EMPTY_USAGE, Entry
from dspy_prod.policies.fate import Fate
from dspy_prod.policies.purse import Purse
from dspy_prod.records import ANSWERED, CallRecord
from dspy_prod.runtime.clock import moment_on
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.base import Kind

if TYPE_CHECKING:
    from dspy_prod.pipeline.effects import Steps
    from dspy_prod.pipeline.pipeline import Pipeline
    from dspy_prod.pipeline.routes import Route
    from dspy_prod.pipeline.upstream.ordinary import Beside
    from dspy_prod.policies.answers import AnswerLog

_log = logging.getLogger("dspy_prod")
_new_record = tuple.__new__
_ANY_REQUEST: Final[Any] = None  # a hit in memory never looks at the request


class Asker(Protocol):
    """A call, or one for the vectors of several texts."""

    @property
    def pipeline(self) -> Pipeline: ...

    @property
    def context(self) -> CallContext: ...

    @property
    def deadline(self) -> float: ...


class Leading(Protocol):
    """See `leading.Lead`."""

    def wait(self, call: Call) -> Steps: ...

    def end(self) -> None: ...


@dataclass(slots=True, eq=False)
class Call:
    """See the module's docstring.

    Attributes:
        alone: follows no identical call: it holds up the event loop on which that one's answer may depend.
        id: shared by the records of all attempts.
        key: the cache key, or None when the cache does not apply.
        missed: the cache was asked for `key` a moment ago, in vain.
        scope: what it says beside the canonical request, for LiteLLM.
        streaming: the answer is delivered event by event.
        deadline: time of the pipeline's monotonic clock by which the call must end, `inf` without one.
        visible: a stream event has reached the consumer, so nothing may be tried again.
        degraded: a budget past its soft threshold chose a cheaper model.
        list_nano: what its answer costs upstream, without a cache; None when that is not known.
        paused: seconds a stream lay in its consumer's hands.
        waited: seconds spent waiting for admission or for an identical call.
        records: what the attempts were.
        purse: what the public call behind it has spent; None where nothing caps single calls.
        to_pay: how many of that call's answers are still to be paid for, this one included.
        log: where the run keeps its answers, if it does. log_key: under what this one's. log_kept: it is written
            down, or on its way there.
        served: what the records of those who share its answer say of it: `cached` or `stale`.
        lead: its lead among processes, where it has one.
        fate: what made its outcome its own; None of most.
    """

    pipeline: Pipeline
    request: Request
    context: CallContext
    key: bytes | None
    scope: Beside
    streaming: bool
    records: list[CallRecord]
    missed: bool = False
    alone: bool = False
    visible: bool = False
    degraded: bool = False
    list_nano: int | None = None
    paused: float = 0.0
    waited: float = 0.0
    purse: Purse | None = None
    to_pay: int = 1
    log: AnswerLog | None = None
    log_key: bytes | None = None
    log_kept: bool = False
    served: str = "cached"
    lead: Leading | None = None
    fate: Fate | None = None
    deadline: float = field(init=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        deadline = self.context.deadline
        self.deadline = deadline if deadline == inf else moment_on(self.pipeline.clock, deadline)
        self.id = IDS.make()

    def routes(self) -> tuple[Route, ...]:
        """The routes to try in order; a budget past its soft threshold puts its cheaper model first."""
        pipeline = self.pipeline
        if pipeline.degradable:
            wall = pipeline.clock.time()
            for rule in pipeline.budgets:
                if self.context.aside and rule.personal:
                    continue
                model = rule.degraded(rule.account(self.context, pipeline.primary.model, wall).key)
                if model is not None and model != pipeline.primary.model:
                    self.degraded = True
                    self.own_fate().shaped_by(rule)
                    cheaper = pipeline.route_to(model)
                    return (cheaper, *[route for route in pipeline.fallbacks if route is not cheaper])
        return pipeline.routes

    def own_fate(self) -> Fate:
        """Where it is noted what made its outcome its own."""
        if self.fate is None:
            self.fate = Fate()
        return self.fate

    def attempt_until(self, route: Route, now: float) -> float:
        """Monotonic time at which an attempt that starts now must end; a stream may outlast `timeout`."""
        if route.timeout is None or self.streaming:
            return self.deadline
        return min(self.deadline, now + route.timeout)

    def late(self) -> bool:
        """Whether the call's own deadline has passed."""
        return self.deadline != inf and self.pipeline.clock.monotonic() >= self.deadline

    def hit(self, entry: Entry, outcome: str = "cached") -> Response:
        """Record an answer from the cache, and give it."""
        self.record_cached(entry.list_nano, outcome)
        return entry.response

    def record_cached(self, list_nano: int | None, outcome: str = "cached") -> None:
        """Record that another call's answer served this one, and what it would have cost."""
        self.list_nano = list_nano
        record_served(self.pipeline, self.context, self.id, self.records, self.request, list_nano, self.waited, outcome)

    def record(
        self,
        route: Route,
        id: str,
        number: int,
        outcome: str,
        cost: int | None,
        started_at: float,
        *,
        estimated: bool = False,
        usage: Usage = EMPTY_USAGE,
        latency: float = 0.0,
        cached: bool = False,
        error: BaseException | None = None,
        accounts: tuple[str, ...] = (),
    ) -> CallRecord:
        """The ledger's row for one attempt of this call."""
        return _row(
            self.context, self.id, self.waited, route, id, number, outcome, cost, started_at, estimated, usage, latency,
            cached, error, accounts,
        )  # fmt: skip

    def remember(self, record: CallRecord, route: Route, response: Response | None = None) -> None:
        """Keep the record with the call and with whoever collects, and tell the tap and the listeners."""
        _remember(self.pipeline, self.context, record, self.records, route, self.request, response)

    def emit(self, name: str, **data: Any) -> None:
        """Tell the listeners."""
        pipeline = self.pipeline
        if pipeline.bus.active:
            pipeline.bus.emit(name, pipeline.clock.time(), call_id=self.id, **self.context.told(), **data)

    def emit_content(self, request: Request, response: Response) -> None:
        """Tell the listeners that asked for it what was sent upstream and what came back. Never raises."""
        try:
            prompt, answer = _messages(request), _text(response.message.parts)
        except Exception:
            _log.exception("The prompt or answer of a call could not be rendered for listeners; the call goes on")
            return
        self.pipeline.bus.emit_content(
            "call_content", self.pipeline.clock.time(), call_id=self.id, **self.context.told(), model=request.model,
            prompt=prompt, answer=answer,
        )  # fmt: skip


def record_served(
    pipeline: Pipeline,
    context: CallContext,
    call_id: str,
    records: list[CallRecord],
    request: Request,
    saved: int | None,
    waited: float = 0.0,
    outcome: str = "cached",
) -> None:
    """Record that another call's answer served one of which nothing else is to be known."""
    route = pipeline.primary
    record = _row(
        context, call_id, waited, route, IDS.make(), 0, outcome, 0, pipeline.clock.time(), False, EMPTY_USAGE, 0.0,
        True, None, (), saved,
    )  # fmt: skip
    pipeline.store.append(record)
    _remember(pipeline, context, record, records, route, request, None)


def record_hit(pipeline: Pipeline, context: CallContext, records: list[CallRecord], saved: int | None) -> None:
    """`record_served` for an answer from memory; together with others of its kind, where nobody looks at it alone."""
    latest, kind = pipeline.kind
    if kind is None or (context is not latest and context != latest):
        kind = _kind(pipeline, context)
    if kind is not None and not pipeline.bus.hears_calls:
        if kind.served(pipeline.clock.time(), saved):
            records.append(kind.like)
            for meter in pipeline.bus.meters:
                meter((kind.like, saved, pipeline.primary.operation))
            return
        pipeline.kind = context, None
    record_served(pipeline, context, IDS.make(), records, _ANY_REQUEST, saved)


def _kind(pipeline: Pipeline, context: CallContext) -> Kind | None:
    """Where cached answers within a context are noted; None where each is looked at alone, and for the first one, which
    may be the only one.
    """
    if context.node is not None or context.records is not None:
        return None
    latest, kind = pipeline.kind
    if context is not latest and context != latest:
        pipeline.kind = context, None
        return None
    if kind is None:
        like = _row(
            context, "", 0.0, pipeline.primary, "", 0, "cached", 0, 0.0, False, EMPTY_USAGE, 0.0, True, None, ()
        )
        kind = pipeline.store.kind(like)
        pipeline.kind = context, kind
    return kind


def _row(
    context: CallContext,
    call_id: str,
    waited: float,
    route: Route,
    id: str,
    number: int,
    outcome: str,
    cost: int | None,
    started_at: float,
    estimated: bool,
    usage: Usage,
    latency: float,
    cached: bool,
    error: BaseException | None,
    accounts: tuple[str, ...],
    saved: int | None = None,
) -> CallRecord:
    (
        user, tenant, session, priority, _deadline, tags, _cache, _ttl, run, program, experiment, variant,
        prompt_version, trace_id, _records, _node, _guards, _sample, _assignments, _aside,
    ) = context  # fmt: skip
    # As a tuple: the generated constructor of a NamedTuple of 30 fields costs a microsecond.
    return _new_record(CallRecord, (
        id, call_id, started_at, route.model, route.name, number, outcome, cost, estimated,
        None if error is None else type(error).__name__,
        None if error is None else getattr(error, "status", None),
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.reasoning_tokens,
        cached, latency, waited, user, tenant, session, priority, program, experiment, variant,
        prompt_version, tags, trace_id, accounts, None, run, saved,
    ))  # fmt: skip


def _remember(
    pipeline: Pipeline,
    context: CallContext,
    record: CallRecord,
    records: list[CallRecord],
    route: Route,
    request: Request,
    response: Response | None,
) -> None:
    records.append(record)
    node, collected = context.node, context.records
    if node is not None:
        node.attempt(record, route, request, response)
    if collected is not None:
        collected.append(record)
    bus = pipeline.bus
    for meter in bus.meters:
        meter((record, record.saved_nano, route.operation))
    if bus.hears_calls:
        bus.emit(
            "call_finished" if record.outcome in ANSWERED else "attempt_failed",
            pipeline.clock.time(), call_id=record.call_id, **context.told(),
            model=record.model, route=record.route, attempt=record.attempt, outcome=record.outcome,
            cost_usd=record.cost_usd, estimated=record.estimated, cached=record.cached, latency=record.latency,
            error=record.error, status=record.status, record_id=record.id, input_tokens=record.input_tokens,
            output_tokens=record.output_tokens, cached_tokens=record.cached_tokens,
            reasoning_tokens=record.reasoning_tokens,
        )  # fmt: skip


def _messages(request: Request) -> list[dict[str, str]]:
    messages = [{"role": message.role, "text": _text(message.parts)} for message in request.messages]
    if request.system is None:
        return messages
    system = request.system if isinstance(request.system, str) else _text(request.system)
    return [{"role": "system", "text": system}, *messages]


def _text(parts: Any) -> str:
    """The text of a message; its other parts by their kind alone, such as `[image]`."""
    return "".join(part.text if part.type == "text" else f"[{part.type}]" for part in parts)
