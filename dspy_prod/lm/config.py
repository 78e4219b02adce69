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
import os
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from dspy_prod.errors import ConfigError
from dspy_prod.lm.environment import NAMED, PREFIX, Sources, lines_of, override
from dspy_prod.lm.settings import OPTIONS
from dspy_prod.lm.tables import LM_FORM, TEXTS, arguments_in
from dspy_prod.privacy.names import bare_url, is_secret
from dspy_prod.privacy.unshown import Unshown, unshown


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
    return arguments_in(values, LM_FORM, env, sources)


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
    override(values, env, sources, texts=TEXTS.union(texts))
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
    above = above[2:] if above[:1] and above[0] in NAMED else above
    options = OPTIONS.get(above[0]) if len(above) == 1 else None
    known = LM_FORM.known if not above else () if options is None else options.model_fields
    return bool(difflib.get_close_matches(key, known, n=1, cutoff=0.85))


def _refuse_secrets(values: Mapping[str, Any], sources: Sources, *above: str) -> None:
    """Secrets do not belong in a file that is kept with the code."""
    for key, value in values.items():
        where = sources.of(*above, key)
        place = ".".join((*above, key))
        variable = f"${PREFIX}{'__'.join((*above, key)).upper()}"
        if isinstance(value, Mapping) and key not in ("prices", "redact"):
            _refuse_secrets(value, sources, *above, key)
        elif key == "api_key" and (not above or (above[0] in NAMED and len(above) == 2)):
            raise ConfigError(
                f"{where}: api_key: a key does not belong in a file; set an environment variable and name it here: "
                'api_key_env = "MY_KEY"'
            )
        elif is_secret(key) and key != "api_key_env" and not _is_slip(key, above):
            hint = (
                f"set ${PREFIX}{above[0].upper()} to a JSON table"
                if above and above[0] not in NAMED
                else f"set {variable}"
            )
            raise ConfigError(f"{where}: {place}: a secret does not belong in a file; {hint} instead")
        elif isinstance(value, str) and "://" in value and bare_url(value) != value:
            raise ConfigError(
                f"{where}: {place}: a password does not belong in a file; set {variable} to the whole URL"
            )
