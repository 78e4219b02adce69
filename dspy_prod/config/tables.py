"""The tables beside the LMs: which keys they have, and of what kind."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.lm.environment import Sources
from dspy_prod.privacy.error_text import scrubbed

Kinds = Mapping[str, tuple[type, ...]]

_NUMBER: Final = (int, float)

PRODUCTION: Final[Kinds] = {
    "name": (str,),
    "fallback_response": (str, dict),
    "catch": (str,),
    "deadline": _NUMBER,
    "priority": (str,),
    "tags": (dict,),
    "follow": (str,),
    "refresh": _NUMBER,
    "unguarded": (str,),
}
TRACKING: Final[Kinds] = {
    "experiment_name": (str,),
    "tracking_uri": (str,),
    "sample": _NUMBER,
    "content": (str,),
    "redact": (dict,),
    "autolog": (bool,),
    "queue_size": (int,),
    "exit_timeout": _NUMBER,
}
LOGGING: Final[Kinds] = {
    "level": (str, int),
    "format": (str,),
    "prompts": (bool,),
    "logger": (str,),
    "redact": (bool,),
}
METRICS: Final[Kinds] = {
    "port": (int,),
    "host": (str,),
    "workers": (int,),
    "attributes": (list,),
    "most_values": (int,),
}
ALERTS: Final[Kinds] = {
    "url_env": (str,),
    "events": (list,),
    "every": _NUMBER,
    "format": (str,),
    "timeout": _NUMBER,
}

TEXTS: Final = frozenset(
    {
        key
        for kinds in (PRODUCTION, TRACKING, LOGGING, METRICS, ALERTS)
        for key, allowed in kinds.items()
        if allowed == (str,)
    }
)
"""Keys that are text, also where an environment variable of theirs reads as JSON."""

_WORDS: Final[Mapping[type, str]] = {
    str: "text", dict: "a table", list: "a list", bool: "true or false", int: "a whole number", float: "a number",
}  # fmt: skip


def read_table(name: str, kinds: Kinds, given: Any, sources: Sources) -> dict[str, Any]:
    """The arguments in a table.

    Raises:
        ConfigError: a key is unknown, or of another kind; the message names the place and what is allowed.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{sources.of(name)}: {name}: takes a table [{name}], got {scrubbed(repr(given))}")
    for key, value in given.items():
        where = f"{sources.of(name, key)}: [{name}] {key}"
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(kinds)}"
            raise ConfigError(f"{where}: is unknown; {hint}")
        allowed = kinds[key]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            words = "a number" if allowed == _NUMBER else " or ".join(_WORDS[kind] for kind in allowed)
            raise ConfigError(f"{where}: takes {words}, got {scrubbed(repr(value))}")
    return dict(given)


def placed(error: Exception, name: str, given: Mapping[str, Any], sources: Sources) -> ConfigError:
    """An error of what a table configures, with the place of the key it names."""
    text = str(error)
    key = next((key for key in given if text.startswith(f"{key}=") or f"({key}=" in text), None)
    where = sources.of(name) if key is None else sources.of(name, key)
    return ConfigError(f"{where}: [{name}]{'' if key is None else f' {key}'}: {text}")
