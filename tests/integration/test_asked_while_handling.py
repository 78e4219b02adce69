"""A model that is asked while another error is handled: that stands behind each of the attempt's, and says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import httpx
import litellm
import pytest
from dspy.utils.exceptions import LMError, LMTimeoutError, LMTransportError

from dspy_prod import Retry
from dspy_prod.compat.stay import Stay
from dspy_prod.pipeline.outcome import TABLE, is_of_the_request, is_outage, judge
from dspy_prod.pipeline.upstream.ends import bounded_by, causes_of
from dspy_prod.testing import ErrorInStream, Hang, Reset, Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, outcome, records, request
from tests.e2e.test_unusable import QUICK, START, TOLD, body, chunk
from tests.integration.support import breaker

UNREADABLE = Verbatim(body(lambda whole, _, __: whole.update(choices="nonsense")))
CUT = Verbatim(START + chunk({"content": "hello"}))
ENGINES = pytest.mark.parametrize("engine", ["lm15", "litellm"])
STATUSES = [400, 401, 429, 503]
"""What another service said: by each of these an answer of the model's would be free."""


def refused(status: int) -> httpx.HTTPStatusError:
    sent = httpx.Request("POST", "http://other/")
    return httpx.HTTPStatusError("no", request=sent, response=httpx.Response(status, request=sent))


def asked(lm: Any, way: str, status: int | None) -> Any:
    """One call, in a handler of an error with this status."""

    async def in_task() -> Any:
        try:
            if status is None:
                return await called()
            try:
                raise refused(status)
            except httpx.HTTPStatusError:
                return await called()
        finally:
            await lm.pipeline.aclose()

    async def called() -> Any:
        if way == "async":
            return await lm.acall("a question")
        return [event async for event in lm._async_engine_spec.stream(request())]

    def call() -> Any:
        return lm("a question") if way == "sync" else list(lm._engine_spec.stream(request()))

    if "async" in way:
        return outcome(lambda: asyncio.run(in_task()))
    if status is None:
        return outcome(call)
    try:
        raise refused(status)
    except httpx.HTTPStatusError:
        return outcome(call)


def ended(lm: Any) -> Any:
    found = [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)]
    return found, breaker(lm).total_failures


@ENGINES
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("status", STATUSES)
def test_an_answer_is_owed_whatever_its_caller_is_handling(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, status: int
) -> None:
    """One that nobody can read was free, for the status of another service, and no failure."""
    provider = serve(faults=UNREADABLE)
    lm = connect(provider, engine=engine, retry=QUICK)
    assert isinstance(asked(lm, way, status), Exception)
    assert len(provider.calls) == 1
    assert ended(lm) == ([("error", TOLD, False)], 1)


@ENGINES
@pytest.mark.parametrize("way", ["sync", "async", "sync stream", "async stream"])
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("fault", [Reset(), CUT], ids=["lost", "cut"])
def test_a_call_in_a_handler_ends_as_any_other(
    serve: MakeProvider, connect: MakeLM, fault: Any, engine: str, way: str, status: int
) -> None:
    """It is tried again, owed and counted by what became of it."""
    lms = [connect(serve(faults=fault), engine=engine, retry=QUICK) for _ in range(2)]
    plainly, handling = [(asked(lm, way, told), lm) for lm, told in zip(lms, (None, status), strict=True)]
    assert type(handling[0]) is type(plainly[0])
    assert ended(handling[1]) == ended(plainly[1])


TIMEOUT = 0.2


def asked_within(lm: Any, way: str, status: int) -> Any:
    """One call, whose event loop is run in a handler too: Python says so of what a time limit ends there."""
    try:
        raise refused(status)
    except httpx.HTTPStatusError:
        return asked(lm, way, None)


@ENGINES
@pytest.mark.parametrize("way", ["sync", "async", "sync stream", "async stream"])
@pytest.mark.parametrize("status", [400, 404])
def test_a_time_out_is_a_time_out_whatever_its_caller_is_handling(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, status: int
) -> None:
    """It was not tried again, for the status of another service."""
    lm = connect(serve(faults=Hang()), engine=engine, timeout=TIMEOUT, retry=Retry(attempts=2, backoff=0.01))
    said = asked_within(lm, way, status)
    assert isinstance(said, (LMTimeoutError, LMTransportError))
    assert judge(said) in (TABLE["slow"].verdict, TABLE["lost"].verdict)
    assert is_outage(said)
    assert not is_of_the_request(said)
    assert breaker(lm).total_failures == 2, "one of each attempt"


