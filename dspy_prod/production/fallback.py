"""The last fallback: what a `Production` answers when no model does."""

from __future__ import annotations

import copy
import difflib
import enum
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Union, get_args, get_origin

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.production.reasons import REASONS

_DEFAULT: Final = "default"
_FORMS: Final = (
    "a string, a dict of outputs, a dspy.Prediction, a callable of the inputs, a dspy.Module, or a table of these by "
    "reason or program name with a 'default'"
)


@dataclass(frozen=True)
class Outputs:
    """The output fields of a program, as far as its signatures tell.

    Attributes:
        fields: those that its prediction has: of its own signature, of its only predictor, else of all predictors.
        known: every output field of any of its predictors; a program's `forward` may return some of these.
        text: its only, else its last text field.
    """

    fields: tuple[str, ...]
    known: frozenset[str]
    text: str | None

    @classmethod
    def of(cls, program: Any) -> Outputs:
        """Read the signatures of a program."""
        signatures = [predictor.signature for _, predictor in program.named_predictors()]
        own: Any = getattr(program, "signature", None)
        shown = [own] if hasattr(own, "output_fields") else signatures
        fields: dict[str, Any] = {}
        for signature in shown:
            for name, field in signature.output_fields.items():
                fields.pop(name, None)  # the last place counts
                fields[name] = field.annotation
        texts = [name for name, annotation in fields.items() if _is_text(annotation)]
        known = frozenset(fields).union(*(signature.output_fields for signature in signatures))
        return cls(tuple(fields), known, texts[-1] if texts else None)

    def prediction(self, value: Any) -> dspy.Prediction | None:
        """What a fallback gave, as a prediction; None stays None.

        Raises:
            TypeError: it is neither a text, a mapping of outputs nor a prediction, or a text nobody has a field for.
        """
        if value is None or isinstance(value, dspy.Prediction):
            return value
        if isinstance(value, str) and self.text is not None:
            value = {self.text: value}
        if isinstance(value, Mapping):
            return dspy.Prediction(**{**dict.fromkeys(self.fields), **value})
        hint = " (the program has no text output to put it in)" if isinstance(value, str) else ""
        raise TypeError(
            f"fallback_response gave a {type(value).__name__}{hint}; return a dict of outputs or a dspy.Prediction"
        )


@dataclass(frozen=True)
class Answer:
    """One way to answer without the program: known in advance, a function of the inputs, or another module."""

    source: Any

    def give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A text, a mapping of outputs, a prediction, or None for no answer."""
        value = self._ask(args, kwargs)
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise TypeError("fallback_response is an async function: call the program with `await prod.acall(...)`")
        return value

    async def agive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Asynchronous `give`."""
        if isinstance(self.source, dspy.Module):
            acall = self.source.acall if hasattr(self.source, "aforward") else dspy.asyncify(self.source)
            return await acall(*args, **kwargs)
        value = self._ask(args, kwargs)
        return await value if inspect.isawaitable(value) else value

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.source, (str, Mapping, dspy.Prediction)):
            return copy.deepcopy(self.source)  # each call gets its own
        return self.source(*args, **kwargs)


class Fallback:
    """A parsed `fallback_response`. Immutable, and shared by copies of its `Production`.

    Args:
        response: what was given as `fallback_response`.
        name: the `Production`'s name.
        outputs: what its program returns.

    Raises:
        ConfigError: it cannot be meant, or could mean two things.
    """

    def __init__(self, response: Any, name: str, outputs: Outputs) -> None:
        self.name = name
        self.outputs = outputs
        if isinstance(response, Mapping) and _is_table(response, name, outputs):
            own = {key: value for key, value in response.items() if key in REASONS or key in (name, _DEFAULT)}
            self._answers = {key: _answer(value, outputs) for key, value in own.items()}
        else:
            self._answers = {_DEFAULT: _answer(response, outputs)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Fallback:
        return self  # optimizers copy programs; the fallback is not theirs to change

    def answer(self, reason: str) -> Answer | None:
        """The answer for a reason: the reason's own, else the program's, else the default."""
        for key in (reason, self.name, _DEFAULT):
            if key in self._answers:
                return self._answers[key]
        return None

    def modules(self) -> list[dspy.Module]:
        """The modules among the answers."""
        return [answer.source for answer in self._answers.values() if isinstance(answer.source, dspy.Module)]


def _answer(value: Any, outputs: Outputs) -> Answer:
    if isinstance(value, dspy.Prediction):
        return Answer(value)
    if isinstance(value, str):
        if outputs.text is None:
            fields = ", ".join(outputs.fields)
            raise ConfigError(
                f"fallback_response is a string, but the program has no text output to put it in"
                f"{f' (its outputs: {fields})' if fields else ''}; give a dict of outputs"
            )
        return Answer(value)
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in outputs.known]
        if not value or (unknown and outputs.known):
            raise ConfigError(_unknown_outputs([str(key) for key in unknown], outputs))
        return Answer(dict(value))
    if callable(value):
        return Answer(value)
    raise ConfigError(f"fallback_response takes {_FORMS}; got {type(value).__name__}")


def _is_table(response: Mapping[Any, Any], name: str, outputs: Outputs) -> bool:
    """Whether a mapping goes from reasons and program names to answers, or from output fields to values."""
    keys = set(response)
    words = REASONS | {name, _DEFAULT}
    table = bool(keys) and keys <= words
    fields = bool(keys) and keys <= outputs.known
    if table and fields:
        raise ConfigError(
            f"fallback_response={{{', '.join(map(repr, response))}: ...}} may mean outputs or a table by reason; "
            "give dspy.Prediction(...) for outputs, or add an entry that only a table can have, such as "
            "'upstream_error'"
        )
    if table or fields:
        return table
    if _DEFAULT in keys and not keys & outputs.known:  # a table for several programs; other names are theirs
        for key in sorted(map(str, keys - words)):
            close = difflib.get_close_matches(key, REASONS, 1, cutoff=0.8)
            if close:
                raise ConfigError(f"fallback_response: {key!r} is no reason; do you mean {close[0]!r}?")
        return True
    return False


def _unknown_outputs(unknown: list[str], outputs: Outputs) -> str:
    if not unknown:
        return "fallback_response={} is empty; use None for no fallback"
    return (
        f"fallback_response names {', '.join(map(repr, unknown))}, which is neither an output of the program "
        f"({', '.join(sorted(outputs.known))}) nor a reason ({', '.join(sorted(REASONS))}). If forward returns such "
        "fields, give a dspy.Prediction(...)"
    )


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members == [str]
    if get_origin(annotation) is typing.Annotated:
        return _is_text(get_args(annotation)[0])
    return isinstance(annotation, type) and issubclass(annotation, str) and not issubclass(annotation, enum.Enum)
