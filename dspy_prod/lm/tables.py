"""What the tables of a file say: the arguments of an LM or of an embedder, each of the kind it must be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, get_origin

from dspy.clients.backend_selection import CLIENT_KEYS

from dspy_prod.errors import ConfigError, OptionError
from dspy_prod.lm.environment import Sources
from dspy_prod.lm.settings import ARGUMENTS, CANONICAL_KEYS, OPTIONS
from dspy_prod.options import Options
from dspy_prod.privacy.error_text import scrubbed
from dspy_prod.privacy.names import is_secret


class Form(NamedTuple):
    """The arguments that a table may hold.

    Attributes:
        name: whose they are.
        door: where what cannot be written is given.
        kinds: what each holds; `object`: whatever DSPy or the provider makes of it, None: nothing that can be written.
    """

    name: str
    door: str
    kinds: Mapping[str, Any]

    @property
    def known(self) -> list[str]:
        """Those that can be written."""
        return sorted(name for name, kind in self.kinds.items() if kind is not None)


_CALLED: Final[Mapping[str, Any]] = {
    "api_base": str,
    "base_url": str,
    "timeout": float,
    "headers": dict,
    "extra_headers": dict,
    "api_key_env": str,
    "litellm": dict,
}
"""How a model is called."""

LM_FORM: Final = Form(
    "dspy_prod.LM",
    "LM.from_config",
    {**dict.fromkeys(CANONICAL_KEYS - {"messages", "stream"} | CLIENT_KEYS, object), **ARGUMENTS, **_CALLED},
)
EMBEDDER_FORM: Final = Form(
    "dspy_prod.Embedder",
    "dspy_prod.Embedder",
    {
        **dict.fromkeys(CLIENT_KEYS, object),
        **{
            name: ARGUMENTS[name]
            for name in (
                "model", "retry", "num_retries", "breaker", "limit", "cache", "budget", "fallbacks", "prices", "store",
                "namespace", "clock",
            )
        },
        "batch_size": int,
        "dimensions": int,
        **_CALLED,
    },
)  # fmt: skip
"""`cache` is what the embedder calls `caching`: the file has one word for it."""

_FIELDS: Final = [item for options in OPTIONS.values() for item in options.model_fields.items()]
TEXTS: Final = frozenset(
    {"api_key", "api_version", "organization", "project", "custom_llm_provider"}
    | {name for name, kind in LM_FORM.kinds.items() if kind is str}
    | {name for name, option in _FIELDS if option.annotation in (str, str | None)}
)
"""Keys whose environment variables are text even where that reads as JSON, such as a key of digits."""

TABLES: Final = frozenset({"lm", "embedder", "production", "tracking", "logging", "metrics", "alerts"})
"""What a file may hold beside the arguments of one LM."""

WHOLE: Final = (
    "; read a file with [lm.<name>], [embedder.<name>], [production], [tracking], [logging], [metrics] or [alerts] by "
    "dspy_prod.from_config(...)"
)

_WORDS: Final[Mapping[Any, str]] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def arguments_in(
    values: Mapping[str, Any], form: Form, env: Mapping[str, str], sources: Sources, place: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments from one table of them, which stands at `place`.

    Raises:
        ConfigError: a key is unknown or impossible.
    """
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = sources.of(key)
        if key not in form.kinds:
            raise ConfigError(f"{where}: {key}: is no argument of {form.name}{_instead(key, form, place)}")
        if form.kinds[key] is None:
            raise ConfigError(f"{where}: {key}: is an object, not text; pass it to {form.door}(..., {key}=...)")
        if value is None:
            continue
        made = _made(key, form.kinds[key], value, sources)
        _refuse_infinite(key, made, where)
        if key == "api_key_env":
            arguments["api_key"] = _from_environment(made, env, where)
        elif key == "litellm":
            arguments.update(_litellm(made, form, where))
        else:
            arguments[key] = made
    if "api_key_env" in values and "api_key" in values:
        arguments["api_key"] = values["api_key"]  # it can only come from the environment, which wins
    return arguments


