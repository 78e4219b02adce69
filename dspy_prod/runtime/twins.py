"""Errors that are raised more than once: each time as an object of its own, with its own traceback and notes."""

from __future__ import annotations

from typing import Any, TypeVar

AnyError = TypeVar("AnyError", bound=BaseException)


def twin(error: AnyError) -> AnyError | None:
    """Another error that says the same; None where its type makes none.

    Its `__init__` is not called: it may want more than it tells, or make another text of what it is given.
    """
    try:
        made: AnyError = type(error).__new__(type(error), *error.args)
        vars(made).update(vars(error))
    except Exception:
        return None
    if type(made) is not type(error) or made is error:
        return None
    other: Any = made
    other.args = error.args
    if isinstance(error, ImportError):  # these are in no table
        other.name, other.path = error.name, error.path
    if isinstance(vars(other).get("__notes__"), list):
        other.__notes__ = list(other.__notes__)
    if error.__cause__ is not error:  # as it is where an engine's own error is raised from itself
        other.__cause__ = error.__cause__
    other.__context__, other.__suppress_context__ = error.__context__, error.__suppress_context__
    return made.with_traceback(error.__traceback__)
