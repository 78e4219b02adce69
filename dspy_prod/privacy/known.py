"""The secrets that this process holds, known by their value: those in its environment, and those it was given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from dspy_prod.compat.environ import snapshot
from dspy_prod.privacy.forms import SHORTEST, blotted
from dspy_prod.privacy.names import secrets_in
from dspy_prod.privacy.unshown import living_secrets

DEEPEST: Final = 20
"""Levels of a value that are looked at for secrets."""


def known() -> set[str]:
    """Every secret in the environment, and every one that came in and is still held by somebody, see `unshown`.

    Such are the settings of the LMs alive, and the addresses of stores and of MLflow.
    """
    return {*in_environment(), *[part for secret in living_secrets() for part in _parts_of(str(secret))]}


@lru_cache(maxsize=4096)
def _parts_of(secret: str) -> frozenset[str]:
    return frozenset(secrets_in({"place" if "://" in secret else "api_key": secret}))


def in_environment() -> frozenset[str]:
    """The secrets in environment variables."""
    while True:
        try:
            return _secrets_of(frozenset(snapshot()))
        except RecursionError:  # a RuntimeError too, and no deeper stack comes of trying again
            raise
        except (KeyError, RuntimeError):  # another thread has just deleted one, or set one
            continue


@lru_cache(maxsize=1)  # each error asks, and hardly ever has one of them changed
def _secrets_of(_kept: frozenset[tuple[Any, Any]]) -> frozenset[str]:
    variables = tuple(os.environ.items())
    keys = {value for name, value in variables if name.upper().endswith("_KEY") and len(value) >= SHORTEST}
    return frozenset(secrets_in(dict(variables)) | keys)


def blotted_in(value: Any, secrets: set[str], depth: int = 0) -> Any:
    """A value of any shape without these secrets, see `names.blotted`; the same object when it holds none.

    Beneath `DEEPEST` levels nothing is kept: what a provider sends may be as deep as it likes.
    """
    if isinstance(value, str):
        clean = blotted(value, secrets)
        return value if clean == value else clean
    if isinstance(value, (bytes, bytearray)):
        text = bytes(value).decode("latin-1")
        clean = blotted(text, secrets)
        return value if clean == text else clean.encode("latin-1", "replace")
    if depth > DEEPEST and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return "..." if value else value
    if isinstance(value, Mapping):
        deeper = depth + 1
        kept = {blotted_in(name, secrets, deeper): blotted_in(item, secrets, deeper) for name, item in value.items()}
        same = len(kept) == len(value) and all(kept.get(name, kept) is item for name, item in value.items())
        return value if same else kept
    if type(value) in (list, tuple, set, frozenset):
        items = [blotted_in(item, secrets, depth + 1) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value
