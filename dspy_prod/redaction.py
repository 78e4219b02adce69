"""What must not be written: which names hold a secret, and values without them.

A secret never reaches a repr, log, exception, trace, state file, cache row or pickle. It may live in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

SECRET_KEYS: Final = frozenset({"api_key", "azure_ad_token_provider", "headers", "extra_headers"})
"""Client settings that may hold a secret, whatever their value looks like."""

_SECRET_NAME: Final = re.compile(
    r"api[-_]?key|secret|passw(or)?d|credential|authorization|access[-_]?key|private[-_]?key"
    r"|(^|[-_])(token|auth|bearer|cookie)$|^key$",
    re.IGNORECASE,
)
_USERINFO: Final = re.compile(r"//[^/?#]*@")


def is_secret(name: str) -> bool:
    """Whether an argument, header or field of this name holds a secret, e.g. `aws_secret_access_key`."""
    return name in SECRET_KEYS or _SECRET_NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """The value without fields that hold a secret, at any depth; the same object when there is none."""
    if isinstance(value, Mapping):
        kept = {name: without_secrets(item) for name, item in value.items() if not is_secret(str(name))}
        unchanged = len(kept) == len(value) and all(kept[name] is item for name, item in value.items())
        return value if unchanged else kept
    if isinstance(value, (list, tuple)):
        items = [without_secrets(item) for item in value]
        unchanged = all(new is old for new, old in zip(items, value, strict=True))
        return value if unchanged else type(value)(items)
    return value


def bare_url(url: str) -> str:
    """A URL without user name and password, and without query options that hold a secret."""
    url = _USERINFO.sub("//", url)
    place, mark, query = url.partition("?")
    if not mark:
        return url
    pairs = parse_qsl(query, keep_blank_values=True)
    kept = [(name, item) for name, item in pairs if not is_secret(name)]
    if len(kept) == len(pairs):
        return url
    return f"{place}?{urlencode(kept)}" if kept else place


def public(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an LM without what is secret in them."""
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        if is_secret(name):
            continue
        kept[name] = bare_url(value) if isinstance(value, str) and "://" in value else without_secrets(value)
    return kept
