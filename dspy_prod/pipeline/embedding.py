"""The vectors of many texts, above the one flow: what is cached, what others ask already, and batches of the rest.

    look: cache, a text at a time
      └ join: texts that another call is asking about are waited for, the others are led
          └ batches of those, each through the flow of a call (`flow.py`): routes, retries, breaker, limiter, budgets

As `flow.py`, it is a generator that the drivers perform. Who is handed the lead of a text sends it before it waits for
anything else: two calls that lead a text each would else wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dspy.utils.exceptions import LMError

from dspy_prod.errors import CircuitOpenError, RateLimitedError, RejectedError
from dspy_prod.pipeline.batching import EmbeddingRoute, batches, most_tokens
from dspy_prod.pipeline.call import record_served
from dspy_prod.pipeline.effects import Steps, Wait
from dspy_prod.pipeline.flow import flow
from dspy_prod.pipeline.outcome import judge
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.running import stoppable
from dspy_prod.pipeline.texts import Asked, sum_known
from dspy_prod.pipeline.upstream.vectors import Vectors, texts_asked
from dspy_prod.policies.singleflight import ANSWERED, FAILED, LEADS, LOOK, WAITING, Follower, home
from dspy_prod.policies.vectors import shares
from dspy_prod.runtime.clock import moment_on
from dspy_prod.runtime.ids import IDS
from dspy_prod.runtime.reaper import REAPER

Texts = dict[Hashable, str]
"""Texts to be asked about, by key."""


def embedding(asked: Asked) -> Steps:
    """Find the vectors that `look` did not."""
    led: Texts = {key: text for key, text in zip(asked.keys, asked.texts, strict=True) if key not in asked.rows}
    if not led:
        return
    _check_caps(asked, led)
    followers: dict[Hashable, tuple[str, Follower]] = {}
    if asked.joins:
        led, followers = _join(asked, led)
    try:
        while led or followers:
            if led:
                leads, led = led, {}
                yield from _lead(asked, leads)
            if followers:
                led = yield from _follow(asked, followers)
    except BaseException as error:
        _leave(asked, led, followers, isinstance(error, GeneratorExit))
        raise


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


def _join(asked: Asked, texts: Texts) -> tuple[Texts, dict[Hashable, tuple[str, Follower]]]:
    """(the texts that this call leads, those that it follows)."""
    led: Texts = {}
    followers: dict[Hashable, tuple[str, Follower]] = {}
    flights, cache, own = asked.pipeline.flights, asked.cache, home()
    assert cache is not None
    try:
        for key, text in texts.items():
            follower = flights.join(key, own)
            if follower is not None:
                followers[key] = text, follower
                continue
            led[key] = text
            assert isinstance(key, bytes)
            entry = cache.peek(key)  # the previous flight may have landed since `look`
            row = getattr(entry, "row", None)
            if entry is not None and row is not None:
                asked.rows[key] = row
                flights.answer(key, (row, entry.list_nano))
                del led[key]  # last: who is interrupted before has ended nothing
    except BaseException:
        _leave(asked, led, followers, False)
        raise
    return led, followers


def _lead(asked: Asked, texts: Texts) -> Steps:
    """Ask for texts, a batch at a time; whoever follows one gets its vector or the upstream's error."""
    flights, own = asked.pipeline.flights, home()
    route = asked.pipeline.primary
    assert isinstance(route, EmbeddingRoute)
    keys, values = list(texts), list(texts.values())
    pending = dict.fromkeys(keys) if asked.joins else {}
    try:
        sizes = route.sizes(values)
        for places in batches(sizes, asked.size, most_tokens(asked.pipeline, asked.context)):
            batch = keys[places.start : places.stop]
            try:
                found = yield from _batch(asked, batch, values[places.start : places.stop])
            except RejectedError:
                raise  # our own refusal: whoever follows decides for himself
            except LMError as error:
                for key in batch:
                    if key in pending:
                        flights.fail(key, error)
                        del pending[key]
                raise
            for key, row, cost in found:
                asked.rows[key] = row
                if key in pending:
                    flights.answer(key, (row, cost))
                    del pending[key]
    except GeneratorExit:
        left, pending = pending, {}

        def pass_on() -> None:
            for key in left:
                flights.hand_over(key, own)

        REAPER.post(pass_on)  # perhaps inside the garbage collector
        raise
    finally:
        for key in pending:
            flights.hand_over(key, own)


def _batch(asked: Asked, keys: list[Hashable], texts: list[str]) -> Steps:
    """(key, vector, cost) of the texts of one batch, asked upstream; stale ones where that fails and all are kept."""
    call = asked.call(texts)
    try:
        response = yield from flow(call)
    except LMError as error:
        stale = _stale(asked, keys, error)
        if stale is None:
            raise
        record_served(
            asked.pipeline, asked.context, call.id, asked.records, call.request,
            sum_known([cost for *_, cost in stale]), call.waited, "stale",
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


def _follow(asked: Asked, followers: dict[Hashable, tuple[str, Follower]]) -> Steps:
    """Wait for texts that others ask about, until all are answered or some are passed on to this call: those."""
    pipeline, context = asked.pipeline, asked.context
    monotonic = pipeline.clock.monotonic
    began = monotonic()
    deadline = moment_on(pipeline.clock, context.deadline)
    costs: list[int | None] = []
    while followers:
        passed: Texts = {}
        for key, (text, follower) in list(followers.items()):
            if follower.state == WAITING:
                continue
            if follower.state == LEADS:  # stays among the followers until it is led: should this fail, they are left
                passed[key] = text
                continue
            del followers[key]
            if follower.state == ANSWERED:
                asked.rows[key], cost = follower.value
                costs.append(cost)
            elif follower.state == FAILED:
                assert follower.error is not None
                raise follower.error
        if passed or not followers:
            break
        if monotonic() >= deadline:
            raise too_late(asked.call([text for text, _ in followers.values()]), "while waiting for an identical call")
        yield from _wait(asked, followers, min(deadline, monotonic() + LOOK))
        for key in followers:
            pipeline.flights.look_after(key)
    if costs:
        waited = monotonic() - began
        record_served(pipeline, context, IDS.make(), asked.records, _NO_REQUEST, sum_known(costs), waited)
    for key in passed:
        del followers[key]
    return passed


_NO_REQUEST: Final[Any] = None  # nothing looks at what a kept answer was asked


def _wait(asked: Asked, followers: Mapping[Hashable, tuple[str, Follower]], until: float) -> Steps:
    def waiting() -> Steps:
        yield Wait(_Any([follower for _, follower in followers.values()]), until)

    if not asked.context.guards:
        yield from waiting()
        return
    texts = [text for text, _ in followers.values()]
    yield from stoppable(waiting(), asked.latest or asked.call(texts))


@dataclass(slots=True, eq=False)
class _Any:
    """Decided when one of several followers is."""

    followers: list[Follower]

    def attach(self, wake: Callable[[], None]) -> bool:
        return all(follower.attach(wake) for follower in self.followers)


def _leave(asked: Asked, led: Texts, followers: Mapping[Hashable, tuple[str, Follower]], collected: bool) -> None:
    """Follow nobody any more, and pass on what was passed to this call."""
    flights = asked.pipeline.flights

    def leave() -> None:
        for key in led:
            flights.hand_over(key)
        for key, (_, follower) in followers.items():
            if not flights.leave(key, follower) and follower.state == LEADS:
                flights.hand_over(key, follower.home)

    if collected:  # perhaps inside the garbage collector
        REAPER.post(leave)
    else:
        leave()
