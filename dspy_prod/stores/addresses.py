"""Where a store is, by what the environment says; and the password of one that was written down without it."""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import parse_qsl, urlencode

from dspy_prod.privacy.unshown import Unshown, unshown

DEFAULT_URL: Final = "sqlite:///.dspy_prod/state.db"
"""Where state is kept when nothing is said: a file below the current directory."""

URL_VARIABLE: Final = "DSPY_PROD_STORE"
NAMESPACE_VARIABLE: Final = "DSPY_PROD_NAMESPACE"

OVER_A_FILE: Final = "DSPY_PROD__"
"""Begins the variables that win over a file of settings: `DSPY_PROD__STORE`, `DSPY_PROD__LM__BIG__STORE`, ..."""

SERVERS: Final = {
    **dict.fromkeys(("redis", "valkey"), "redis"),
    **dict.fromkeys(("rediss", "valkeys"), "rediss"),
    "unix": "unix",
}
"""Schemes of Redis, and which redis-py knows for them."""

_URL: Final = re.compile(r"(\w+)://(?:([^/?#]*)@)?([^?#]*)(?:\?(.*))?", re.DOTALL)
_HIDDEN: Final = "***"
"""Stands in a URL that is shown for what is not."""


def default_store_url() -> str:
    """The store to use when none is named, from the environment, else a file below the directory.

    What wins over a file, `DSPY_PROD__STORE`, is where a service is that was told by it: a shell beside it must look
    there, too. `DSPY_PROD_STORE` is for those that neither a file nor that tells.
    """
    return said("STORE", URL_VARIABLE) or DEFAULT_URL


def said(key: str, variable: str) -> str:
    """A setting of the environment: over a file, else by default."""
    return os.environ.get(f"{OVER_A_FILE}{key}") or os.environ.get(variable) or ""


def with_password(url: str) -> str:
    """The URL of a server as it was written down or shown elsewhere, with the password that the environment knows.

    Any variable that names the same server may know it: `DSPY_PROD_STORE`, `DSPY_PROD__STORE`, or that of one LM of a
    file. Of options that both have, those of the URL hold; what was hidden in it is not taken for what it was.
    """
    parts = _parts(url)
    if parts is None or parts[1] not in ("", _HIDDEN):
        return url
    names = [name for name in os.environ if name.upper().startswith(OVER_A_FILE) and name.upper().endswith("__STORE")]
    for name in (URL_VARIABLE, *names):
        here = _parts(Unshown(os.environ.get(name, "")))
        if here is not None and (here[0], here[2]) == (parts[0], parts[2]):
            return _joined(parts[0], here[1], parts[2], {**here[3], **parts[3]})
    return _joined(parts[0], "", parts[2], parts[3]) if _HIDDEN in url else url


def _parts(url: str) -> tuple[str, str, str, dict[str, str]] | None:
    """(scheme, user and password, place, options that are not hidden) of a server's URL; None of any other one."""
    found = _URL.fullmatch(unshown(url))
    if found is None or found[1] not in SERVERS:
        return None
    options = parse_qsl(found[4] or "", keep_blank_values=True)
    kept: dict[str, str] = {name: Unshown(value) for name, value in options if value != _HIDDEN}
    return SERVERS[found[1]], Unshown(found[2] or ""), found[3], kept


def _joined(scheme: str, user: str, place: str, options: dict[str, str]) -> str:
    at = f"{user}@" if user else ""
    return unshown(f"{scheme}://{at}{place}{'?' if options else ''}{urlencode(options)}")
