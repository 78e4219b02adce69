"""What a predictor's fields are, in words that do not depend on where a class was defined, and how two sets differ."""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import dspy
import pydantic

from dspy_prod.registry.errors import SignatureMismatchError


class Field(NamedTuple):
    """One field of a signature.

    Attributes:
        name: its name.
        kind: `"input"` or `"output"`.
        type: its type, with the fields of models written out.
    """

    name: str
    kind: str
    type: str


def fields_of(signature: Any) -> tuple[Field, ...]:
    """The fields of a DSPy signature, in order."""
    return tuple(
        Field(name, "input" if name in signature.input_fields else "output", described(info.annotation))
        for name, info in signature.fields.items()
    )


def described(annotation: Any, seen: tuple[Any, ...] = ()) -> str:
    """A type in words: `str`, `list[int]`, `Ticket{title: str, urgent: bool}`, `Color{red='r', blue='b'}`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(arguments[0], seen)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (Union, types.UnionType):
        return " | ".join(described(item, seen) for item in arguments)
    if origin is not None:
        inside = ", ".join("..." if item is Ellipsis else described(item, seen) for item in arguments)
        return f"{getattr(origin, '__name__', str(origin))}[{inside}]"
    if annotation is None or annotation is type(None):
        return "None"
    if not isinstance(annotation, type):
        return str(getattr(annotation, "__name__", annotation))
    name = annotation.__name__
    if annotation in seen:
        return name
    if issubclass(annotation, enum.Enum):
        return f"{name}{{{', '.join(f'{member.name}={member.value!r}' for member in annotation)}}}"
    if issubclass(annotation, pydantic.BaseModel) and not issubclass(annotation, (dspy.Type, dspy.History)):
        parts = {key: info.annotation for key, info in annotation.model_fields.items()}
    elif dataclasses.is_dataclass(annotation):
        hints = get_type_hints(annotation)
        parts = {field.name: hints[field.name] for field in dataclasses.fields(annotation)}
    else:
        return name
    return f"{name}{{{', '.join(f'{key}: {described(item, (*seen, annotation))}' for key, item in parts.items())}}}"


def check_fields(where: str, published: dict[str, tuple[Field, ...]], given: dict[str, tuple[Field, ...]]) -> None:
    """Raise SignatureMismatchError unless a program's predictors, by name, have the fields published in `where`."""
    for predictor in [*published, *given]:
        if predictor not in given:
            raise _mismatch(where, predictor, None, "is missing in this program")
        if predictor not in published:
            raise _mismatch(where, predictor, None, "was not part of it when it was published")
        old = {field.name: field for field in published[predictor]}
        new = {field.name: field for field in given[predictor]}
        for name in [*old, *new]:
            if name not in new:
                raise _mismatch(where, predictor, name, "is missing in this program's signature")
            if name not in old:
                raise _mismatch(where, predictor, name, "was not part of the published signature")
            for what in ("kind", "type"):
                before, now = getattr(old[name], what), getattr(new[name], what)
                if before != now:
                    raise _mismatch(where, predictor, name, f"has another {what}: published {before}, here {now}")
        if list(old) != list(new):
            raise _mismatch(where, predictor, next(a for a, b in zip(new, old, strict=True) if a != b), "moved")


def _mismatch(where: str, predictor: str, field: str | None, what: str) -> SignatureMismatchError:
    subject = f"predictor {predictor!r}" if field is None else f"field {field!r} of predictor {predictor!r}"
    return SignatureMismatchError(
        f"{where} does not fit this program: {subject} {what}. Load a version published from this code, "
        "or publish this program as a new version",
        predictor=predictor,
        field=field,
    )
