"""Functions that LiteLLM calls for its user, and functions that only have their names: what they ask is no answer."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FunctionType
from typing import Any

import httpx
import litellm
import pytest
from dspy.utils.exceptions import LMError
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.integrations.custom_logger import CustomLogger

from dspy_prod import Budget, BudgetExceededError, RejectedError
from dspy_prod.compat.stay import Stay
from dspy_prod.pipeline.outcome import TABLE, judge
from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask, outcome, records
from tests.e2e.test_unusable import DONE, END, QUICK, START, TOLD, USAGE, WAYS, body, chunk, stream
from tests.integration.support import breaker
from tests.listening import Listening, Silent

Hook = Callable[[], Awaitable[Any]]

UNREADABLE = body(lambda whole, _, __: whole.update(choices="nonsense"))
"""It was generated, and says what it took: owed once, and by that."""


def booked(lm: Any) -> list[tuple[str, int | None, bool]]:
    return [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)]


# -- names -----------------------------------------------------------------------------------------------------------
def failure_handler(call: Callable[[], Any]) -> Any:
    return call()


def get_model_info(call: Callable[[], Any]) -> Any:
    return call()


def post_call_rules(call: Callable[[], Any]) -> Any:
    return call()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caller", [failure_handler, get_model_info, post_call_rules])
def test_a_caller_may_have_the_name_of_a_function_of_litellm(
    serve: MakeProvider, connect: MakeLM, caller: Callable[[Callable[[], Any]], Any], way: str
) -> None:
    """An answer to it was none: it was asked for three times, and each time booked at its bound."""
    provider = serve(faults=Verbatim(UNREADABLE))
    lm = connect(provider, engine="litellm", retry=QUICK)
    assert isinstance(caller(lambda: ask(lm, way)), Exception)
    assert len(provider.calls) == 1
    assert booked(lm) == [("error", TOLD, False)]


def validate_schema() -> None:
    raise ValueError("not of the schema")


def test_only_a_function_of_litellm_rejects_an_answer_for_its_user() -> None:
    """Others check schemas too, and what they say may be that an answer cannot be read."""
    own = FunctionType(validate_schema.__code__, {**globals(), "__name__": "litellm.litellm_core_utils.rules"})
    errors = [outcome(validate_schema), outcome(own)]
    assert [Stay().rejects(error) for error in errors] == [False, True]


class Judge(CustomLogger):
    """Has another model judge an answer when LiteLLM logs that."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self._lm = lm
        self._asks = True
        self.asked = threading.Event()

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        if self._asks:
            self._asks = False
            outcome(lambda: self._lm("Is this good?"))
            self.asked.set()


