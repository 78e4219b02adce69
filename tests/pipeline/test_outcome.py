"""The table of verdicts: what each end of an attempt means for breaker, retries, fallbacks, limiter and bill."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from dspy._vendor.lm15.transports import ConnectTimeout, ReadTimeout
from dspy.lm15 import TransportError
from dspy.utils import exceptions as dspy_errors
from dspy.utils.exceptions import LMError, LMServerError, LMTransportError
from pydantic import BaseModel, ValidationError

from dspy_prod.errors import BudgetExceededError
from dspy_prod.pipeline.outcome import Verdict, flaw_of, judge, own_deadline
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.pipeline.upstream.finish import untold_in
from tests.pipeline.support import answer


def from_cause(error: BaseException, cause: BaseException) -> Any:
    error.__cause__ = cause
    return error


def foreign(name: str, module: str = "httpx", **attributes: Any) -> BaseException:
    """An error of another library, known by its name alone."""
    kind: Any = type(name, (Exception,), {"__module__": module, **attributes})
    error: BaseException = kind("foreign")
    return error


class Counted(BaseModel):
    """A part of an answer."""

    tokens: int


def marks(verdict: Verdict) -> str:
    """A verdict in a word: F(ailure), R(etry), f(allback), T(hrottled), S(ent), O(wed)."""
    letters = zip("FRfTSO", verdict[1:], strict=True)
    return "".join(letter if said else "." for letter, said in letters)


@pytest.mark.parametrize(
    ("kind", "outcome", "told"),
    [
        ("ContextWindowExceededError", "error", "..f.S."),
        ("LMAuthError", "error", "..f.S."),
        ("LMBillingError", "error", "..f.S."),
        ("LMRateLimitError", "error", ".RfTS."),
        ("LMUnsupportedModelError", "error", "..f.S."),
        ("LMInvalidRequestError", "error", "....S."),
        ("LMTimeoutError", "timeout", "FRf.SO"),
        ("LMServerError", "error", "FRf.SO"),
        ("LMLockTimeoutError", "error", ".Rf..."),
        ("LMTransportError", "error", "FRf.SO"),
        ("LMUnsupportedFeatureError", "error", "..f..."),
        ("LMConfigurationError", "error", "..f..."),
        ("LMNotConfiguredError", "error", "..f..."),
        ("LMStreamAssemblyError", "error", "FRf.SO"),
        ("LMProviderError", "error", "F.f.SO"),
        ("LMUnexpectedError", "error", "F.f.SO"),
        ("LMCollectionLimitError", "error", "F.f.SO"),
        ("LMError", "error", "F.f.SO"),
    ],
)
def test_every_class_of_dspys_has_its_verdict(kind: str, outcome: str, told: str) -> None:
    """The rows of the table; a class that is placed behind its base would get the base's verdict."""
    verdict = judge(getattr(dspy_errors, kind)(message="said the upstream"))
    assert (verdict.outcome, marks(verdict)) == (outcome, told)


