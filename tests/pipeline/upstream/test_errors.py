"""What a caller sees of an attempt that failed: the provider's status, a text that can be read, and no secret."""

from __future__ import annotations

import gzip
import traceback
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from dspy.lm15 import ProviderError
from dspy.utils.exceptions import LMAuthError, LMError, LMUnexpectedError
from pydantic import BaseModel, ValidationError

from dspy_prod import LM, Price
from dspy_prod.pipeline.failures import Failures
from dspy_prod.pipeline.outcome import TABLE, flaw_of, judge
from dspy_prod.pipeline.upstream.errors import public_error
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import Provider, Verbatim
from tests.e2e.support import PRICES, ask, charged, fresh_memory, make_lm, outcome, records, request
from tests.pipeline.support import answer

KEY = "sk-known-0123456789abcdef"
BOTH = pytest.mark.parametrize("way", ["sync", "async"])


def shown(error: Exception) -> LMError:
    """As the driver shows it."""
    upstream = Upstream("openai/m", "chat", "lm15", None, {"api_key": KEY}, {})
    try:
        raise public_error(error, upstream, float("inf")) from error
    except LMError as seen:
        return seen


class Holding(Exception):
    """An error as LiteLLM's, whose text is made of that of another, which it holds."""

    def __init__(self, held: Exception, **more: Any) -> None:
        super().__init__("an error")
        self.held = held
        vars(self).update(more)

    def __str__(self) -> str:
        return f"an error: {self.held}"


@BOTH
@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b'{"error": {"message": ["no"]}}',
        b"[" * 100_000,
        gzip.compress(b"{}")[:-4],
    ],
    ids=["null", "list", "no text", "deep", "cut"],
)
def test_a_refusal_is_one_whatever_its_body_is(body: bytes, way: str) -> None:
    """HTTP 401 with a body that is no JSON object was charged the whole bound, and spoke against the provider."""
    headers = {"content-encoding": "gzip"} if body[:1] == b"\x1f" else None
    with Provider(prices=PRICES, faults=Verbatim(body, 401, headers=headers)) as provider:
        lm = make_lm(provider.url, breaker={"failure_threshold": 1})
        error = ask(lm, way)
        assert isinstance(error, LMAuthError)
        assert error.status == 401
        assert str(error)
        assert charged(lm) == provider.bill.nano == 0
        assert lm.pipeline.primary.breaker.snapshot().total_failures == 0


@pytest.mark.parametrize("said", [["no"], 1.5, {"why": "no"}, None])
def test_what_a_provider_says_instead_of_a_text_is_shown_as_one(said: Any) -> None:
    """`str(error)` raised an AttributeError where the provider's message was a list or a number."""
    error = shown(ProviderError(said, status=500))
    assert str(error).startswith("[openai/m]")
    assert isinstance(error.message, str)
    assert "HTTP 500" in str(error.__cause__)


def test_no_secret_is_left_in_anything_an_error_holds() -> None:
    """A key that the provider echoed stayed in the bodies that errors hold, and in errors that others are made of."""
    inner = Holding(ValueError(f"bad key {KEY}"), body={"error": [{"message": KEY}, (KEY, 5)], KEY: None})
    error = shown(inner)
    cause = error.__cause__
    for text in (str(error), repr(vars(error)), str(cause), repr(vars(cause)), str(inner.held)):
        assert KEY not in text
    assert vars(inner)["body"] == {"error": [{"message": "***"}, ("***", 5)], "***": None}


def test_what_holds_no_secret_is_left_as_it_is() -> None:
    """Others may hold the same objects."""
    body = {"error": [{"message": "no"}]}
    inner = Holding(ValueError("no"), body=body)
    shown(inner)
    assert vars(inner)["body"] is body


def test_a_body_without_end_is_cut() -> None:
    """A body may be nested deeper than anybody can look."""
    body: Any = KEY
    for _ in range(5_000):
        body = [body]
    inner = Holding(ValueError("no"), body=body)
    shown(inner)
    found, levels = vars(inner)["body"], 0
    while isinstance(found, list):
        found, levels = found[0], levels + 1
    assert found == "..."
    assert levels < 50


@pytest.mark.parametrize("choices", [[["stop"]], ["stop"], [None], {"0": {}}, "stop", 5])
def test_choices_that_are_none_are_an_empty_answer(choices: Any) -> None:
    """An answer with nothing in it whose choices were no objects raised an AttributeError out of the call."""
    assert flaw_of(replace(answer(text=""), provider_data={"choices": choices})) == "empty"


