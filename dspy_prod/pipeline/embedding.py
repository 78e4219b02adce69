"""The vectors of many texts, above the one flow: what is cached, what others ask already, and batches of the rest.

    look: cache, a text at a time
      └ join: texts that another call is asking about are waited for, the others are led
          └ batches of those, each through the flow of a call (`flow.py`): routes, retries, breaker, limiter, budgets

As `flow.py`, it is a generator that the drivers perform. Who is handed the lead of a text sends it before it waits for
anything else: two calls that lead a text each would else wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

from dspy.utils.exceptions import LMError

from dspy_prod.errors import CircuitOpenError, RateLimitedError, RejectedError
from dspy_prod.pipeline.batching import EmbeddingRoute, batches, most_tokens
from dspy_prod.pipeline.call import Call, record_hit, record_served
from dspy_prod.pipeline.cut_off import if_cut_off
from dspy_prod.pipeline.effects import Steps, Wait
from dspy_prod.pipeline.flow import flow
from dspy_prod.pipeline.leading import shared_by
from dspy_prod.pipeline.outcome import is_of_the_request, judge
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.running import stoppable
from dspy_prod.pipeline.texts import Asked, sum_known
from dspy_prod.pipeline.upstream.vectors import Vectors, texts_asked
from dspy_prod.policies.singleflight import ANSWERED, FAILED, LEADS, LOOK, WAITING, Follower, home
from dspy_prod.policies.vectors import KeptVector, shares
from dspy_prod.runtime.ids import IDS

Texts = dict[Hashable, str]
"""Texts to be asked about, by key."""

Callers = dict[Hashable, Follower]
"""This call, as it leads or follows each text, by key; made before it joins, and kept until that has ended."""


def embedding(asked: Asked) -> Steps:
    """Find the vectors that `look` did not."""
    led: Texts = {key: text for key, text in zip(asked.keys, asked.texts, strict=True) if key not in asked.rows}
    if not led:
        return
    _check_caps(asked, led)
    flights = asked.pipeline.flights
    callers: Callers = {}

    def leave() -> None:
        for key, caller in callers.copy().items():
            flights.hand_over(asked.flight(key), caller)

    yield from if_cut_off(_all(asked, led, callers), leave)


def _all(asked: Asked, led: Texts, callers: Callers) -> Steps:
    followed: Texts = {}
    if asked.joins:
        led, followed = _join(asked, led, callers)
    while led or followed:
        if led:
            leads, led = led, {}
            yield from _lead(asked, leads, callers)
        if followed:
            led = yield from _follow(asked, followed, callers)


def _check_caps(asked: Asked, texts: Texts) -> None:
    """Refuse at once what a cap on single calls does not cover: no batch is paid for nothing."""
    pipeline, route = asked.pipeline, asked.pipeline.primary
    if not pipeline.caps:
        return
    assert isinstance(route, EmbeddingRoute)
    request = texts_asked(route.model, list(texts.values()))
    bound = route.most(request, *route.bounds(request))
    if bound is not None:  # else the first batch is refused for that
        for cap in pipeline.caps:
            asked.purse.check(cap, bound, 1, model=route.model, route=route.name)


def _join(asked: Asked, texts: Texts, callers: Callers) -> tuple[Texts, Texts]:
    """(the texts that this call leads, those that it follows)."""
    led: Texts = {}
    followed: Texts = {}
    flights, own = asked.pipeline.flights, home()
    for key, text in texts.items():
        callers[key] = caller = Follower(own, asked)
        (led if flights.join(asked.flight(key), caller) is None else followed)[key] = text
    return led, followed


def _drop_landed(asked: Asked, texts: Texts, callers: Callers) -> None:
    """Take what came into the cache since `look`, or while this call followed: nobody asks for it again."""
    cache, flights = asked.cache, asked.pipeline.flights
    costs: list[int | None] = []
    for key in [key for key in texts if key in callers]:
        assert cache is not None
        assert isinstance(key, bytes)
        entry = cache.peek(key)
        if isinstance(entry, KeptVector):
            cache.used(key)
            asked.rows[key] = entry.row
            costs.append(entry.list_nano)
            flights.answer(asked.flight(key), (entry.row, entry.list_nano, "cached"))
            del callers[key], texts[key]
    if costs:
        record_hit(asked.pipeline, asked.context, asked.records, sum_known(costs))


def _lead(asked: Asked, texts: Texts, callers: Callers) -> Steps:
    """Ask for texts, a batch at a time; whoever follows one gets its vector, or the upstream's error where that is
    about it.
    """
    _drop_landed(asked, texts, callers)
    flights = asked.pipeline.flights
    route = asked.pipeline.primary
    assert isinstance(route, EmbeddingRoute)
    keys, values = list(texts), list(texts.values())
    sizes = route.sizes(values)
    for places in batches(sizes, asked.size, most_tokens(asked.pipeline, asked.context)):
        batch = keys[places.start : places.stop]
        call = asked.call(values[places.start : places.stop])
        try:
            found = yield from _batch(asked, call, batch, values[places.start : places.stop])
        except RejectedError:
            raise  # our own refusal: whoever follows decides for himself
        except LMError as error:
            if len(batch) == 1 or not _of_the_batch(error):
                fits = shared_by(call)
                for key in [key for key in batch if key in callers]:
                    flights.fail(asked.flight(key), error, fits)
                    if fits is None:
                        del callers[key]
            raise
        # Every route has the same model, so a new vector is everybody's; but who has more time might have got one.
        fits = None if call.served != "stale" else shared_by(call)
        for key, row, cost in found:
            asked.rows[key] = row
            if key in callers:
                flights.answer(asked.flight(key), (row, cost, call.served), fits)
                if fits is not None:
                    flights.hand_over(asked.flight(key), callers[key])
                del callers[key]


def _of_the_batch(error: LMError) -> bool:
    """Whether it may be for one text that a batch failed, or for their number: each of them alone might be answered."""
    return is_of_the_request(error) or judge(error).outcome == "timeout"


def _batch(asked: Asked, call: Call, keys: list[Hashable], texts: list[str]) -> Steps:
    """(key, vector, cost) of the texts of one batch, asked upstream; stale ones where that fails and all are kept."""
    try:
        response = yield from flow(call)
    except LMError as error:
        stale = _stale(asked, keys, error)
        if stale is None:
            raise
        call.served = "stale"
        record_served(
            asked.pipeline, asked.context, call.id, asked.records, call.request,
            sum_known([cost for *_, cost in stale]), call.waited, call.served,
        )  # fmt: skip
        return stale
    assert isinstance(response, Vectors)
    costs = shares(call.list_nano, [1 + len(text.encode("utf-8", "surrogatepass")) for text in texts])
    if asked.cache is not None:
        for key, row, cost in zip(keys, response.rows, costs, strict=True):
            assert isinstance(key, bytes)
            asked.cache.keep(key, row, asked.context.ttl, cost)
    return list(zip(keys, response.rows, costs, strict=True))


def _stale(asked: Asked, keys: list[Hashable], error: LMError) -> list[tuple[Hashable, bytes, int | None]] | None:
    cache = asked.cache
    if cache is None or cache.options.stale_if_error <= 0 or asked.context.cache != "use":
        return None
    silent = isinstance(error, (CircuitOpenError, RateLimitedError))
    if not silent and (isinstance(error, RejectedError) or not judge(error).fallback):
        return None
    found: list[tuple[Hashable, bytes, int | None]] = []
    for key in keys:
        assert isinstance(key, bytes)
        entry = cache.stale_vector(key)
        if entry is None:
            return None
        found.append((key, entry.row, entry.list_nano))
    return found


def _follow(asked: Asked, followed: Texts, callers: Callers) -> Steps:
    """Wait for texts that others ask about, until all are answered or some are passed on to this call: those."""
    monotonic = asked.pipeline.clock.monotonic
    began = monotonic()
    costs: dict[str, list[int | None]] = {}
    try:
        passed: Texts = yield from _told(asked, followed, callers, costs)
    except Exception as error:
        _record(asked, costs, monotonic() - began)
        if isinstance(error, RejectedError):  # it is noted as that of the latest call
            asked.call(list(followed.values())).waited = monotonic() - began
        raise
    _record(asked, costs, monotonic() - began)
    for key in passed:
        del followed[key]
    return passed


def _told(asked: Asked, followed: Texts, callers: Callers, costs: dict[str, list[int | None]]) -> Steps:
    pipeline, deadline = asked.pipeline, asked.deadline
    monotonic = pipeline.clock.monotonic
    while followed:
        passed: Texts = {}
        error: BaseException | None = None
        for key, text in followed.copy().items():
            follower = callers[key]
            if follower.state == WAITING:
                continue
            if follower.state == LEADS:
                passed[key] = text
                continue
            del followed[key], callers[key]
            if follower.state == ANSWERED:
                asked.rows[key], cost, outcome = follower.value
                costs.setdefault(outcome, []).append(cost)
            elif follower.state == FAILED:
                error = follower.raised()
        if error is not None:
            raise error
        if passed or not followed:
            return passed
        if monotonic() >= deadline:
            raise too_late(asked.call(list(followed.values())), "while waiting for an identical call")
        yield from _wait(asked, followed, callers, min(deadline, monotonic() + LOOK))
        for key in followed:
            pipeline.flights.look_after(asked.flight(key))
    return {}


def _record(asked: Asked, costs: dict[str, list[int | None]], waited: float) -> None:
    """Record what others' answers served."""
    for outcome, each in costs.items():
        record_served(
            asked.pipeline, asked.context, IDS.make(), asked.records, _NO_REQUEST, sum_known(each), waited, outcome
        )


_NO_REQUEST: Final[Any] = None  # nothing looks at what a kept answer was asked


def _wait(asked: Asked, followed: Texts, callers: Callers, until: float) -> Steps:
    def waiting() -> Steps:
        yield Wait(_Any([callers[key] for key in followed]), until)

    if not asked.context.guards:
        yield from waiting()
        return
    yield from stoppable(waiting(), asked.latest or asked.call(list(followed.values())))


@dataclass(slots=True, eq=False)
class _Any:
    """Decided when one of several followers is."""

    followers: list[Follower]

    def attach(self, wake: Callable[[], None]) -> bool:
        return all(follower.attach(wake) for follower in self.followers)