def test_no_class_of_dspys_is_forgotten() -> None:
    """A new class of DSPy's falls under its base; whoever adds one decides here whether that is right."""
    every = {name for name, kind in vars(dspy_errors).items() if isinstance(kind, type) and issubclass(kind, LMError)}
    (rows,) = [mark for mark in test_every_class_of_dspys_has_its_verdict.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert every == {kind for kind, _, _ in rows.args[1]}


@pytest.mark.parametrize(
    ("error", "outcome", "told"),
    [
        (BudgetExceededError("our own"), "error", "......"),
        (ValueError("not an LM's"), "error", "F.f.SO"),
        (asyncio.CancelledError(), "cancelled", "....SO"),
        (KeyboardInterrupt(), "cancelled", "....SO"),
        (GeneratorExit(), "cancelled", "....SO"),
    ],
)
def test_ends_that_are_not_the_upstreams(error: BaseException, outcome: str, told: str) -> None:
    """Who was refused owes nothing; who left may owe; neither is held against the upstream."""
    verdict = judge(error)
    assert (verdict.outcome, marks(verdict)) == (outcome, told)


@pytest.mark.parametrize(
    ("status", "owed"),
    [(None, True), (400, False), (404, False), (408, True), (499, False), (500, False), (501, True), (502, True),
     (503, False), (504, True), (529, False)],
)  # fmt: skip
def test_the_status_says_whether_it_was_billed(status: int | None, owed: bool) -> None:
    """Money is owed unless the provider certainly did not work."""
    assert judge(dspy_errors.LMProviderError("no", status=status)).owed is owed


@pytest.mark.parametrize(
    ("cause", "sent"),
    [
        (foreign("ConnectError"), False),
        (foreign("ConnectTimeout"), False),
        (foreign("PoolTimeout"), False),
        (foreign("ClientConnectorError", "aiohttp"), False),
        (ConnectionRefusedError(), False),
        (foreign("ReadError"), True),
        (ConnectionResetError(), True),
        (from_cause(foreign("ConnectError"), ConnectionResetError()), True),
        (from_cause(foreign("ConnectError"), foreign("ClientOSError", "aiohttp")), True),
        (from_cause(foreign("ConnectError"), foreign("ConnectError")), False),
        (from_cause(foreign("RemoteProtocolError"), foreign("ConnectError")), True),
        (from_cause(foreign("ServerDisconnectedError", "aiohttp"), foreign("ClientConnectorError", "aiohttp")), True),
    ],
)
@pytest.mark.parametrize("kind", [LMTransportError, LMServerError])
def test_a_call_that_never_got_through_was_not_sent(kind: type[LMError], cause: BaseException, sent: bool) -> None:
    """No connection, no bill; but LiteLLM also says `ConnectError` for one that broke after sending.

    And it connects once more by itself: an answer that broke off on the second connection was charged nothing.
    """
    verdict = judge(from_cause(kind("lost"), cause))
    assert (verdict.sent, verdict.owed, verdict.retry) == (sent, sent, True)


@pytest.mark.parametrize("engine", ["native", "litellm"])
@pytest.mark.parametrize("sent", [False, True], ids=["connecting", "reading"])
def test_a_time_limit_of_a_connection_is_a_time_out_whoever_set_it(sent: bool, engine: str) -> None:
    """The native engine's own, or one of an `httpx.Timeout`, was recorded as any other error."""
    if engine == "native":
        kind: Any = ReadTimeout if sent else ConnectTimeout
        error = from_cause(LMTransportError("late"), from_cause(TransportError("late"), kind("late")))
        error.__cause__.__cause__.__cause__ = TimeoutError()
    else:
        error = from_cause(dspy_errors.LMTimeoutError("late"), foreign("ReadTimeout" if sent else "ConnectTimeout"))
    verdict = judge(error)
    assert (verdict.outcome, marks(verdict)) == ("timeout", "FRf.SO" if sent else "FRf...")
    assert judge(LMTransportError("reset")).outcome == "error"


def test_a_body_that_is_no_json_is_not_paid_twice() -> None:
    """The answer was made, and is owed: the same route would only be paid again."""
    broken = from_cause(LMServerError("what?"), json.JSONDecodeError("no", "", 0))
    assert marks(judge(broken)) == "F.f.SO"


def test_a_number_in_what_pydantic_says_is_no_status() -> None:
    """LiteLLM read "429" out of a counter that held it, and an answer that the provider billed was charged nothing."""
    with pytest.raises(ValidationError) as caught:
        Counted.model_validate({"tokens": {"code": 429}})
    made_up = foreign("RateLimitError", "litellm.exceptions", status_code=429)
    broken = from_cause(LMServerError("?", status=429), from_cause(made_up, caught.value))
    assert judge(broken).owed


def test_a_status_that_litellm_made_up_decides_nothing() -> None:
    """It says 500 for a connection that broke; 500 of the provider is not billed, this one may be."""
    told = SimpleNamespace(status_code=500)
    made_up = from_cause(LMServerError("?", status=500), foreign("InternalServerError", "litellm.exceptions"))
    assert judge(made_up).owed
    real = from_cause(
        LMServerError("!", status=500),
        from_cause(foreign("InternalServerError", "litellm.exceptions"), foreign("HTTPStatusError", response=told)),
    )
    assert not judge(real).owed
    assert not judge(LMServerError("!", status=500)).owed, "our own engine's word"


@pytest.mark.parametrize(
    ("worked", "timeout", "failure"), [(0.9, None, False), (1.0, None, True), (4.9, 5.0, False), (5.0, 5.0, True)]
)
def test_a_deadline_counts_against_the_upstream_only_after_a_fair_time(
    worked: float, timeout: float | None, failure: bool
) -> None:
    """A caller in a hurry says nothing about others; the call may have been billed either way."""
    verdict = own_deadline(worked, timeout)
    assert (verdict.outcome, verdict.failure, verdict.retry, verdict.owed) == ("timeout", failure, False, True)


def test_an_error_that_is_raised_again_has_the_same_verdict() -> None:
    """The flow judges what settling raised, settling what the driver did: a cause that is added must not matter."""
    late = dspy_errors.LMTimeoutError("no answer within timeout=5 s")
    before = judge(late)
    assert judge(from_cause(late, AttemptTimeoutError())) == before


def told_so(**data: Any) -> Any:
    """An answer beside the provider's own words."""
    return replace(answer(), provider_data=data)


def chat(**choice: Any) -> Any:
    return told_so(object="chat.completion", choices=[{"index": 0, **choice}])


@pytest.mark.parametrize(
    ("response", "flaw"),
    [
        (answer(), None),
        (answer(text=""), "empty"),
        (answer(text=" \n"), "empty"),
        (replace(answer(text=""), finish_reason="length"), None),
        (replace(answer(text=""), finish_reason="content_filter"), "filtered"),
        (replace(answer(), finish_reason="content_filter"), None),
        (replace(answer(), finish_reason="error"), "error"),
        (chat(finish_reason="stop"), None),
        (chat(finish_reason="error"), "error"),
        (chat(finish_reason="insufficient_system_resource"), "error"),
        (chat(finish_reason=None), "no_end"),
        (chat(), "no_end"),
        (chat(finish_reason="stop", provider_specific_fields={"native_finish_reason": "error"}), "error"),
        (chat(delta={}, finish_reason=None), None),
        (told_so(object="response", status="completed"), None),
        (told_so(object="response", status="failed"), "error"),
        (told_so(object="response", status="in_progress"), "no_end"),
        (told_so(type="message", stop_reason="end_turn"), None),
        (told_so(type="message", stop_reason=None), "no_end"),
        (told_so(candidates=[{"finishReason": "STOP"}]), None),
        (told_so(candidates=[{}]), "no_end"),
    ],
)
def test_an_answer_that_nobody_can_use_is_known_by_its_end_or_its_emptiness(response: Any, flaw: str | None) -> None:
    """What is cut at `max_tokens` is the caller's to judge; where the provider's words are unknown, DSPy's hold."""
    assert flaw_of(response) == flaw


@pytest.mark.parametrize(
    ("code", "text", "told"),
    [
        ("MALFORMED_FUNCTION_CALL", "Candidate blocked: MALFORMED_FUNCTION_CALL", "FRf.SO"),
        ("inband_finish_reason", "Malformed function call: look(", "FRf.SO"),
        ("UNEXPECTED_TOOL_CALL", "Candidate blocked: UNEXPECTED_TOOL_CALL", "FRf.SO"),
        ("SAFETY", "Candidate blocked: SAFETY", "..f.SO"),
        ("inband_finish_reason", "Candidate blocked: PROHIBITED_CONTENT", "..f.SO"),
        ("promptFeedback", "Prompt blocked: OTHER", "..f.SO"),
    ],
)
def test_what_gemini_blocks_is_not_the_callers_mistake(code: str, text: str, told: str) -> None:
    """It was, on the native engine: neither tried again nor given to a fallback, though LiteLLM's route did both."""
    error: Any = dspy_errors.LMInvalidRequestError(text, provider_code=code)
    error.begun = True
    assert marks(judge(error)) == told
    refused = dspy_errors.LMInvalidRequestError("Malformed function call in messages[2]", status=400)
    assert marks(judge(refused)) == "....S.", "what was sent is malformed"


@pytest.mark.parametrize(
    ("text", "untold"),
    [
        ('{"choices": [{"finish_reason": "stop"}]}', False),
        ('{"choices": [{"finish_reason": null}]}', True),
        ('{"choices": [{"message": {"content": "\\"finish_reason\\": \\"stop\\""}}]}', True),
        ('{"type": "message", "stop_reason": null}', True),
        ('{"type": "message", "stop_reason":"end_turn"}', False),
        ('{"candidates": [{"content": {}}]}', True),
        ('{"candidates": [{"finishReason": "STOP"}]}', False),
        ('{"message": {}, "done_reason": "stop"}', False),
        ('{"output": {}, "stopReason": "end_turn"}', False),
        ('{"results": [{}]}', False),
        ("[1]", False),
        ("a ModelResponse", False),
        ("", False),
    ],
)
def test_whether_an_end_was_told_is_read_off_the_answer_itself(text: str, untold: bool) -> None:
    """LiteLLM says "stop" where none was; in a language that is not known, its word holds."""
    assert untold_in(text) is untold


def from_litellm(error: Any, inner: BaseException, *, status: int = 500) -> Any:
    """An error as LiteLLM translates it."""
    return from_cause(error, from_cause(foreign("APIError", "litellm.exceptions", status_code=status), inner))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (dspy_errors.LMServerError("x", status=404), "..f.S."),
        (dspy_errors.LMProviderError("x", status=302), "..f.S."),
        (dspy_errors.LMProviderError("x", status=303), "F.f.SO"),
        (dspy_errors.LMProviderError("x", status=200), "F.f.SO"),
        (dspy_errors.LMInvalidRequestError("x", status=500), "FRf.S."),
        (dspy_errors.LMInvalidRequestError("x", status=400), "....S."),
        (dspy_errors.ContextWindowExceededError(message="x", status=400), "..f.S."),
        (dspy_errors.LMAuthError("x", status=400), "..f.S."),
        (dspy_errors.LMBillingError("x", status=429), "..f.S."),
        (dspy_errors.LMRateLimitError("Insufficient balance", status=429), "..f.S."),
        (dspy_errors.LMRateLimitError("You exceeded your current quota, check your plan", status=429), ".RfTS."),
        (ImportError("No module named 'boto3'"), "..f..."),
        (from_litellm(LMServerError("x", status=500), TypeError("a set is not JSON serializable")), "..f..."),
        (from_litellm(LMServerError("x", status=500), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")), "..f..."),
        (from_litellm(LMServerError("x", status=500), foreign("ReadError")), "FRf.SO"),
        (from_litellm(LMServerError("x", status=500), ValueError("Missing Gemini API key")), "..f..."),
    ],
)
def test_a_status_decides_and_not_the_class(error: Any, told: str) -> None:
    """Engines put the same refusal into different classes."""
    assert marks(judge(error)) == told


@pytest.mark.parametrize(
    ("code", "told"),
    [("rate_limit_exceeded", ".RfTSO"), ("502", "FRf.SO"), ("insufficient_quota", "..f.SO"), ("SAFETY", "..f.SO")],
)
def test_an_error_inside_an_answer_is_owed_whatever_it_says(code: str, told: str) -> None:
    """The provider had begun to work."""
    error: Any = LMServerError("inside", provider_code=code)
    error.begun = True
    assert marks(judge(error)) == told