def _refuse_infinite(key: str, made: Any, where: str) -> None:
    """What JSON has no number for can be neither sent nor saved."""
    try:
        json.dumps(made, allow_nan=False, default=str)
    except ValueError:
        raise ConfigError(f"{where}: {key}: nan and inf cannot be sent; give a number") from None


def _made(key: str, kind: Any, value: Any, sources: Sources) -> Any:
    """An argument of what is written for it."""
    where, options = sources.of(key), OPTIONS.get(key)
    kind = get_origin(kind) or kind
    if options is not None and kind is options:
        if isinstance(value, bool):
            return value
        if isinstance(value, Mapping):
            return _options(options, value, sources, key)
        raise ConfigError(
            f"{where}: {key}: takes a table [{key}], or {key} = false to switch it off; got {_told(value)}"
        )
    if kind is list and options is not None:
        given = value if isinstance(value, list) else [value]
        if not all(isinstance(item, Mapping) for item in given):
            raise ConfigError(f"{where}: {key}: takes tables, e.g. [[{key}]] with usd = 50")
        return [_options(options, item, sources, key) for item in given]
    types = (int, float) if kind is float else kind
    if kind in _WORDS and (not isinstance(value, types) or (isinstance(value, bool) and kind is not bool)):
        got = f"a {type(value).__name__}" if is_secret(key) else _told(value)
        raise ConfigError(f"{where}: {key}: takes {_WORDS[kind]}, got {got}")
    if options is not None:
        return {str(name): _options(options, item, sources, key, name) for name, item in value.items()}
    if kind is list and not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f'{where}: {key}: takes model names, e.g. ["anthropic/claude-haiku-4-5"]')
    return value


def _options(kind: type[Options], table: Any, sources: Sources, *keys: str) -> Options:
    """A policy's options from its table, which stands under `keys`; the first thing that is wrong is named."""
    name = keys[0] + "".join(f'."{key}"' for key in keys[1:])
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"{sources.of(*keys)}: {name}: takes a table of {', '.join(kind.model_fields)}; got {_told(table)}"
        )
    try:
        made = kind(**table)
    except OptionError as error:
        field = error.field
        place = f"{sources.of(*keys, field)}: [{name}] {field}" if field else f"{sources.of(*keys)}: [{name}]"
        raise ConfigError(f"{place}: {error.problem}") from None
    for field, value in table.items():
        if isinstance(value, (str, bool)) and type(getattr(made, field)) is not type(value):  # pydantic was lenient
            raise ConfigError(f"{sources.of(*keys, field)}: [{name}] {field}: takes a number, got {_told(value)}")
    return made


def _told(value: Any) -> str:
    return scrubbed(repr(value))


def _from_environment(name: str, env: Mapping[str, str], where: str) -> str:
    key = env.get(name)
    if not key:
        raise ConfigError(f"{where}: api_key_env: the environment variable ${name} is not set; set it to the API key")
    return key


def _litellm(table: Mapping[str, Any], form: Form, where: str) -> dict[str, Any]:
    for key in table:
        if key in form.kinds:
            raise ConfigError(f"{where}: litellm.{key}: is an argument of {form.name}; move it out of [litellm]")
    return dict(table)


def _instead(key: str, form: Form, place: tuple[str, ...]) -> str:
    """What may have been meant by a key that is no argument."""
    if key in TABLES:
        return f"; [{key}] is no part of [{'.'.join(place)}]" if place else WHOLE
    near = difflib.get_close_matches(key, form.known, n=2, cutoff=0.6)
    if key in LM_FORM.kinds:
        return "; it is one of an LM" + (f"; did you mean {near[0]!r}?" if near else "")
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; an argument that only LiteLLM understands goes into the table [{'.'.join((*place, 'litellm'))}]"
