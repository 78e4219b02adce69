"""The error of a call that no route answered: it names them all, and means what the last one said."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.utils.exceptions import LMAuthError, LMError, LMProviderError

from dspy_prod import LM
from dspy_prod.pipeline.outcome import TABLE, is_of_the_request, is_outage, judge
from dspy_prod.testing import Reset, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask, fresh_memory
from tests.e2e.test_unusable import WAYS

ENGINES = pytest.mark.parametrize("engine", ["lm15", "litellm"])
LONG = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."


def told(serve: MakeProvider, connect: MakeLM, engine: str, way: str, first: Any, last: Any, handling: bool) -> Any:
    """What a caller is told whose first route fails so, and his last one so."""
    other = connect(serve(faults=last), engine=engine)
    lm = connect(serve(faults=first), engine=engine, fallbacks=[other])
    if not handling:
        return ask(lm, way)
    try:
        raise ValueError("another")
    except ValueError:
        return ask(lm, way)


@ENGINES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("handling", [False, True])
@pytest.mark.parametrize("first", [Status(400, message=LONG), Status(404)], ids=["unfit", "model"])
@pytest.mark.parametrize(
    ("last", "row"),
    [(Reset(), "lost"), (Status(429), "throttled"), (Status(503), "down")],
    ids=["lost", "throttled", "down"],
)
def test_it_means_what_its_own_upstream_said(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, first: Any, last: Any, row: str, handling: bool
) -> None:
    """It was judged by the status or the words of the first: an outage passed for the fault of a program."""
    error = told(serve, connect, engine, way, first, last, handling)
    assert isinstance(error, LMError)
    assert "No route answered" in str(error)
    assert judge(error) == TABLE[row].verdict
    assert is_outage(error)
    assert not is_of_the_request(error)


class Composed(LMError):
    """An engine's own, of which `copy.copy` makes another text."""

    def __init__(self, where: str, *, why: str) -> None:
        super().__init__(f"at {where}: {why}")


class Unmade(LMError):
    """An engine's own, of which there is no other."""

    def __new__(cls, *args: Any, key: str, **kwargs: Any) -> Unmade:
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, text: str, *, key: str) -> None:
        super().__init__(text)


class Answering(LMError):
    """An engine's own, which has attributes of all names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


class Missing(ImportError):
    """An engine's own, whose message cannot be set."""

    message = property(str)


class Raising:
    """An engine that raises one object again and again."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def complete(self, _: Any) -> Any:
        raise self._error

    def stream(self, _: Any) -> Any:
        raise self._error


class AsyncRaising(Raising):
    """The same for tasks."""

    async def complete(self, _: Any) -> Any:
        raise self._error


def asking(error: Exception, *fallbacks: LM) -> LM:
    """Calls to such an engine."""
    engines = {"engine": Raising(error), "async_engine": AsyncRaising(error)}
    return LM("b", **engines, store=fresh_memory(), retry=False, breaker=False, fallbacks=fallbacks)


def refused() -> LMError:
    return LMAuthError("Incorrect API key provided", model="a", status=401)


WHOLE = pytest.mark.parametrize("way", ["sync", "async"])


@WHOLE
@pytest.mark.parametrize("kind", ["provider", "composed", "unmade", "answering"])
def test_an_error_that_an_engine_raises_again_and_again_stays_as_it_is(way: str, kind: str) -> None:
    """What another route had said of an earlier call stood in it, judged it where nobody else was asked, and grew."""
    error: LMError = {
        "provider": lambda: LMProviderError("the request did not fit", model="b", status=400),
        "composed": lambda: Composed("b", why="no"),
        "unmade": lambda: Unmade("no", key="b"),
        "answering": lambda: Answering("no", model="b"),
    }[kind]()
    lm, alone = asking(refused(), asking(error)), asking(error)
    ask(alone, way)
    before = (str(error), error.args, error.__cause__, judge(error))
    told = [ask(lm, way) for _ in range(3)]
    assert (str(error), error.args, error.__cause__, judge(error)) == before
    assert {type(each) for each in told} == {type(error)}
    assert len({str(each) for each in told}) == 1
    assert ("No route answered" in str(told[0])) == (kind != "unmade")
    assert judge(told[0]) == before[-1]
    assert ask(alone, way) is error


@WHOLE
def test_an_engine_may_raise_on_what_a_call_of_its_own_has_told(way: str) -> None:
    """It means what the last of its routes said, as it did there."""
    inner = ask(asking(refused(), asking(LMProviderError("the request did not fit", model="b", status=400))), way)
    assert "Incorrect API key" in str(inner)
    outer = ask(asking(inner), way)
    assert judge(outer) == judge(inner) == TABLE["mistake"].verdict


def test_an_import_that_failed_names_what_it_failed_of() -> None:
    """Python keeps that beside an error's attributes."""
    lm = asking(refused(), asking(Missing("no such library", name="acme", path="/acme")))
    error = ask(lm, "sync")
    assert isinstance(error, Missing)
    assert (error.name, error.path) == ("acme", "/acme")
    assert "No route answered" in str(error)