@ENGINES
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_fallback_is_asked_after_a_time_out_whatever_the_caller_is_handling(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """Where a 400 is handled, none was."""
    other = connect(serve(), model=CHEAP)
    lm = connect(serve(faults=Hang()), engine=engine, timeout=TIMEOUT, fallbacks=[other])
    assert asked_within(lm, way, 400) == ["ok"]


def test_what_a_consumer_handles_while_it_reads_a_stream_says_nothing_either(
    serve: MakeProvider, connect: MakeLM
) -> None:
    """It may ask for the next event in a handler of what it met with the one before."""
    lm = connect(serve(faults=CUT), engine="lm15", retry=QUICK)
    events: Iterator[Any] = lm._engine_spec.stream(request())
    next(events)
    try:
        raise refused(503)
    except httpx.HTTPStatusError:
        assert isinstance(outcome(lambda: list(events)), Exception)
    [(said, cost, _)], failures = ended(lm)
    assert (said, failures) == ("error", 1)
    assert cost > 0


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_consumer_may_handle_the_rejection_of_another_answer_while_it_reads_a_stream(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A rule of LiteLLM's said no to the other: the stream that broke passed for rejected too, nobody's failure."""
    monkeypatch.setattr(litellm, "post_call_rules", [lambda said: "bad" not in said])
    other = connect(serve(answer="bad"), engine="litellm")
    lm = connect(serve(answer="one two three four", faults=ErrorInStream()), engine="litellm")

    def read() -> None:
        events = lm._engine_spec.stream(request())
        next(events)
        try:
            other("a question")
        except LMError:
            list(events)

    async def aread() -> None:
        events = lm._async_engine_spec.stream(request())
        await anext(events)
        try:
            await other.acall("a question")
        except LMError:
            [event async for event in events]
        finally:
            await lm.pipeline.aclose()
            await other.pipeline.aclose()

    said = outcome(read if way == "sync" else lambda: asyncio.run(aread()))
    assert isinstance(said, LMError)
    assert judge(said) == TABLE["lost"].verdict
    assert breaker(lm).total_failures == 1
    assert breaker(other).total_failures == 0


# -- the chain -------------------------------------------------------------------------------------------------------
def raising(*errors: Exception) -> Exception:
    """The last of them, each raised while the one before is handled."""
    first, *others = errors
    for error in others:
        error.__context__ = first
        first = error
    return first


@pytest.mark.parametrize("own", [0, 1, 3])
def test_the_causes_of_an_attempt_s_error_end_before_what_was_handled_outside(own: int) -> None:
    outside = raising(ValueError("long ago"), ValueError("outside"))
    causes = [ValueError(str(number)) for number in range(own)]
    error: Any = raising(outside, *causes, ValueError("head"))
    assert bounded_by(outside, error) == own
    error.own_causes = own
    assert list(causes_of(error)) == [error, *reversed(causes)]


@pytest.mark.parametrize("outside", [None, ValueError("another")])
def test_without_it_all_causes_are_its_own(outside: Exception | None) -> None:
    error = raising(ValueError("first"), ValueError("head"))
    assert bounded_by(outside, error) is None
    assert len(list(causes_of(error))) == 2


def post_call_rules() -> None:
    raise ValueError("no")


def test_a_rule_that_rejected_an_earlier_answer_rejects_no_other() -> None:
    """Who asks again in the handler of the first has that behind each error of the second."""
    rules = FunctionType(post_call_rules.__code__, {**globals(), "__name__": "litellm.litellm_core_utils.rules"})
    with pytest.raises(ValueError, match="no") as first:
        rules()
    assert Stay().rejects(first.value)
    try:
        raise first.value
    except ValueError:
        with Stay() as stay:
            assert not stay.rejects(raising(first.value, KeyError("cannot be read")))
