"""What a run's result depends on, in a form that another process can compare: what is not the same is named.

A resumed run walks the same path only while all of it is the same. `described` tells it in words and digests, as JSON
without secrets; `digests` shortens that to one digest for each part.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from types import CodeType
from typing import Any, Final

from dspy.clients.base_lm import BaseLM
from dspy.primitives import Example, Module
from dspy.signatures.signature import SignatureMeta
from dspy.teleprompt.teleprompt import Teleprompter
from pydantic import BaseModel

from dspy_prod.optimize.leaves import SCALARS, leaf, named, scalars
from dspy_prod.optimize.settings import settings_of
from dspy_prod.policies.entries import LOCAL
from dspy_prod.privacy.names import is_secret, public, without_secrets
from dspy_prod.runtime.sources import source

PACKAGES: Final = ("dspy", "gepa", "optuna", "dspy-prod")
"""Whose versions may change what is asked."""

_DEPTH: Final = 12
_SHORT: Final = 12


def described(
    optimizer: Any,
    student: Module,
    datasets: Mapping[str, Sequence[Any] | None],
    metric: Callable[..., Any] | None,
    lms: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run depends on, as JSON: class and settings of the optimizer, state and source of the program, a digest
    of every example in its order, name and source of the metric, the LMs, and versions.

    Args:
        optimizer: DSPy's, or the user's own.
        datasets: examples by name, as `{"trainset": ..., "valset": ...}`.
        metric: what scores.
        lms: LMs by their role, as `{"program": lm, "prompt_model": big}`.
        arguments: what else its `compile` gets.

    Example:
        ```python
        described(optimizer, program, {"trainset": train}, metric, {"program": lm})["versions"]["dspy"]
        ```
    """
    return {
        "optimizer": {
            "class": named(type(optimizer)),
            "settings": {name: plain(value) for name, value in settings_of(optimizer).items()},
            "source": _source_digest(type(optimizer)),
            "arguments": {name: plain(value) for name, value in (arguments or {}).items()},
        },
        "student": program(student),
        "datasets": {name: [_digest(plain(one)) for one in data or ()] for name, data in datasets.items()},
        "metric": None if metric is None else function(metric),
        "lms": {role: model(lm) for role, lm in lms.items() if lm is not None},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def digests(told: Mapping[str, Any]) -> dict[str, str]:
    """One digest for each part of what `described` told, as `optimizer` or `dataset trainset`, and the versions.

    Example:
        ```python
        digests(told) == digests(told_before)
        ```
    """
    parts = {name: _digest(told[name], whole=True) for name in ("optimizer", "student", "metric", "lms")}
    sets = {f"dataset {name}": _digest(each, whole=True) for name, each in told["datasets"].items()}
    return {**parts, **sets, **told["versions"]}


# -- parts -----------------------------------------------------------------------------------------------------------
def program(module: Module) -> dict[str, Any]:
    """State and source of a program: digests by predictor and by class."""
    predictors = {}
    for name, predictor in module.named_predictors():
        state = {key: value for key, value in predictor.dump_state().items() if key not in ("lm", "traces", "train")}
        config = getattr(predictor, "config", None) or {}
        predictors[name] = _digest([state, {key: plain(value) for key, value in config.items()}])
    own = {type(each) for _, each in module.named_sub_modules() if not _is_library(type(each))}
    return {
        "class": named(type(module)),
        "predictors": predictors,
        "source": {named(each): _source_digest(each) for each in sorted(own, key=named)},
    }


def model(lm: Any) -> dict[str, Any]:
    """Which LM it is and how it is asked, without its key."""
    identity = getattr(lm, "identity", None)
    known = isinstance(identity, bytes) and not identity.startswith(LOCAL) and hashlib.sha256(identity).hexdigest()
    return {
        "model": str(getattr(lm, "model", type(lm).__qualname__)),
        "arguments": {name: plain(value) for name, value in sorted(public(getattr(lm, "kwargs", {})).items())},
        "destination": known[:_SHORT] if known else None,
    }


def function(given: Any) -> dict[str, Any]:
    """Name and source of a function, or of an object that is called, with the plain values it carries along."""
    bound: dict[str, Any] = {}
    while isinstance(given, partial):
        bound = {**{name: plain(value) for name, value in given.keywords.items()}, **bound}
        bound.update({f"argument {at}": plain(value) for at, value in enumerate(given.args)})
        given = given.func
    inner = inspect.unwrap(given)
    code = getattr(inner, "__code__", None)
    if code is None:  # an object with `__call__`
        called = inner if isinstance(inner, type) else type(inner)
        return {"name": named(called), "source": _source_digest(called), "carries": {**bound, **scalars(inner)}}
    carried = {name: cell for name, cell in _cells(inner, code) if isinstance(cell, SCALARS)}
    defaults = [plain(value) for value in (getattr(inner, "__defaults__", None) or ())]
    owner = getattr(inner, "__self__", None)
    return {
        "name": named(inner),
        "source": _digest(_code(code)) if "<lambda>" in inner.__qualname__ else _source_digest(inner),
        "carries": {**bound, **carried, **({"defaults": defaults} if defaults else {}), **scalars(owner)},
    }


def plain(value: Any, depth: int = 0) -> Any:
    """Any value as JSON that is the same in another process, and has no secret in it."""
    if isinstance(value, SCALARS):
        return value
    if depth > _DEPTH:
        return named(type(value))
    if isinstance(value, Mapping):
        items = {str(name): plain(item, depth + 1) for name, item in value.items() if not is_secret(str(name))}
        return without_secrets(items)
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted([plain(item, depth + 1) for item in value], key=_digest)
    if isinstance(value, Example):
        inputs = value.inputs().keys() if _has_inputs(value) else ()
        return {"example": plain(dict(value.items()), depth + 1), "inputs": sorted(inputs)}
    return _of_class(value, depth)


def _of_class(value: Any, depth: int) -> Any:
    if isinstance(value, SignatureMeta):
        return [value.__name__, plain(value.dump_state(), depth + 1)]
    if isinstance(value, type):
        return named(value)
    if isinstance(value, BaseLM):
        return model(value)
    if isinstance(value, Module):
        return program(value)
    if isinstance(value, Teleprompter):
        settings = {name: plain(each, depth + 1) for name, each in settings_of(value).items()}
        return {"class": named(type(value)), "settings": settings}
    if isinstance(value, BaseModel):
        return [named(type(value)), plain(value.model_dump(), depth + 1)]
    if inspect.isroutine(value) or isinstance(value, partial):
        return function(value)
    return leaf(value, lambda each: plain(each, depth + 1))


# -- details ---------------------------------------------------------------------------------------------------------
def _digest(value: Any, whole: bool = False) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()
    return digest[:32] if whole else digest[:_SHORT]


def _is_library(owner: type) -> bool:
    """Whether the version of DSPy says what is in it."""
    return owner.__module__.partition(".")[0] in ("dspy", "dspy_prod")


def _source_digest(given: Any) -> str | None:
    """A digest of the source; of the code where there is none; None for what a version tells."""
    if isinstance(given, type) and _is_library(given):
        return None
    try:
        return _digest(source(given).strip())
    except (OSError, TypeError):  # made by exec, or in C
        pass
    code = getattr(given, "__code__", None)
    if code is not None:
        return _digest(_code(code))
    methods = {name: each.__code__ for name, each in vars(given).items() if hasattr(each, "__code__")}
    return _digest({name: _code(each) for name, each in methods.items()})


def _code(code: CodeType) -> list[Any]:
    """What a function does, whatever lines it stands in."""
    constants = [_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _cells(given: Any, code: CodeType) -> list[tuple[str, Any]]:
    found = []
    for name, cell in zip(code.co_freevars, getattr(given, "__closure__", None) or (), strict=False):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not set yet
            continue
    return found


def _has_inputs(example: Example) -> bool:
    try:
        example.inputs()
    except ValueError:  # nobody has said which fields they are
        return False
    return True


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
