"""LM arguments from a TOML file and from environment variables, for `dspy_prod.LM.from_config("prod.toml")`.

Top-level keys are the arguments of `dspy_prod.LM`; policies are tables of their options. Durations are seconds.

    model = "openai/gpt-4o-mini"
    temperature = 0.0
    max_tokens = 500
    timeout = 20
    api_key_env = "TEAM_OPENAI_KEY"          # the NAME of an environment variable; keys themselves stay out of files
    fallbacks = ["anthropic/claude-haiku-4-5"]
    store = "sqlite:////var/lib/triage/state.db"
    namespace = "triage"

    [retry]
    attempts = 3

    [breaker]                                # or: breaker = false
    recovery_timeout = 60

    [limit]
    rpm = 500
    tpm = 200_000

    [cache]                                  # or: cache = false
    ttl = 300

    [[budget]]                               # one such table for each budget
    usd = 50
    per = "day"

    [prices."openai/my-model"]
    input = 0.15                             # USD per million tokens
    output = 0.60

    [litellm]                                # arguments that only LiteLLM understands
    aws_region_name = "eu-central-1"

Environment variables win over the file: `DSPY_PROD__MODEL=openai/gpt-4o`, `DSPY_PROD__LIMIT__RPM=500`,
`DSPY_PROD__BUDGET__USD=5` (with several budgets `DSPY_PROD__BUDGET__0__USD`), `DSPY_PROD__BREAKER=false`. Values are
JSON, or text where they are not; an empty one counts as not set.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, get_origin

from dspy.clients.backend_selection import CLIENT_KEYS

from dspy_prod.errors import ConfigError, OptionError
from dspy_prod.lm.environment import PREFIX, Sources, lines_of, override
from dspy_prod.lm.settings import ARGUMENTS, CANONICAL_KEYS, OPTIONS
from dspy_prod.options import Options
from dspy_prod.privacy.error_text import scrubbed
from dspy_prod.privacy.names import bare_url, is_secret
from dspy_prod.privacy.unshown import Unshown, unshown

_KINDS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(CANONICAL_KEYS - {"messages", "stream"} | CLIENT_KEYS, object),
    **ARGUMENTS,
    "api_base": str,
    "base_url": str,
    "timeout": float,
    "headers": dict,
    "extra_headers": dict,
    "api_key_env": str,
    "litellm": dict,
}
"""What each key of a file holds; `object`: whatever DSPy or the provider makes of it."""

_KNOWN: Final = frozenset(name for name, kind in _KINDS.items() if kind is not None)
_FIELDS: Final = [item for options in OPTIONS.values() for item in options.model_fields.items()]
_TEXTS: Final = frozenset(
    {"api_key", "api_version", "organization", "project", "custom_llm_provider"}
    | {name for name, kind in _KINDS.items() if kind is str}
    | {name for name, option in _FIELDS if option.annotation in (str, str | None)}
)
"""Keys whose environment variables are text even where that reads as JSON, such as a key of digits."""

TABLES: Final = frozenset({"lm", "production", "tracking", "logging", "metrics", "alerts"})
"""What a file may hold beside the arguments of one LM."""

WHOLE: Final = (
    "; read a file with [lm.<name>], [production], [tracking], [logging], [metrics] or [alerts] by "
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


def load_config(path: str | Path | None, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments for `dspy_prod.LM`.

    Args:
        path: the TOML file; None for environment variables alone.
        env: the environment.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or impossible; the message names the place and what to
            do.
    """
    env = {name: Unshown(value) for name, value in env.items()}  # an error reporter shows the locals of each frame
    values, env, sources = read(path, env)
    return lm_arguments(values, env, sources)