@BOTH
def test_a_text_completion_of_two_choices_is_owed(way: str) -> None:
    """Where one was asked, two were refused as if nothing had been sent, and charged 0."""
    choices = [{"index": number, "text": "ok", "finish_reason": "stop"} for number in range(2)]
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    with Provider(
        prices=PRICES, faults=Verbatim({"object": "text_completion", "choices": choices, "usage": usage})
    ) as it:
        lm = make_lm(it.url, model_type="text")
        assert isinstance(ask(lm, way), LMError)
        assert charged(lm) > 0


class Counted(BaseModel):
    """A part of an answer."""

    tokens: int


def test_a_key_in_what_pydantic_says_is_blotted_out() -> None:
    """Nobody can change such an error, and a traceback prints it: one that says the same stands in its place."""
    with pytest.raises(ValidationError) as caught:
        Counted.model_validate({"tokens": KEY})
    holding = Holding(caught.value)
    holding.__cause__ = caught.value
    seen = shown(holding)
    printed = "".join(traceback.format_exception(seen))
    assert KEY not in printed
    assert "unable to parse string as an integer" in printed
    assert "ValidationError" in printed
    assert KEY not in str(holding.held)
    assert judge(seen).owed


def test_an_error_of_pydantic_without_a_secret_stays_itself() -> None:
    """Whoever looks for its class still finds it."""
    with pytest.raises(ValidationError) as caught:
        Counted.model_validate({"tokens": "many"})
    holding = Holding(caught.value)
    holding.__cause__ = caught.value
    shown(holding)
    assert holding.__cause__ is caught.value
    assert holding.held is caught.value


class Strange(Exception):
    """An engine's own, with an attribute by which this library marks errors, or by a name that it has used for that."""


class Raising:
    """A custom engine."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def complete(self, _: Any) -> Any:
        raise self._error

    def stream(self, _: Any) -> Any:
        raise self._error


def asking(error: Exception) -> LM:
    """An LM whose engine raises it."""
    return LM(
        "acme/m", engine=Raising(error), prices={"acme/m": Price(input=1, output=1)}, store=fresh_memory(), cache=False
    )


@pytest.mark.parametrize("kind", [Strange, LMError])
@pytest.mark.parametrize(
    "attributes",
    [
        {"rejected": True},
        {"unasked": True},
        {"came": "whole"},
        {"rejected": True, "came": "begun"},
        {"billed": True},
        {"own_causes": "two"},
        {"_dspy_prod_mark": "mine"},
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_engine_s_own_error_may_have_attributes_of_any_name(
    kind: type[Exception], attributes: dict[str, Any], streamed: bool
) -> None:
    """It was replaced by an AttributeError, or nothing was booked."""
    errors = [kind("policy says no"), kind("policy says no")]
    vars(errors[0]).update(attributes)
    ends = []
    for error in errors:
        lm = asking(error)
        said = outcome(lambda: list(lm._engine_spec.stream(request())) if streamed else lm("a question"))  # noqa: B023
        ends.append((type(said), str(said), judge(said), [(each.outcome, each.cost_nano) for each in records(lm)]))
        lm.close()
    assert ends[0] == ends[1]
    assert "policy says no" in ends[0][1]


def test_an_engine_s_own_error_need_not_take_attributes() -> None:
    """What a caller was handling is counted on it where that can be."""

    class Fixed(Exception):
        own_causes = property(lambda _: "none")

    lm = asking(Fixed("policy says no"))
    try:
        raise ValueError("another")
    except ValueError:
        said = outcome(lambda: lm("a question"))
    assert (type(said), str(said)) == (LMUnexpectedError, "[acme/m] policy says no")
    lm.close()


class Named(NamedTuple):
    """As much as is told of a route."""

    name: str


def test_an_error_that_an_engine_raises_again_is_heard_anew() -> None:
    """It was the last that a call's routes said, and is the first of another call."""
    error = LMError("no", status=429)
    failures = Failures()
    for name in ("one", "two"):
        route: Any = Named(name)
        failures.add(route, error)
    told = failures.told()
    error.status = 503
    assert judge(told) == TABLE["throttled"].verdict
    assert judge(shown(error)) == TABLE["down"].verdict
