"""Where `call_context` begins and ends."""

from __future__ import annotations

import contextvars

import pytest

from dspy_prod import call_context
from dspy_prod.context.current import current


def test_a_context_that_ends_elsewhere_than_it_began_says_so() -> None:
    """In a `def` dependency of FastAPI: HTTP 500 with "created in a different Context", and nobody knew of what."""
    scope = call_context(user="ann")
    contextvars.copy_context().run(scope.__enter__)
    assert current().user is None, "the calls in between were nobody's"
    with pytest.raises(RuntimeError, match="`async def` dependency"):
        contextvars.copy_context().run(scope.__exit__, None, None, None)


def test_an_error_inside_is_not_hidden_by_where_the_context_ends() -> None:
    scope = call_context(user="ann")
    contextvars.copy_context().run(scope.__enter__)
    error = KeyError("the endpoint's own")
    assert not contextvars.copy_context().run(scope.__exit__, KeyError, error, None), "the error goes on"


def test_an_error_inside_leaves_the_context_outside_as_it_was() -> None:
    for error in (KeyError("k"), ValueError("v")):
        with pytest.raises(type(error)), call_context(user="ann"):
            raise error
        assert current().user is None
