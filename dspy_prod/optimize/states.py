"""What an optimizer changes about a program: instructions, demonstrations, settings. Two programs with the same state
are the same candidate, whatever objects they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dspy
import orjson

from dspy_prod.compat.dspy import mark_compiled, rebind_sources, source_of
from dspy_prod.optimize.leaves import leaf, named


@dataclass(frozen=True)
class Part:
    """The state of one predictor.

    Attributes:
        name: its path in the program. signature: with its instructions, descriptions and prefixes.
        instructions: as they were when this was read; some optimizers change them within the signature.
        demos: its demonstrations, in order. config: its arguments of calls. fields: how it decides.
    """

    name: str
    signature: Any
    instructions: str
    demos: tuple[Any, ...]
    config: Mapping[str, Any]
    fields: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class State:
    """What makes a program the candidate that it is.

    Attributes:
        key: the same for the same state, in every process. parts: of its predictors, in order.
        sources: generated code by the path of its module.
        program: the only object that has this state, where it is no state but code.
    """

    key: str
    parts: tuple[Part, ...]
    sources: Mapping[str, str]
    program: Any = None

    @property
    def prompts(self) -> dict[str, str]:
        """Instructions by predictor."""
        return {part.name: part.instructions for part in self.parts}

    @property
    def demos(self) -> dict[str, int]:
        """How many demonstrations, by predictor."""
        return {part.name: len(part.demos) for part in self.parts}

    @cached_property
    def described(self) -> dict[str, Any]:
        """As JSON-friendly data."""
        return {
            part.name: {
                "instructions": part.instructions, "demos": [_plain(demo) for demo in part.demos],
                "fields": _fields(part.signature), **({"decisions": _plain(part.fields)} if part.fields else {}),
            }
            for part in self.parts
        }  # fmt: skip

    def put(self, pristine: Any) -> Any:
        """A program with this state: a copy of one that nobody has changed."""
        if self.program is not None:
            return self.program
        program = pristine.deepcopy()
        rebind_sources(program, self.sources)
        mine = dict(program.named_predictors())
        for part in self.parts:
            predictor = mine.get(part.name)
            if predictor is None:
                continue
            signature = part.signature
            if signature.instructions != part.instructions:
                signature = signature.with_instructions(part.instructions)
            predictor.signature, predictor.demos = signature, list(part.demos)
            predictor.config = {**part.config}
            if part.fields or getattr(predictor, "fields", None):
                predictor.fields = {**part.fields}
        mark_compiled(program)
        return program


def has_sources(program: Any) -> bool:
    """Whether part of a program is code that optimizers write. To look for it takes long where there is a history."""
    return any(source_of(module) is not None for _, module in program.named_sub_modules())


def read(program: Any, alone: bool = False, written: bool = True) -> State:
    """The state of a program, read now.

    Args:
        program: whose. written: part of it may be code, see `has_sources`.
        alone: its state is code that no copy has, so that the object itself is kept.
    """
    parts = tuple([_part(name, predictor) for name, predictor in program.named_predictors()])
    found = program.named_sub_modules() if written else ()
    sources = {name: source for name, module in found if (source := source_of(module)) is not None}
    text = _written(
        [
            [part.name, part.instructions, _fields(part.signature), [_plain(demo) for demo in part.demos],
             _plain(part.config), _plain(part.fields)]
            for part in parts
        ] + [sources, type(program).__qualname__ if alone else ""]
    )  # fmt: skip
    return State(hashlib.sha256(text).hexdigest()[:16], parts, sources, program if alone else None)


def rest_of(program: Any) -> list[tuple[str, str, Any]]:
    """What else makes a program what it is: the plain attributes of its modules that are no state, by path and name."""
    return [
        (path, name, _plain(value))
        for path, module in program.named_sub_modules()
        if not isinstance(module, dspy.Predict)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in ("callbacks", "history") and _is_plain(value)
    ]


def _is_plain(value: Any) -> bool:
    """Whether it is data through and through."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _part(name: str, predictor: Any) -> Part:
    signature = predictor.signature
    fields = getattr(predictor, "fields", None) or {}
    return Part(
        name, signature, signature.instructions, tuple(predictor.demos), dict(predictor.config),
        {key: dict(value) if isinstance(value, dict) else value for key, value in dict(fields).items()},
    )  # fmt: skip


def _fields(signature: Any) -> list[list[str]]:
    """Name, prefix and description of each field: a COPRO candidate may differ in a prefix alone."""
    return [
        [name, str(extra.get("prefix", "")), str(extra.get("desc", ""))]
        for name, field in signature.fields.items()
        for extra in (field.json_schema_extra or {},)
    ]


def _plain(value: Any) -> Any:
    """Data that is written the same way in every process."""
    if isinstance(value, (dspy.Example, dict)):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(each) for each in value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value if not isinstance(value, int) or abs(value) < 2**63 else str(value)
    dump = getattr(value, "model_dump", None)
    if isinstance(value, type):
        return named(value)
    return _plain(dump(mode="json")) if callable(dump) else leaf(value, _plain)


def key_of(example: Any) -> str:
    """What tells an example of a data set from others, in every process.

    Raises:
        Exception: it is not to be told, as it contains itself, or an object of its raises where it is read.
    """
    return hashlib.sha256(_written(_plain(example))).hexdigest()[:16]


def told_key(example: Any) -> str:
    """The same of what need be no example of the run's; empty where it cannot be told, which none of those is."""
    try:
        return key_of(example)
    except Exception:
        return ""


def _written(data: Any) -> bytes:
    try:
        return orjson.dumps(data, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # half a character, as a model may write
        return json.dumps(data, sort_keys=True).encode()
