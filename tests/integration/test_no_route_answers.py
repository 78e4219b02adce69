"""The error of a call that no route answered: it names them all, and means what the last one said."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.utils.exceptions import LMError

from dspy_prod.pipeline.outcome import TABLE, is_of_the_request, is_outage, judge
from dspy_prod.testing import Reset, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask
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
