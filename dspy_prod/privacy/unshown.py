"""Secrets on their way through our frames, every local of which an error reporter shows with a traceback.

Reporters print the `repr` of a local, and some (Sentry) that of each item in it. So a secret becomes a text that does
not show itself where it comes in, and is one wherever it is handed on, copied or sorted into another table.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import weakref
from collections.abc import Mapping
from typing import Any, Final, SupportsIndex, TypeVar

from dspy_prod.privacy.names import bare_url, is_secret

V = TypeVar("V")

_PROCESS_KEY: Final = secrets.token_bytes(16)
_DEPTH: Final = 8


class Unshown(str):
    """A text like any other, but for its `repr`: a mark by which this process alone tells it from others."""

    __slots__ = ("__weakref__",)

    def __repr__(self) -> str:
        mark = hmac.new(_PROCESS_KEY, self.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
        return f"<secret {mark[:16]}>"

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return Unshown(super().__getitem__(key))  # reporters cut a text before they print it


_LIVING: Final[weakref.WeakValueDictionary[int, Unshown]] = weakref.WeakValueDictionary()


def unshown(value: V, name: str = "") -> V:
    """The value of this name with its secrets as `Unshown`; the same object when it holds none.

    A secret is what its own name, or one above it, says to be one, and a URL with a password.
    """
    made: V = _unshown(value, is_secret(name), _DEPTH)
    return made


def living_secrets() -> list[str]:
    """Those that came in and are still held by somebody."""
    return [secret for reference in _LIVING.valuerefs() if (secret := reference()) is not None]


def _unshown(value: Any, secret: bool, depth: int) -> Any:
    if isinstance(value, str):
        hides = secret or ("://" in value and bare_url(value) != value)
        if not hides or type(value) is Unshown:
            return value
        made = Unshown(value)
        _LIVING[id(made)] = made
        return made
    if depth and isinstance(value, Mapping):
        kept = {key: _unshown(item, secret or is_secret(str(key)), depth - 1) for key, item in value.items()}
        return value if all(kept[key] is item for key, item in value.items()) else kept
    if depth and type(value) in (list, tuple):
        items = [_unshown(item, secret, depth - 1) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value
