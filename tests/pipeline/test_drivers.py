"""The drivers perform whatever a flow asks for, and tell it what comes of it; here flows of a few lines ask."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from dspy.lm15 import Message, Request, Response, response_to_events
from dspy.utils.exceptions import LMServerError, LMUnexpectedError

from dspy_prod.pipeline import answer as answers
from dspy_prod.pipeline.drivers import arun, arun_stream, run, run_stream
from dspy_prod.pipeline.effects import Send, Wait, Warm, replacing
from dspy_prod.pipeline.preparing import limit_until
from dspy_prod.pipeline.upstream.deadline import StalledError
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.pipeline.upstream.headers import note_refusal, refusal_of
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import ScriptedEngine
from tests.interrupts import interrupted
from tests.pipeline.support import answer

REQUEST = Request(model="openai/m", messages=(Message.user("hi"),))
OK = answer(text="one two")
SOON = 0.05
BOTH = pytest.mark.parametrize("way", ["sync", "async"])


class Call:
    """What drivers touch of a call."""

    visible = False
    paused = 0.0


def route_to(engine: Any, timeout: float | None = None) -> Any:
    """A route to an engine object, which has an asynchronous form of its own."""
    upstream = Upstream("openai/m", "chat", engine, engine.asynchronous, {}, {})
    return SimpleNamespace(upstream=upstream, timeout=timeout)


def send(route: Any, until: float = inf, leaving: Callable[[], None] | None = None) -> Send:
    return Send(route, REQUEST, None, until, leaving)


def perform(steps: Generator[Any, Any, Response], way: str) -> Response:
    if way == "sync":
        return run(steps)
    return asyncio.run(arun(steps))


def shown(steps: Generator[Any, Any, Response], call: Any, way: str) -> list[Any]:
    """All events of a stream."""
    if way == "sync":
        return list(run_stream(steps, call))

    async def collect() -> list[Any]:
        return [event async for event in arun_stream(steps, call)]

    return asyncio.run(collect())


def types(events: list[Any]) -> list[str]:
    return [event.type for event in events]


# -- whole answers ---------------------------------------------------------------------------------------------------
@BOTH
def test_a_flow_gets_the_answer_it_asked_for(way: str) -> None:
    """And what it returns is the driver's answer."""
    engine = ScriptedEngine(OK)
    got = []

    def steps() -> Generator[Any, Any, Response]:
        got.append((yield send(route_to(engine))))
        return answer(text="what the flow made of it")

    assert perform(steps(), way).message.parts[0].text == "what the flow made of it"
    assert (got, engine.requests) == ([OK], [REQUEST])


@BOTH
@pytest.mark.parametrize("until", [inf, 1e9])
def test_an_upstreams_error_is_thrown_into_the_flow(way: str, until: float) -> None:
    """Which may ask for something else then, and answer after all."""
    engine = ScriptedEngine([LMServerError("down", status=500), OK])
    route = route_to(engine)
    seen = []

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route, until)
        except LMServerError as error:
            seen.append((str(error), error.status))
        response: Response = yield send(route, until)
        return response

    assert perform(steps(), way) is OK
    assert len(seen) == 1
    assert seen[0][1] == 500


@BOTH
def test_what_a_flow_raises_is_raised(way: str) -> None:
    """An error it lets pass, or one of its own."""

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route_to(ScriptedEngine(LMServerError("down"))))
        except LMServerError as error:
            raise KeyError("the flow's own") from error
        raise AssertionError

    with pytest.raises(KeyError, match="the flow's own") as caught:
        perform(steps(), way)
    assert isinstance(caught.value.__cause__, LMServerError)


@BOTH
def test_an_engine_that_gives_no_response_is_named(way: str) -> None:
    """A wrong engine is a mistake that must be found, not an answer."""

    class Wrong(ScriptedEngine):
        def _answer(self, answer: Any, request: Request) -> Any:
            return {"text": "x"}

    def steps() -> Generator[Any, Any, Response]:
        response: Response = yield send(route_to(Wrong()))
        return response

    with pytest.raises(LMUnexpectedError, match=r"must return dspy.lm15.Response, got builtins.dict"):
        perform(steps(), way)


