"""The settings of an optimizer: what it was built with, and steers it, without what its last `compile` left there."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from dspy_prod.privacy.names import is_secret
from dspy_prod.runtime.sources import tree

_METRICS: Final = frozenset({"metric", "metric_fn"})
_NO_MATTER: Final = frozenset(
    {"num_threads", "verbose", "track_stats", "track_best_outputs", "log_dir", "error_lock", "error_count"}
    | {"use_wandb", "wandb_init_kwargs", "use_mlflow", "warn_on_score_mismatch", "total_calls"}
    | {"prompt_model_total_calls", "callbacks"}
)
"""What changes nothing of what is asked."""

_DERIVED: Final = {"max_metric_calls": ("auto", "max_full_evals")}
"""What `compile` works out, unless none of these was given."""


def settings_of(optimizer: Any) -> dict[str, Any]:
    """Its settings by name, as they are; its metric and what changes nothing of what it asks are left out.

    Example:
        ```python
        settings_of(dspy.MIPROv2(metric=metric, auto="light"))["auto"]  # "light"
        ```
    """
    attributes = vars(optimizer)
    owner: Any = type(optimizer)
    begun, later = _assigned(owner)
    found = {}
    for name, value in attributes.items():
        if name in _METRICS | _NO_MATTER or is_secret(name):
            continue
        sources = _DERIVED.get(name)
        if sources is not None and any(attributes.get(each) is not None for each in sources):
            continue
        if sources is None and (name in later or (name not in begun and all(map(_tree, _classes(owner))))):
            continue
        found[name] = value
    return found


@lru_cache(maxsize=64)
def _assigned(owner: type) -> tuple[frozenset[str], frozenset[str]]:
    """(attributes that `__init__` sets or takes, those that other methods set) in a class and its bases."""
    begun: set[str] = set(inspect.signature(owner).parameters)
    later: set[str] = set()
    for each in _classes(owner):
        parsed = _tree(each)
        for function in () if parsed is None else ast.walk(parsed):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                (begun if function.name == "__init__" else later).update(_attributes(function))
    return frozenset(begun), frozenset(later)


def _classes(owner: type) -> list[type]:
    return [each for each in owner.__mro__ if each is not object]


@lru_cache(maxsize=256)
def _tree(owner: type) -> ast.Module | None:
    try:
        return tree(owner)
    except (OSError, TypeError, SyntaxError):  # made by exec, or in C
        return None


def _attributes(function: ast.AST) -> Iterator[str]:
    """The names of `self` that a function sets."""
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        for target in targets:
            for each in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
                    yield each.attr
