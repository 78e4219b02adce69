"""What must not be written: which names hold a secret, and values without them.

A secret never reaches a repr, log, exception, trace, state file, cache row or pickle. It may live in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, unquote_plus, urlencode

from dspy_prod.privacy.forms import HIDDEN, SHORTEST, blotted

SECRET_KEYS: Final = frozenset({"api_key", "azure_ad_token_provider", "headers", "extra_headers"})
"""Client settings that may hold a secret, whatever their value looks like."""

_SECRET_NAME: Final = re.compile(
    r"api[-_]?key|secret|passw(or)?d|credential|authorization|access[-_]?key|private[-_]?key"
    r"|(^|[-_])(token|auth|bearer|cookie)$|^key$",
    re.IGNORECASE,
)
_USERINFO: Final = re.compile(r"//[^/?#]*@")
_PLACEHOLDERS: Final = frozenset(
    {"anything", "api-key", "api_key", "no-key", "no-key-needed", "not-needed", "not-required", "lm-studio"}
    | {"llama.cpp", "lm_studio", "ollama", "openai", "placeholder", "sk-no-key-required", "token-abc123", "unused"}
)
"""What is said where a server asks for no key; texts that name the server would be garbled."""

_SHORT_PAIR: Final = re.compile(rf"(?<=//)[^/?#@]{{1,{SHORTEST - 1}}}@[^/?#]+")
"""Too short to be known by itself, and so with its server."""

_PAIR: Final = re.compile(r"(://)[^\s/?#\"'<>@:]*:[^\s\"'<>/?#]*@")

DEPTH: Final = 64
SECRET: Final = "<secret>"
_CYCLE: Final = "<cycle>"
_TOO_DEEP: Final = "<too deep>"
_UNREADABLE: Final = "<redaction failed>"
_LONG: Final = 10**12
"""From here on an integer may be a card number."""


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


def without_password(url: str) -> str:
    """A URL that may be shown: user names and passwords, and the values of its options, are left out."""
    return re.sub(r"([?&][^=&]*)=[^&]*", r"\1=***", _USERINFO.sub("//***@", url))


def address(url: str) -> str:
    """Where a URL leads, fit to be written; a digest of what is secret in it keeps different users apart."""
    hidden = _hidden_in(url)
    bare = bare_url(url if "://" in url else f"//{url}").split("//", 1)[-1].rstrip("/")
    if not hidden:
        return bare
    digest = hashlib.sha256("\0".join(["dspy_prod:url", *hidden]).encode("utf-8", "replace")).hexdigest()
    return f"{bare}#{digest[:12]}"


def secrets_in(settings: Mapping[str, Any]) -> set[str]:
    """The secrets in client settings, headers or environment variables: what a name says to be one, and parts of URLs.

    User names with passwords and query options of a URL as they stand and unquoted; a bearer token also by itself. What
    is too short to be told from ordinary words is left out.
    """
    found: set[str] = set()
    for name, value in settings.items():
        if is_secret(str(name)):
            found.update(_texts(value))
        if isinstance(value, Mapping):
            found |= secrets_in(value)
        elif isinstance(value, str) and "://" in value:
            for text in _hidden_in(value):
                found.update((text, unquote(text), unquote_plus(text)))
            found.update(pair[0] for pair in _SHORT_PAIR.finditer(value))
    return {text for text in found if len(text) >= SHORTEST and text.lower() not in _PLACEHOLDERS}


def said_of(place: str, text: str, secrets: Iterable[str] = ()) -> str:
    """What a server said, without the password of the URL by which it is reached, other known secrets and URLs'.

    Whole: whoever cuts it cuts afterwards, for half a password is not known any more.
    """
    text = blotted(text, {*secrets_in({"place": place}), *secrets})
    return _PAIR.sub(rf"\g<1>{HIDDEN}@", text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = str(value)
        yield value
        scheme, _, rest = value.partition(" ")
        if scheme.lower() in ("bearer", "basic") and rest:
            yield rest
        if scheme.lower() == "basic":
            with suppress(ValueError):
                pair = b64decode(rest).decode()
                yield from (pair, pair.partition(":")[2])
        if value.startswith("{"):  # such as the credentials of a service account
            with suppress(ValueError, RecursionError):
                yield from secrets_in(json.loads(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)


def _hidden_in(url: str) -> list[str]:
    """The secrets of a URL as they stand in it."""
    hidden: list[str] = []
    userinfo = _USERINFO.search(url if "://" in url else f"//{url}")
    if userinfo is not None:
        pair = userinfo[0][2:-1]
        hidden.append(pair if len(pair) >= SHORTEST else f"{pair}@")
        password = pair.partition(":")[2]
        if password:
            hidden.append(password)
    for option in url.partition("?")[2].partition("#")[0].split("&"):
        name, _, value = option.partition("=")
        if value and is_secret(unquote_plus(name)):
            hidden.append(value)
    return hidden


def public(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an LM without what is secret in them."""
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        if is_secret(name):
            continue
        kept[name] = bare_url(value) if isinstance(value, str) and "://" in value else without_secrets(value)
    return kept


class Walk:
    """One walk through a value. Each container in it is visited once.

    Args:
        text: redacts a text.
    """

    def __init__(self, text: Callable[[str], str]) -> None:
        self._text = text
        self._done: dict[int, tuple[Any, Any]] = {}  # by id; holding the value keeps its id from being used again

    def value(self, value: Any, depth: int = 0) -> Any:
        """The value without what is to be hidden; the same object when there is nothing."""
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            return value if -_LONG < value < _LONG else self._number(value)
        if not isinstance(value, (Mapping, list, tuple)):
            return self._text(_shown(value))
        if depth >= DEPTH:
            return _TOO_DEEP
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = (value, _CYCLE)
        try:
            result = self._mapping(value, depth) if isinstance(value, Mapping) else self._sequence(value, depth)
        except Exception:
            result = _UNREADABLE  # a container of somebody's own that cannot be read
        self._done[id(value)] = (value, result)
        return result

    def _number(self, value: int) -> Any:
        try:
            text = str(value)
        except ValueError:  # more digits than Python converts
            return value
        clean = self._text(text)
        return value if clean == text else clean

    def _sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> Any:
        items = [self.value(item, depth + 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items
        make = getattr(value, "_make", None)  # a named tuple
        return tuple(items) if make is None else make(items)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        kept: dict[Any, Any] = {}
        changed = False
        counts: dict[Any, int] = {}
        for name, item in value.items():
            clean_name = self.value(name, depth + 1)
            clean = self._hidden(item) if isinstance(name, str) and is_secret(name) else self.value(item, depth + 1)
            changed = changed or clean_name is not name or clean is not item
            key = clean_name
            while key in kept:  # two addresses are two entries
                counts[clean_name] = counts.get(clean_name, 1) + 1
                key = f"{clean_name}-{counts[clean_name]}"
            kept[key] = clean
        return kept if changed else value

    @staticmethod
    def _hidden(item: Any) -> Any:
        return item if item is None or isinstance(item, bool) or item in ("", SECRET) else SECRET


def _shown(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return _UNREADABLE
