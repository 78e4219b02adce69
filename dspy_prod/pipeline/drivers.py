"""The drivers: they perform a flow's effects, for threads and for tasks, whole and streaming.

All I/O and all waiting of the library's call path is here. A driver adds no rule of its own.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import aclosing, closing, suppress
from math import inf
from typing import Any

from dspy.clients.engines.lm15_engine import AsyncLM15Engine
from dspy.clients.engines.stream_guard import achecked_stream, checked_stream
from dspy.lm15 import Response

from dspy_prod.compat.foreign import running_loop
from dspy_prod.compat.lm15 import StreamEvent
from dspy_prod.pipeline.answer import Answer
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Send
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
from dspy_prod.pipeline.upstream.headers import forget_refusal
from dspy_prod.pipeline.upstream.replay import replay
from dspy_prod.pipeline.upstream.workers import Job, Threaded


# -- whole answers ---------------------------------------------------------------------------------------------------
def run(steps: Flow) -> Response:
    """Perform a flow on this thread."""
    try:
        effect = next(steps)
        while True:
            try:
                result = _send(effect) if isinstance(effect, Send) else prepare(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response: Response = stop.value
        return response
    except BaseException:
        steps.close()  # Ctrl-C between the two would leave it where it is as long as somebody has the error
        raise


async def arun(steps: Flow) -> Response:
    """Perform a flow in this task."""
    try:
        effect = next(steps)
        while True:
            try:
                result = await _asend(effect) if isinstance(effect, Send) else await aprepare(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response: Response = stop.value
        return response
    except BaseException:
        steps.close()  # as in `run`
        raise


# -- streams ---------------------------------------------------------------------------------------------------------
def run_stream(steps: Flow, call: Call) -> Generator[StreamEvent, None, None]:
    """Perform a flow on this thread and yield the answer's events."""
    answer: Answer | None = None
    try:
        effect = next(steps)
        while True:
            try:
                if isinstance(effect, Send):
                    answer = Answer(effect, call)
                    yield from _events(effect, answer)
                    result = answer.response
                else:
                    result = prepare(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response = stop.value
    except BaseException:
        steps.close()  # as in `run`
        raise
    yield from _ending(answer, response)


async def arun_stream(steps: Flow, call: Call) -> AsyncGenerator[StreamEvent, None]:
    """Perform a flow in this task and yield the answer's events."""
    answer: Answer | None = None
    try:
        effect = next(steps)
        while True:
            try:
                if isinstance(effect, Send):
                    answer = Answer(effect, call)
                    async with aclosing(_aevents(effect, answer)) as events:
                        async for event in events:
                            yield event
                    result = answer.response
                else:
                    result = await aprepare(effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        response = stop.value
    except BaseException:
        steps.close()  # as in `run`
        raise
    for event in _ending(answer, response):
        yield event


# -- effects ---------------------------------------------------------------------------------------------------------
def _send(effect: Send) -> Response:
    request, until = effect.request, effect.until
    outside = sys.exc_info()[1]
    try:
        engine, native = effect.route.upstream.sync_engine(request, effect.beside, until)
        if native:  # its transport ends in time by itself, and tells when the request goes out
            ends, leaves = ATTEMPT_UNTIL.set(until), LEAVING.set(effect.goes)
            try:
                return _checked(engine.complete(request))
            finally:
                ATTEMPT_UNTIL.reset(ends)
                LEAVING.reset(leaves)
        if until == inf:
            _hand_over(effect, engine)
            return _checked(engine.complete(request))

        def complete() -> Response:
            _hand_over(effect, engine)
            return engine.complete(request)

        effect.late = job = Job[Response]()
        return _checked(bounded(complete, until, job))
    except Exception as error:
        raise public_error(error, effect.route.upstream, effect.until, outside) from error


async def _asend(effect: Send) -> Response:
    request, until = effect.request, effect.until
    outside = sys.exc_info()[1]
    limit: Any = None
    try:
        engine = effect.route.upstream.async_engine(request, effect.beside, until)
        if isinstance(engine, Threaded):
            effect.late, engine.begins = engine.job, effect.goes
        elif not isinstance(engine, AsyncLM15Engine):
            _hand_over(effect, engine)
        leaves = LEAVING.set(effect.goes)
        try:
            if until == inf:
                return _checked(await engine.complete(request))
            async with limit_until(until) as limit:
                return _checked(await engine.complete(request))
        finally:
            with suppress(ValueError):  # a call that was never finished is collected in somebody else's context
                LEAVING.reset(leaves)
    except (TimeoutError, asyncio.TimeoutError) as error:
        if limit is not None and _expired(limit):
            forget_refusal()
            raise AttemptTimeoutError from None
        raise public_error(error, effect.route.upstream, effect.until, outside) from error
    except asyncio.CancelledError:
        forget_refusal()
        raise
    except Exception as error:
        if running_loop() is None:  # collected: what fails while a coroutine is closed that no loop runs says nothing
            raise GeneratorExit from None
        raise public_error(error, effect.route.upstream, effect.until, outside) from error


def _events(effect: Send, answer: Answer) -> Generator[StreamEvent, None, None]:
    """Yield a stream's events but the last one, which waits in the answer until it is settled."""
    route, until = effect.route, effect.until
    try:
        engine, native = route.upstream.sync_engine(effect.request, effect.beside, until)
        if native:  # its transport ends in time by itself
            source = within(engine.stream(effect.request), until, effect.goes, route.timeout)
        elif until == inf and (route.timeout is None or isinstance(route.upstream.spec, str)):
            # Nothing to bound, or LiteLLM, which bounds its reads by `timeout` too.
            _hand_over(effect, engine)
            source = engine.stream(effect.request)
        else:

            def open_stream() -> Any:
                _hand_over(effect, engine)
                return engine.stream(effect.request)

            effect.late = job = Job[None]()
            drop = getattr(engine, "drop", None) if isinstance(route.upstream.spec, str) else None
            source = bounded_stream(open_stream, until, route.timeout, job, drop)
        with closing(checked_stream(source, provider=route.upstream.provider)) as events:
            for event in events:
                for shown in answer.take(event):
                    with answer:
                        yield shown
        answer.finish()
    except Exception as error:
        answer.broke(effect)
        if answer.left:  # what fails while a stream is closed that nobody listens to says nothing
            raise GeneratorExit from None
        raise public_error(error, route.upstream, until, answer.outside) from error


async def _aevents(effect: Send, answer: Answer) -> AsyncGenerator[StreamEvent, None]:
    """As `_events`."""
    route, until = effect.route, effect.until
    limit: Any = None
    limited = until
    try:
        engine = route.upstream.async_engine(effect.request, effect.beside, until)
        if not isinstance(engine, AsyncLM15Engine):
            _hand_over(effect, engine)
        source = engine.stream(effect.request)
        async with aclosing(achecked_stream(source, provider=route.upstream.provider)) as events:
            while True:
                if until != inf and time.monotonic() >= until:  # a loop that never waits is never cancelled
                    raise AttemptTimeoutError
                if route.timeout is not None:
                    limited = min(until, time.monotonic() + route.timeout)
                leaves = LEAVING.set(effect.goes)
                try:
                    if limited == inf:
                        event = await anext(events)
                    else:
                        async with limit_until(limited) as limit:
                            event = await anext(events)
                except StopAsyncIteration:
                    break
                finally:
                    with suppress(ValueError):
                        LEAVING.reset(leaves)
                for shown in answer.take(event):
                    with answer:
                        yield shown
        answer.finish()
    except asyncio.CancelledError:
        forget_refusal()
        raise
    except Exception as error:
        answer.broke(effect)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and limit is not None and _expired(limit):
            forget_refusal()
            raise (AttemptTimeoutError if limited == until else StalledError) from None
        if (
            answer.left or running_loop() is None
        ):  # what fails while a stream is closed that nobody listens to says nothing
            raise GeneratorExit from None
        raise public_error(error, route.upstream, until, answer.outside) from error


def _ending(answer: Answer | None, response: Response) -> Iterable[StreamEvent]:
    """What a stream ends with: its last event, or the whole of an answer that came from the cache."""
    if answer is None or answer.end is None or answer.response is not response:
        return replay(response)
    return answer.unseen


# -- details ---------------------------------------------------------------------------------------------------------
def _hand_over(effect: Send, engine: Any) -> None:
    """Say that a request may go out from now on, but for what an engine of ours knows better."""
    if isinstance(effect.route.upstream.spec, str):
        effect.line = engine
    effect.goes()


def _expired(limit: Any) -> bool:
    expired = limit.expired
    return bool(expired() if callable(expired) else expired)


def _checked(response: Any) -> Response:
    if isinstance(response, Response):
        return response
    kind = type(response)
    raise TypeError(f"Engine.complete must return dspy.lm15.Response, got {kind.__module__}.{kind.__qualname__}")
