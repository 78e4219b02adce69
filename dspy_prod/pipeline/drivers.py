"""The drivers: they perform a flow's effects, for threads and for tasks, whole and streaming.

All I/O and all waiting of the library's call path is here. A driver adds no rule of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing, suppress
from math import inf
from typing import Any

from dspy.clients.engines.lm15_engine import AsyncLM15Engine
from dspy.clients.engines.stream_guard import achecked_stream, checked_stream
from dspy.lm15 import Response

from dspy_prod.compat.lm15 import StreamAccumulator, StreamEvent
from dspy_prod.compat.running import running_loop
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Attempt
from dspy_prod.pipeline.flow import Flow
from dspy_prod.pipeline.preparing import aprepare, limit_until, prepare
from dspy_prod.pipeline.upstream.deadline import (
    ATTEMPT_UNTIL,
    LEAVING,
    StalledError,
    bounded,
    bounded_stream,
    within,
)
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.pipeline.upstream.errors import public_error
from dspy_prod.pipeline.upstream.replay import replay


# -- whole answers ---------------------------------------------------------------------------------------------------
def run(steps: Flow) -> Response:
    """Perform a flow on this thread."""
    try:
        effect = next(steps)
        while True:
            try:
                result = _attempt(effect) if isinstance(effect, Attempt) else prepare(effect)
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
                result = await _aattempt(effect) if isinstance(effect, Attempt) else await aprepare(effect)
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
                    result = prepare(effect)
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
                    result = await aprepare(effect)
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
def _attempt(effect: Attempt) -> Response:
    request, until, leaving = effect.request, effect.until, effect.leaving
    try:
        engine, native = effect.route.upstream.sync_engine(request, effect.extras, until)
        if native:  # its transport ends in time by itself, and tells when the request goes out
            if until == inf and leaving is None:
                return _checked(engine.complete(request))
            ends, leaves = ATTEMPT_UNTIL.set(until), LEAVING.set(leaving)
            try:
                return _checked(engine.complete(request))
            finally:
                ATTEMPT_UNTIL.reset(ends)
                LEAVING.reset(leaves)
        if leaving is not None:
            leaving()
        if until == inf:
            return _checked(engine.complete(request))
        return _checked(bounded(lambda: engine.complete(request), until))
    except Exception as error:
        raise public_error(error, effect.route.upstream, effect.until) from error


async def _aattempt(effect: Attempt) -> Response:
    request, until, leaving = effect.request, effect.until, effect.leaving
    limit: Any = None
    try:
        engine = effect.route.upstream.async_engine(request, effect.extras, until)
        if leaving is not None and not isinstance(engine, AsyncLM15Engine):
            leaving()
            leaving = None
        if leaving is None:
            if until == inf:
                return _checked(await engine.complete(request))
            async with limit_until(until) as limit:
                return _checked(await engine.complete(request))
        leaves = LEAVING.set(leaving)
        try:
            async with limit_until(until) as limit:
                return _checked(await engine.complete(request))
        finally:
            with suppress(ValueError):  # a call that was never finished is collected in somebody else's context
                LEAVING.reset(leaves)
    except (TimeoutError, asyncio.TimeoutError) as error:
        if limit is not None and _expired(limit):
            raise AttemptTimeoutError from None
        raise public_error(error, effect.route.upstream, effect.until) from error
    except Exception as error:
        if running_loop() is None:  # collected: what fails while a coroutine is closed that no loop runs says nothing
            raise GeneratorExit from None
        raise public_error(error, effect.route.upstream, effect.until) from error


def _events(effect: Attempt, call: Call) -> Generator[StreamEvent, None, tuple[Response, StreamEvent | None]]:
    """Yield a stream's events, the start held back until the first delta; return (response, end event)."""
    route, until = effect.route, effect.until
    accumulator = StreamAccumulator(effect.request)
    start: StreamEvent | None = None
    end: StreamEvent | None = None
    consumer = _Consumer(call)
    try:
        engine, native = route.upstream.sync_engine(effect.request, effect.extras, until)
        if effect.leaving is not None:
            effect.leaving()
        if native:  # its transport ends in time by itself, and its reads are bounded by `timeout`
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
        raise public_error(error, effect.route.upstream, effect.until) from error
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
        engine = route.upstream.async_engine(effect.request, effect.extras, until)
        if effect.leaving is not None:
            effect.leaving()
        source = engine.stream(effect.request)
        async with aclosing(achecked_stream(source, provider=route.upstream.provider)) as events:
            while True:
                if route.timeout is not None:
                    limited = min(until, time.monotonic() + route.timeout)
                try:
                    if limited == inf:
                        event = await anext(events)
                    else:
                        async with limit_until(limited) as limit:
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
        if (
            consumer.left or running_loop() is None
        ):  # what fails while a stream is closed that nobody listens to says nothing
            raise GeneratorExit from None
        raise public_error(error, effect.route.upstream, effect.until) from error
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
def _expired(limit: Any) -> bool:
    expired = limit.expired
    return bool(expired() if callable(expired) else expired)


def _checked(response: Any) -> Response:
    if isinstance(response, Response):
        return response
    kind = type(response)
    raise TypeError(f"Engine.complete must return dspy.lm15.Response, got {kind.__module__}.{kind.__qualname__}")