def read(
    path: str | Path | None, env: Mapping[str, str], texts: Iterable[str] = ()
) -> tuple[dict[str, Any], Mapping[str, str], Sources]:
    """What file and environment say, the environment so that it does not show itself, and where each key came from.

    Args:
        path: the TOML file; None for environment variables alone.
        env: the environment.
        texts: further keys that are text, also where their variable reads as JSON.

    Raises:
        ConfigError: the file cannot be read, or there is a secret in it.
    """
    env = {name: Unshown(value) for name, value in env.items()}  # an error reporter shows the locals of each frame
    values: dict[str, Any] = {}
    sources = Sources("")
    if path is not None:
        values, text = _read(Path(path))
        sources = Sources(str(path), lines_of(text))
        _refuse_secrets(values, sources)
    override(values, env, sources, texts=_TEXTS.union(texts))
    return values, env, sources


def _read(path: Path) -> tuple[dict[str, Any], str]:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text: str = Unshown(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = unshown(toml.loads(text))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (looked from {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check that it is a file you may read") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number may have too many digits, a table be too deep
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    return values, text


def _is_slip(key: str, above: tuple[str, ...]) -> bool:
    """Whether a name that sounds like a secret's is a misspelt option, such as `max_token`; that is told later."""
    above = above[2:] if above[:1] == ("lm",) else above
    options = OPTIONS.get(above[0]) if len(above) == 1 else None
    known = _KNOWN if not above else () if options is None else options.model_fields
    return bool(difflib.get_close_matches(key, known, n=1, cutoff=0.85))


def _refuse_secrets(values: Mapping[str, Any], sources: Sources, *above: str) -> None:
    """Secrets do not belong in a file that is kept with the code."""
    for key, value in values.items():
        where = sources.of(*above, key)
        place = ".".join((*above, key))
        variable = f"${PREFIX}{'__'.join((*above, key)).upper()}"
        if isinstance(value, Mapping) and key not in ("prices", "redact"):
            _refuse_secrets(value, sources, *above, key)
        elif key == "api_key" and (not above or (above[0] == "lm" and len(above) == 2)):
            raise ConfigError(
                f"{where}: api_key: a key does not belong in a file; set an environment variable and name it here: "
                'api_key_env = "MY_KEY"'
            )
        elif is_secret(key) and key != "api_key_env" and not _is_slip(key, above):
            hint = (
                f"set ${PREFIX}{above[0].upper()} to a JSON table" if above and above[0] != "lm" else f"set {variable}"
            )
            raise ConfigError(f"{where}: {place}: a secret does not belong in a file; {hint} instead")
        elif isinstance(value, str) and "://" in value and bare_url(value) != value:
            raise ConfigError(
                f"{where}: {place}: a password does not belong in a file; set {variable} to the whole URL"
            )


def lm_arguments(values: Mapping[str, Any], env: Mapping[str, str], sources: Sources) -> dict[str, Any]:
    """Arguments of `dspy_prod.LM` from one table of them.

    Raises:
        ConfigError: a key is unknown or impossible.
    """
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = sources.of(key)
        if key not in _KINDS:
            hint = WHOLE if key in TABLES else _closest(key, _KNOWN)
            raise ConfigError(f"{where}: {key}: is no argument of dspy_prod.LM{hint}")
        if key not in _KNOWN:
            raise ConfigError(f"{where}: {key}: is an object, not text; pass it to LM.from_config(..., {key}=...)")
        if value is None:
            continue
        made = _made(key, value, sources)
        _refuse_infinite(key, made, where)
        if key == "api_key_env":
            arguments["api_key"] = _from_environment(made, env, where)
        elif key == "litellm":
            arguments.update(_litellm(made, where))
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


def _made(key: str, value: Any, sources: Sources) -> Any:
    """An argument of what is written for it."""
    where, options = sources.of(key), OPTIONS.get(key)
    kind = get_origin(_KINDS[key]) or _KINDS[key]
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


def _litellm(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in table:
        if key in _KINDS:
            raise ConfigError(f"{where}: litellm.{key}: is an argument of dspy_prod.LM; move it to the top of the file")
    return dict(table)


def _closest(name: str, known: Iterable[str]) -> str:
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=2, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if len(choices) > 20:
        return "; an argument that only LiteLLM understands goes into the table [litellm]"
    return f"; it has {', '.join(choices)}"