@BOTH
def test_an_attempt_tells_when_it_leaves(way: str) -> None:
    """Just before the engine has the request."""
    order: list[str] = []

    def engine(_: Request) -> Response:
        order.append("sent")
        return OK

    def steps() -> Generator[Any, Any, Response]:
        response: Response = yield send(route_to(ScriptedEngine(engine)), inf, lambda: order.append("leaves"))
        return response

    assert perform(steps(), way) is OK
    assert order == ["leaves", "sent"]


class Stuck:
    """An engine that answers when the test ends."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asynchronous = SimpleNamespace(complete=self._complete, stream=self._astream)

    def complete(self, request: Request) -> Response:
        assert self.over.wait(10)
        return OK

    def stream(self, request: Request) -> Iterator[Any]:
        yield from response_to_events(self.complete(request))

    async def _complete(self, request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def _astream(self, request: Request) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield None


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    engine = Stuck()
    yield engine
    engine.over.set()


@BOTH
def test_an_attempt_ends_at_its_time(way: str, stuck: Stuck) -> None:
    """A thread cannot be stopped: what goes on in it can be asked for later. A task is cancelled."""
    caught: list[AttemptTimeoutError] = []
    effect = send(route_to(stuck), time.monotonic() + SOON)

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield effect
        except AttemptTimeoutError as error:
            caught.append(error)
        return OK

    assert perform(steps(), way) is OK
    assert len(caught) == 1
    assert (effect.late is None) == (way == "async")
    if effect.late is not None:
        assert not effect.late.heard
        ended, told = threading.Event(), []
        effect.late.on_end(lambda *end: (told.append(end), ended.set()))  # type: ignore[arg-type, return-value]
        stuck.over.set()
        assert ended.wait(10)
        assert told == [(OK, None)]


# -- waiting and warming ---------------------------------------------------------------------------------------------
class Decision:
    """Something another thread decides, at once, soon or never."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.woken = 0

    def attach(self, wake: Callable[[], None]) -> bool:
        def twice() -> None:  # a decision may be told more than once
            for _ in range(2):
                self.woken += 1
                wake()

        if self.when == "soon":
            threading.Thread(target=twice).start()
        return self.when != "before"


@BOTH
@pytest.mark.parametrize(
    ("what", "until"), [("before", inf), ("soon", inf), ("never", SOON), ("never", -1.0), (None, SOON), (None, -1.0)]
)
def test_a_wait_ends_with_its_decision_or_its_time(way: str, what: str | None, until: float) -> None:
    """Whichever comes first; the flow looks for itself which it was."""
    decision = None if what is None else Decision(what)
    times = [time.monotonic() + until]

    def steps() -> Generator[Any, Any, Response]:
        assert (yield Wait(decision, times[0])) is None
        times.append(time.monotonic())
        return OK

    assert perform(steps(), way) is OK
    if what in (None, "never"):
        assert times[1] >= times[0] - 0.001
    elif what == "soon":
        assert decision is not None
        assert decision.woken


def test_a_decision_for_somebody_whose_loop_is_closed_raises_nothing() -> None:
    """It raised in the thread that decided, which then woke none of the others."""
    wakes: list[Callable[[], None]] = []

    class Never:
        def attach(self, wake: Callable[[], None]) -> bool:
            wakes.append(wake)
            return True

    def steps() -> Generator[Any, Any, Response]:
        yield Wait(Never(), time.monotonic() + 0.01)
        return OK

    assert perform(steps(), "async") is OK
    wakes[0]()


