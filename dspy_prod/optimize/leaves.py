"""Values of users' own classes as JSON that is the same in every process: what differs is told apart.

Examples come from tables and files: their fields are dates, decimals, numbers of numpy, enums, dataclasses. Two of them
that were written alike would be taken for one example, and one answer for the answer to both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from dspy_prod.privacy.names import is_secret

SCALARS: Final = (str, int, float, bool, type(None))
"""What JSON says as it is."""


def leaf(value: Any, inner: Callable[[Any], Any]) -> Any:
    """A value that is neither of `SCALARS` nor a list, a set or a mapping.

    An object of another class is told by that, and by its plain attributes; a text that it shows of itself is only kept
    as a digest, because nobody knows what is in it.

    Args:
        inner: writes what the value consists of.
    """
    kind = named(type(value))
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Enum):
        return [kind, value.name]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if callable(getattr(value, "tolist", None)) and not isinstance(value, type):  # of numpy, pandas or torch
        return [kind, inner(value.tolist())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each.name for each in dataclasses.fields(value) if not is_secret(each.name)]
        return [kind, {name: inner(getattr(value, name, None)) for name in fields}]
    if hasattr(value, "__dict__"):
        return [kind, scalars(value)]
    text = repr(value)
    return [kind] if " at 0x" in text else [kind, hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]]


def scalars(value: Any) -> dict[str, Any]:
    """The plain attributes of an object, secrets left out."""
    items = getattr(value, "__dict__", {}).items()
    return {name: each for name, each in items if isinstance(each, SCALARS) and not is_secret(name)}


def named(given: Any) -> str:
    """Module and name of a class or a function."""
    return f"{getattr(given, '__module__', '?')}.{getattr(given, '__qualname__', type(given).__qualname__)}"