def test_a_judge_may_be_asked_by_a_logger_of_litellm(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above it on the stack is the function of LiteLLM that logs the call before."""
    lm = connect(serve(faults=Verbatim(body())), engine="litellm", retry=QUICK)
    asked = serve(faults=Verbatim(UNREADABLE))
    judging = connect(asked, engine="litellm", retry=QUICK)
    logger = Judge(judging)
    monkeypatch.setattr(litellm, "callbacks", [logger])
    assert lm("a question") == ["hello"]
    assert logger.asked.wait(30)
    assert len(asked.calls) == 1
    assert booked(judging) == [("error", TOLD, False)]
    assert booked(lm) == [("ok", TOLD, False)]


# -- what a guardrail asks -------------------------------------------------------------------------------------------
class Moderator(Listening):
    """A service that answers each request with the status that its path names, as if it told a usage."""

    def __init__(self) -> None:
        self.asked = 0
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked += 1
                said = b'{"choices": "none", "usage": {"prompt_tokens": 7.5, "completion_tokens": 1}}'
                self.send_response(int(self.path[1:]))
                for name, value in {"retry-after": "60", "x-should-retry": "true", "content-type": "text/json"}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        super().__init__(Handler)

    def post(self, status: int) -> None:
        """Ask it, and say no whatever it says."""
        httpx.post(f"{self.url}/{status}", json={}).raise_for_status()
        raise ValueError("no")

    async def apost(self, status: int) -> None:
        async with httpx.AsyncClient() as client:
            (await client.post(f"{self.url}/{status}", json={})).raise_for_status()
        raise ValueError("no")


@pytest.fixture
def moderator() -> Iterator[Moderator]:
    moderator = Moderator()
    yield moderator
    moderator.stop()


class Guardrail(CustomGuardrail):
    """Does one thing before a request, or after an answer."""

    def __init__(self, *, before: Hook | None = None, after: Hook | None = None) -> None:
        super().__init__(guardrail_name="any")
        self._before, self._after = before, after

    async def async_pre_call_deployment_hook(self, kwargs: Any, call_type: Any) -> Any:
        return kwargs if self._before is None else await self._before()

    async def async_post_call_success_deployment_hook(self, request_data: Any, response: Any, call_type: Any) -> Any:
        return None if self._after is None else await self._after()


STATUSES = [200, 401, 422, 429, 503]
"""The last but one would pause the limiter, the last count against the breaker, the first pass for the answer."""
REJECTED = ("error", TOLD, False)
UNASKED = ("error", 0, False)


def guard(monkeypatch: pytest.MonkeyPatch, place: str, moderator: Moderator, status: int) -> None:
    """Have LiteLLM ask it `before` or `after`, by a rule or a hook."""
    when, by = place.split(" ")
    if by == "rule":
        rules = "pre_call_rules" if when == "before" else "post_call_rules"
        monkeypatch.setattr(litellm, rules, [lambda _: moderator.post(status)])
    else:
        hook: Any = {when: lambda: moderator.apost(status)}
        monkeypatch.setattr(litellm, "callbacks", [Guardrail(**hook)])


@pytest.mark.parametrize(("place", "way"), [("after hook", "async"), ("after rule", "sync"), ("after rule", "async")])
@pytest.mark.parametrize("status", STATUSES)
def test_what_a_guardrail_is_told_is_not_what_the_answer_cost(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, moderator: Moderator,
    place: str, way: str, status: int,
) -> None:  # fmt: skip
    """The answer was free, asked for again, and the provider's failure: for another service's status."""
    guard(monkeypatch, place, moderator, status)
    provider = serve(faults=Verbatim(body()))
    lm = connect(provider, engine="litellm", retry=QUICK)
    said = ask(lm, way)
    assert (isinstance(said, LMError), getattr(said, "status", None)) == (True, None)
    assert getattr(said, "retry_after", None) is None
    assert (len(provider.calls), moderator.asked) == (1, 1)
    assert booked(lm) == [REJECTED]
    assert judge(said)._replace(owed=False) == TABLE["filtered"].verdict
    assert breaker(lm).total_failures == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", STATUSES)
def test_a_stream_that_a_rule_ends_is_owed(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, moderator: Moderator, way: str, status: int
) -> None:
    """At its bound: the usage comes at the end. LiteLLM calls it an error of the connection, of status 500."""
    guard(monkeypatch, "after rule", moderator, status)
    provider = serve(faults=Verbatim(START + chunk({"content": "hello"}) + END + USAGE + DONE))
    lm = connect(provider, engine="litellm", retry=QUICK)
    _, error = stream(lm, way)
    assert getattr(error, "status", None) is None
    assert len(provider.calls) == 1
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("error", True)
    assert cost is not None
    assert cost > TOLD
    assert breaker(lm).total_failures == 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("place", "way"), [("before hook", "async"), ("before rule", "sync"), ("before rule", "async")]
)
@pytest.mark.parametrize("status", STATUSES)
def test_what_is_stopped_before_it_is_sent_is_free_and_nobody_s_failure(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, moderator: Moderator,
    place: str, way: str, streamed: bool, status: int,
) -> None:  # fmt: skip
    """What a guardrail was told passed for the answer, owed at its bound, or for the provider's refusal."""
    guard(monkeypatch, place, moderator, status)
    provider = serve()
    lm = connect(provider, engine="litellm", retry=QUICK)
    said = stream(lm, way)[1] if streamed else ask(lm, way)
    assert (isinstance(said, LMError), getattr(said, "status", None)) == (True, None)
    assert (len(provider.calls), moderator.asked) == (0, 1)
    assert booked(lm) == [UNASKED]
    assert judge(said) == TABLE["unsent"].verdict
    assert breaker(lm).total_failures == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_refuses_a_guardrail_s_own_model_does_not_refuse_the_call(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A judge with no budget left says so by an error of this library's: the answer it was to judge is owed."""
    judging = connect(serve(), budget=Budget(usd=1e-9))
    monkeypatch.setattr(litellm, "callbacks", [Guardrail(**{when: lambda: judging.acall("Is this good?")})])
    provider = serve(faults=Verbatim(body()))
    lm = connect(provider, engine="litellm", retry=QUICK)
    said = ask(lm, "async")
    assert not isinstance(said, RejectedError)
    assert isinstance(said.__cause__, BudgetExceededError)
    assert booked(lm) == [REJECTED if when == "after" else UNASKED]
    assert len(provider.calls) == (1 if when == "after" else 0)


@pytest.mark.parametrize("status", [200, 503])
def test_a_hook_of_the_last_part_of_a_stream_asks_no_model(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, moderator: Moderator, status: int
) -> None:
    """What it was told passed for the answer, whose usage nobody believed then."""

    class Last(CustomLogger):
        async def async_post_call_streaming_deployment_hook(self, *_: Any, **__: Any) -> None:
            await moderator.apost(status)

    monkeypatch.setattr(litellm, "callbacks", [Last()])
    provider = serve(faults=Verbatim(START + chunk({"content": "hello"}) + END + USAGE + DONE))
    lm = connect(provider, engine="litellm", retry=QUICK)
    _, error = stream(lm, "async")
    assert error is None
    assert moderator.asked == 1
    assert booked(lm) == [("ok", TOLD, False)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [200, 503])
def test_what_is_logged_of_an_answer_at_once_is_not_the_answer(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, moderator: Moderator, way: str, status: int
) -> None:
    """LiteLLM has it logged before it has read it."""

    class Log(CustomLogger):
        def log_post_api_call(self, *_: Any, **__: Any) -> None:
            moderator.post(status)

    monkeypatch.setattr(litellm, "callbacks", [Log()])
    lm = connect(serve(faults=Verbatim(body())), engine="litellm", retry=QUICK)
    assert ask(lm, way) == ["hello"]
    assert moderator.asked >= 1
    assert booked(lm) == [("ok", TOLD, False)]
