"""Providers like to echo the key they refuse; an error that leaves this library does not contain it.

The whole chain of causes is mended, because a traceback prints all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.redaction import is_secret

if TYPE_CHECKING:
    from dspy_prod.pipeline.upstream import Upstream

_HIDDEN: Final = "***"
_SHORTEST: Final = 6
"""Characters below which a value is left alone: hiding it would garble texts that merely contain it."""


def without_secrets_of(upstream: Upstream, error: Exception, cause: Exception) -> Exception:
    """The same error, with the upstream's keys blotted out of its texts and those of its causes.

    Args:
        upstream: whose keys they are.
        error: what the caller will see.
        cause: what it will be raised from.
    """
    secrets = sorted(set(_secrets(upstream)), key=len, reverse=True)
    seen: set[int] = set()
    found: list[BaseException | None] = [error, cause]
    while found:
        each = found.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            _blot(each, secrets)
            found += (each.__cause__, each.__context__)
    return error


def _blot(error: BaseException, secrets: list[str]) -> None:
    args = tuple([_clean(item, secrets) for item in error.args])
    if args != error.args:
        error.args = args
    for name, value in list(vars(error).items()):
        if isinstance(value, str) and (clean := _clean(value, secrets)) != value:
            setattr(error, name, clean)


def _clean(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _HIDDEN)
    return value


def _secrets(upstream: Upstream) -> Iterator[str]:
    for arguments in (upstream.clients, upstream.extras, os.environ):
        for name, value in arguments.items():
            if is_secret(str(name)):
                yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        for text in (value, value.removeprefix("Bearer ")):
            if len(text) >= _SHORTEST:
                yield text
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)


__all__ = ["without_secrets_of"]
