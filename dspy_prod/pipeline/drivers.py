"""The drivers: they perform a flow's effects, for threads and for tasks, whole and streaming.

All I/O and all waiting of the library's call path is here. A driver adds no rule of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from math import inf
from typing import Any

from dspy._vendor.lm15.result import StreamAccumulator
from dspy._vendor.lm15.types import StreamEvent
from dspy.clients.engines.stream_guard import achecked_stream, checked_stream
from dspy.lm15 import Response

from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.deadline import ATTEMPT_UNTIL, StalledError, bounded, bounded_stream, within
from dspy_prod.pipeline.effects import Attempt, AttemptTimeoutError, Wait
from dspy_prod.pipeline.flow import Flow
from dspy_prod.pipeline.public_errors import public_error
from dspy_prod.pipeline.replay import replay

if sys.version_info >= (3, 11):
    from asyncio import timeout_at
else:
    from async_timeout import timeout_at


# -- whole answers ---------------------------------------------------------------------------------------------------
def run(steps: Flow) -> Response:
    """Perform a flow on this thread."""
    try:
        effect = next(steps)
        while True:
            try:
                result = _attempt(effect) if isinstance(effect, Attempt) else _wait(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response: Response = stop.value
        return response


async def arun(steps: Flow) -> Response:
    """Perform a flow in this task."""
    try:
        effect = next(steps)
        while True:
            try:
                result = await _aattempt(effect) if isinstance(effect, Attempt) else await _await(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response: Response = stop.value
        return response


# -- streams ---------------------------------------------------------------------------------------------------------
def run_stream(steps: Flow, call: Call) -> Generator[StreamEvent, None, None]:
    """Perform a flow on this thread and yield the answer's events."""
    end: StreamEvent | None = None
    try:
        effect = next(steps)
        while True:
            try:
                if isinstance(effect, Attempt):
                    result, end = yield from _events(effect, call)
                else:
                    result = _wait(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response = stop.value
    if end is not None:
        yield end
    else:
        yield from replay(response)  # the cache answered


async def arun_stream(steps: Flow, call: Call) -> AsyncGenerator[StreamEvent, None]:
    """Perform a flow in this task and yield the answer's events."""
    ended: list[Any] = []
    try:
        effect = next(steps)
        while True:
            try:
                if isinstance(effect, Attempt):
                    result = None
                    async with aclosing(_aevents(effect, call, ended)) as events:
                        async for event in events:
                            yield event
                    result = ended[0]
                else:
                    result = await _await(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response = stop.value
    if ended:
        yield ended[1]
        return
    for event in replay(response):
        yield event


# -- effects ---------------------------------------------------------------------------------------------------------
def _wait(effect: Wait) -> Any:
    left = inf if effect.until == inf else effect.until - time.monotonic()
    if effect.what is None:
        time.sleep(max(0.0, left))
        return
    decided = threading.Event()
    if effect.what.attach(decided.set):
        decided.wait(None if left == inf else max(0.0, left))


async def _await(effect: Wait) -> Any:
    left = inf if effect.until == inf else max(0.0, effect.until - time.monotonic())
    if effect.what is None:
        await asyncio.sleep(left)
        return
    loop = asyncio.get_running_loop()
    decided: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not decided.done():
            decided.set_result(None)

    def wake() -> None:
        loop.call_soon_threadsafe(finish)

    if not effect.what.attach(wake):
        return
    timer = None if left == inf else loop.call_later(left, finish)
    try:
        await decided
    finally:
        if timer is not None:
            timer.cancel()


def _attempt(effect: Attempt) -> Response:
    route, until = effect.route, effect.until
    try:
        engine, bounds_itself = route.upstream.sync_engine(effect.request, effect.extras, until)
        if until == inf:
            return _checked(engine.complete(effect.request))
        if not bounds_itself:
            return _checked(bounded(lambda: engine.complete(effect.request), until))
        token = ATTEMPT_UNTIL.set(until)
        try:
            return _checked(engine.complete(effect.request))
        finally:
            ATTEMPT_UNTIL.reset(token)
    except Exception as error:
        raise public_error(error, effect) from error


async def _aattempt(effect: Attempt) -> Response:
    route, until = effect.route, effect.until
    limit: Any = None
    try:
        engine = route.upstream.async_engine(effect.request, effect.extras, until)
        if until == inf:
            return _checked(await engine.complete(effect.request))
        async with _limit(until) as limit:
            return _checked(await engine.complete(effect.request))
    except (TimeoutError, asyncio.TimeoutError) as error:
        if limit is not None and _expired(limit):
            raise AttemptTimeoutError from None
        raise public_error(error, effect) from error
    except Exception as error:
        raise public_error(error, effect) from error


def _events(effect: Attempt, call: Call) -> Generator[StreamEvent, None, tuple[Response, StreamEvent | None]]:
    """Yield a stream's events, the start held back until the first delta; return (response, end event)."""
    route, until = effect.route, effect.until
    accumulator = StreamAccumulator(effect.request)
    start: StreamEvent | None = None
    end: StreamEvent | None = None
    consumer = _Consumer(call)
    try:
        engine, bounds_itself = route.upstream.sync_engine(effect.request, effect.extras, until)
        if bounds_itself:  # and its reads are bounded by `timeout`
            source = engine.stream(effect.request) if until == inf else within(engine.stream(effect.request), until)
        elif until == inf and (route.timeout is None or isinstance(route.upstream.spec, str)):
            # Nothing to bound, or LiteLLM, which bounds its reads by `timeout` too.
            source = engine.stream(effect.request)
        else:
            source = bounded_stream(lambda: engine.stream(effect.request), until, route.timeout)
        with closing(checked_stream(source, provider=route.upstream.provider)) as events:
            for event in events:
                accumulator.push(event)
                if event.type == "start":
                    start = event
                    continue
                if event.type == "end":
                    end = event
                    continue
                call.visible = True
                with consumer:
                    if start is not None:
                        yield start
                        start = None
                    yield event
        response = accumulator.response()
    except Exception as error:
        if consumer.left:  # what fails while a stream is closed that nobody listens to says nothing
            raise GeneratorExit from None
        raise public_error(error, effect) from error
    if start is not None:
        with consumer:
            yield start
    return response, end


async def _aevents(effect: Attempt, call: Call, ended: list[Any]) -> AsyncGenerator[StreamEvent, None]:
    """As `_events`; puts (response, end event) into `ended`."""
    ended.clear()
    route, until = effect.route, effect.until
    accumulator = StreamAccumulator(effect.request)
    start: StreamEvent | None = None
    end: StreamEvent | None = None
    limit: Any = None
    limited = until
    consumer = _Consumer(call)
    try:
        source = route.upstream.async_engine(effect.request, effect.extras, until).stream(effect.request)
        async with aclosing(achecked_stream(source, provider=route.upstream.provider)) as events:
            while True:
                if route.timeout is not None:
                    limited = min(until, time.monotonic() + route.timeout)
                try:
                    if limited == inf:
                        event = await anext(events)
                    else:
                        async with _limit(limited) as limit:
                            event = await anext(events)
                except StopAsyncIteration:
                    break
                accumulator.push(event)
                if event.type == "start":
                    start = event
                    continue
                if event.type == "end":
                    end = event
                    continue
                call.visible = True
                with consumer:
                    if start is not None:
                        yield start
                        start = None
                    yield event
        response = accumulator.response()
    except Exception as error:
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and limit is not None and _expired(limit):
            raise (AttemptTimeoutError if limited == until else StalledError) from None
        if consumer.left:  # what fails while a stream is closed that nobody listens to says nothing
            raise GeneratorExit from None
        raise public_error(error, effect) from error
    if start is not None:
        with consumer:
            yield start
    ended.extend((response, end))


class _Consumer:
    """The hands a stream's events are given into: how long they keep it, and whether they let it fall."""

    __slots__ = ("_call", "_since", "left")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._since = 0.0
        self.left = False

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._call.paused += time.monotonic() - self._since
        self.left = kind is GeneratorExit


# -- details ---------------------------------------------------------------------------------------------------------
def _limit(until: float) -> Any:
    return timeout_at(asyncio.get_running_loop().time() + (until - time.monotonic()))


def _expired(limit: Any) -> bool:
    expired = limit.expired
    return bool(expired() if callable(expired) else expired)


def _checked(response: Any) -> Response:
    if isinstance(response, Response):
        return response
    kind = type(response)
    raise TypeError(f"Engine.complete must return dspy.lm15.Response, got {kind.__module__}.{kind.__qualname__}")
