"""What all options have in common: kinds of values, and errors that name the option, what was given, what is meant."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dspy_prod.errors import ConfigError, OptionError

if TYPE_CHECKING:
    from typing_extensions import Self


def _seconds(value: Any) -> Any:
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        raise ValueError("a duration is a number of seconds or a timedelta, not a bool")
    return value


def not_bool(value: Any) -> Any:
    """Refuse True and False, which Python takes for numbers."""
    if isinstance(value, bool):
        raise ValueError("expected a number, got a bool")
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Usd = Annotated[float, BeforeValidator(not_bool), Field(ge=0, le=1e6, allow_inf_nan=False)]
"""A price: at a dollar a token, no call's cost leaves 64 bits of nano-USD."""
Share = Annotated[float, BeforeValidator(not_bool), Field(gt=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """Base of all options: frozen, hashable, and strict about names.

    Raises:
        ConfigError: an option is unknown or impossible; the message names it, and what is allowed.
    """

    # Schemas are built when options are first made, not at import.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)

    def __init__(self, *args: Any, **data: Any) -> None:
        if args:
            name, fields = type(self).__name__, ", ".join(type(self).model_fields)
            raise TypeError(f"{name} takes keyword arguments only: {name}({fields})")
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explained(type(self), error.errors(include_url=False)[0]) from None

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise ConfigError(f"{kind} does not change; make another: options.model_copy(update={{{name!r}: ...}})")

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Self:
        """Options from a mapping, checked as at construction.

        Raises:
            ConfigError: an option is unknown or impossible.
        """
        try:
            return super().model_validate(obj, **how)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            told = first.get("ctx", {}).get("error")  # what the constructor said
            raise (told if isinstance(told, OptionError) else _explained(cls, first)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The same options but for `update`, which, unlike pydantic's, is checked as at construction.

        Raises:
            ConfigError: an option is unknown or impossible.
        """
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **update})

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """What an earlier version pickled has the defaults of the options that came later."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(name, field.default)


def _explained(kind: type[Options], first: Any) -> OptionError:
    """What pydantic found first, in words that name the option, what was given and what is allowed."""
    field, given = str(first["loc"][0]) if first["loc"] else "", first["input"]
    expected = list(kind.model_fields)
    if first["type"] == "extra_forbidden":
        hidden = any(word in field.lower() for word in ("key", "token", "secret", "password"))
        got = "" if hidden else f", got {given!r}"
        problem = f"is no option of {kind.__name__}{got}{_meant(field, expected)}; it has {', '.join(expected)}"
    elif first["type"] == "missing":
        problem = f"is missing; add it, e.g. {field} = ..."
    else:
        problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        problem = problem[:1].lower() + problem[1:]
        if field:
            problem += f", got {given!r}"
        if first["type"] == "literal_error" and isinstance(given, str):
            problem += _meant(given, re.findall("'([^']*)'", first["ctx"]["expected"]))
    name = f"{kind.__name__}: {field}: " if field else f"{kind.__name__}: "
    return OptionError(name + problem, field=field, problem=problem)


def _meant(given: str, choices: list[str]) -> str:
    from difflib import get_close_matches  # at the first use: importing the package stays light

    near = get_close_matches(given, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