@BOTH
@pytest.mark.parametrize("until", [inf, 1e9])
def test_an_engine_is_warmed_on_demand(way: str, until: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow gets nothing for it; what went wrong is thrown in, in DSPy's words."""
    route = route_to(ScriptedEngine(OK))
    asked: list[Any] = []

    def warm(request: Request, extras: Any) -> None:
        asked.append((request, extras))
        if len(asked) == 2:
            raise ImportError("no such engine")

    monkeypatch.setattr(route.upstream, "warm", warm)

    def steps() -> Generator[Any, Any, Response]:
        assert (yield Warm(route, REQUEST, None, until)) is None
        with pytest.raises(Exception, match="no such engine"):
            yield Warm(route, REQUEST, None, until)
        return OK

    assert perform(steps(), way) is OK
    assert asked == [(REQUEST, None)] * 2


@BOTH
def test_warming_keeps_no_caller_longer_than_its_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import may take longer than a caller has; it goes on for the next one."""
    route = route_to(ScriptedEngine(OK))
    over, begun = threading.Event(), threading.Event()

    def warm(request: Request, extras: Any) -> None:
        begun.set()
        assert over.wait(10)

    monkeypatch.setattr(route.upstream, "warm", warm)

    def steps() -> Generator[Any, Any, Response]:
        assert (yield Warm(route, REQUEST, None, time.monotonic() + SOON)) is None
        assert begun.wait(10)
        over.set()
        return OK

    assert perform(steps(), way) is OK


# -- interruptions ---------------------------------------------------------------------------------------------------
def test_ctrl_c_reaches_the_flow() -> None:
    """It has money and permits to give back."""
    seen: list[BaseException] = []

    def interrupted(_: Request) -> Response:
        raise KeyboardInterrupt

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route_to(ScriptedEngine(interrupted)))
        except BaseException as error:
            seen.append(error)
            raise
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        run(steps())
    assert [type(error) for error in seen] == [KeyboardInterrupt]


@pytest.mark.parametrize("place", ["send", "wait", "pause"])
def test_a_cancelled_task_tells_its_flow(place: str, stuck: Stuck) -> None:
    """Wherever it stood: the flow settles, and the cancellation goes on."""
    seen: list[BaseException] = []

    def steps(effect: Any) -> Generator[Any, Any, Response]:
        try:
            yield effect
        except BaseException as error:
            seen.append(error)
            raise
        raise AssertionError

    async def scene() -> None:
        effect = {
            "send": lambda: send(route_to(stuck)),
            "wait": lambda: Wait(Decision("never"), inf),
            "pause": lambda: Wait(None, time.monotonic() + 1000),
        }[place]()
        task = asyncio.ensure_future(arun(steps(effect)))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert [type(error) for error in seen] == [asyncio.CancelledError]


def test_a_coroutine_that_is_dropped_closes_its_flow(stuck: Stuck) -> None:
    """Nobody awaits it any more: the flow is told as when a consumer leaves."""
    seen: list[BaseException] = []

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route_to(stuck))
        except BaseException as error:
            seen.append(error)
            raise
        raise AssertionError

    coroutine = arun(steps())

    async def begin() -> None:
        coroutine.send(None)

    asyncio.run(begin())
    coroutine.close()
    assert [type(error) for error in seen] == [GeneratorExit]


# -- streams ---------------------------------------------------------------------------------------------------------
@BOTH
def test_a_stream_ends_when_its_answer_is_settled(way: str) -> None:
    """The last event waits for the flow: who has seen it finds the call in the ledger."""
    order: list[str] = []
    call: Any = Call()

    def steps() -> Generator[Any, Any, Response]:
        response: Response = yield send(route_to(ScriptedEngine(OK)), inf, lambda: order.append("leaves"))
        order.append("settled")
        assert call.visible
        return response

    async def main() -> None:
        async for event in arun_stream(steps(), call):
            order.append(event.type)

    if way == "sync":
        for event in run_stream(steps(), call):
            order.append(event.type)
    else:
        asyncio.run(main())
    assert order == ["leaves", "start", "delta", "settled", "end"]


@BOTH
def test_a_stream_that_fails_before_its_first_delta_may_be_tried_again(way: str) -> None:
    """Its start was held back, so the consumer sees one answer."""
    call: Any = Call()
    (start, *rest) = list(response_to_events(OK))

    class Failing(ScriptedEngine):
        def stream(self, request: Request) -> Iterator[Any]:
            yield start
            self.complete(request)
            yield from rest

    class AsyncFailing:
        async def stream(self, request: Request) -> AsyncIterator[Any]:
            yield start
            engine.complete(request)
            for event in rest:
                yield event

    engine = Failing([LMServerError("down", status=500), OK])
    engine.asynchronous = AsyncFailing()  # type: ignore[assignment]

    def steps() -> Generator[Any, Any, Response]:
        with pytest.raises(LMServerError):
            yield send(route_to(engine))
        assert not call.visible
        response: Response = yield send(route_to(engine))
        return response

    assert types(shown(steps(), call, way)) == ["start", "delta", "end"]


@BOTH
@pytest.mark.parametrize("failed", [[], [0], [2]])
def test_an_answer_of_the_cache_is_replayed(way: str, failed: list[int]) -> None:
    """Even after an attempt failed, at its start or its end, when a stale answer stands in: whole, word by word."""
    call: Any = Call()
    told = [event for event in response_to_events(answer(text="")) if event.type != "delta"]

    class Failing(ScriptedEngine):
        def stream(self, request: Request) -> Iterator[Any]:
            yield from told[: failed[0]]
            raise LMServerError("down", status=500)

    class AsyncFailing:
        async def stream(self, request: Request) -> AsyncIterator[Any]:
            for event in told[: failed[0]]:
                yield event
            raise LMServerError("down", status=500)

    engine = Failing()
    engine.asynchronous = AsyncFailing()  # type: ignore[assignment]

    def steps() -> Generator[Any, Any, Response]:
        for _ in failed:
            with pytest.raises(LMServerError):
                yield send(route_to(engine))
        return OK

    events = shown(steps(), call, way)
    assert types(events) == ["start", "delta", "delta", "end"]
    assert [event.delta.text for event in events[1:3]] == ["one", " two"]


@BOTH
def test_an_empty_answer_has_a_start_and_an_end(way: str) -> None:
    """No delta came for which the start could wait."""
    call: Any = Call()
    (start, *_, end) = list(response_to_events(OK))

    class Silent(ScriptedEngine):
        def stream(self, request: Request) -> Iterator[Any]:
            yield from (start, end)

    class AsyncSilent:
        async def stream(self, request: Request) -> AsyncIterator[Any]:
            yield start
            yield end

    engine = Silent()
    engine.asynchronous = AsyncSilent()  # type: ignore[assignment]

    def steps() -> Generator[Any, Any, Response]:
        response: Response = yield send(route_to(engine))
        assert not call.visible
        return response

    assert types(shown(steps(), call, way)) == ["start", "end"]


@BOTH
def test_a_consumer_that_leaves_closes_the_flow(way: str) -> None:
    """The flow hears of it as `GeneratorExit`; what the closed stream says in its last breath is not an error."""
    seen: list[BaseException] = []
    call: Any = Call()

    class Complaining(ScriptedEngine):
        def stream(self, request: Request) -> Iterator[Any]:
            try:
                yield from response_to_events(OK)
            finally:
                raise RuntimeError("closed too early")

    class AsyncComplaining:
        async def stream(self, request: Request) -> AsyncIterator[Any]:
            try:
                for event in response_to_events(OK):
                    yield event
            finally:
                raise RuntimeError("closed too early")

    engine = Complaining()
    engine.asynchronous = AsyncComplaining()  # type: ignore[assignment]

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route_to(engine))
        except BaseException as error:
            seen.append(error)
            raise
        raise AssertionError

    async def main() -> None:
        stream = arun_stream(steps(), call)
        assert (await anext(stream)).type == "start"
        await stream.aclose()

    if way == "sync":
        with closing(run_stream(steps(), call)) as stream:
            assert next(stream).type == "start"
    else:
        asyncio.run(main())
    assert [type(error) for error in seen] == [GeneratorExit]


@BOTH
def test_the_time_in_the_consumers_hands_is_counted(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken off the upstream's time: a slow reader says nothing about it."""
    now = [100.0]
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    call: Any = Call()

    def engine(_: Request) -> Response:
        now[0] += 50.0
        return OK

    def steps() -> Generator[Any, Any, Response]:
        response: Response = yield send(route_to(ScriptedEngine(engine)))
        return response

    async def main() -> None:
        async for _ in arun_stream(steps(), call):
            now[0] += 3.0

    if way == "sync":
        for _ in run_stream(steps(), call):
            now[0] += 3.0
    else:
        asyncio.run(main())
    assert call.paused == 6.0, "a start and a delta; the end comes when all is settled"


@BOTH
@pytest.mark.parametrize(
    ("timeout", "until", "kind"),
    [(SOON, inf, StalledError), (None, SOON, AttemptTimeoutError), (9.0, SOON, AttemptTimeoutError)],
)
def test_a_stream_that_stands_still_is_ended(
    way: str, timeout: float | None, until: float, kind: type[Exception], stuck: Stuck
) -> None:
    """`timeout` bounds each pause, the call's own end the whole."""
    call: Any = Call()
    seen: list[BaseException] = []

    def steps() -> Generator[Any, Any, Response]:
        try:
            yield send(route_to(stuck, timeout), time.monotonic() + until)
        except AttemptTimeoutError as error:
            seen.append(error)
        return OK

    assert types(shown(steps(), call, way)) == ["start", "delta", "delta", "end"]
    assert [type(error) for error in seen] == [kind]


@pytest.mark.parametrize("left", ["late", "cancelled"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_the_headers_of_a_refusal_that_nobody_heard_are_forgotten(left: str, streaming: bool, stuck: Stuck) -> None:
    """The body of an error came too late, and the next error of the same task was told to wait as long as the first."""

    async def refused(request: Request) -> Response:
        note_refusal([("Retry-After", "60")])
        return await stuck._complete(request)

    async def refused_stream(request: Request) -> AsyncIterator[Any]:
        note_refusal([("Retry-After", "60")])
        async for event in stuck._astream(request):
            yield event

    stuck.asynchronous = SimpleNamespace(complete=refused, stream=refused_stream)

    def steps() -> Generator[Any, Any, Response]:
        yield send(route_to(stuck), time.monotonic() + SOON if left == "late" else inf)
        return OK

    async def call() -> Any:
        if streaming:
            return [event async for event in arun_stream(steps(), Call())]  # type: ignore[arg-type]
        return await arun(steps())

    async def scene() -> dict[str, str]:
        if left == "late":
            with pytest.raises(AttemptTimeoutError):
                await call()
        else:
            with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                async with limit_until(time.monotonic() + SOON):
                    await call()
        return refusal_of(ValueError("another"))[0]

    assert asyncio.run(scene()) == {}


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("replaced", [False, True], ids=["driven", "replaced"])
def test_ctrl_c_between_two_effects_ends_the_flow(way: str, streaming: bool, replaced: bool) -> None:
    """What it led and held stayed so for as long as somebody had the traceback: a notebook keeps that of the last."""
    kept = []

    def steps() -> Generator[Any, Any, Response]:
        yield Warm(route, REQUEST, None, inf)
        yield Wait(None, 0.0)
        response: Response = yield send(route)
        return response

    for point in itertools.count():
        route = route_to(ScriptedEngine(OK))
        asked = steps()
        flow = replacing(asked, lambda effect: None) if replaced else asked
        work = partial(shown, flow, Call(), way) if streaming else partial(perform, flow, way)
        hit, outcome = interrupted(work, point, "pipeline/drivers.py", "pipeline/effects.py", resumed=False)
        kept.append(outcome)
        assert inspect.getgeneratorstate(asked) in (inspect.GEN_CREATED, inspect.GEN_CLOSED), point
        if not hit:
            break
    assert point > 10
