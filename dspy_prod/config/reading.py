"""`from_config`: LMs, embedders, production, tracking, logging, metrics and alerts from one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import dspy

from dspy_prod.config.tables import ALERTS, LOGGING, METRICS, PRODUCTION, TEXTS, TRACKING, placed, read_table
from dspy_prod.errors import ConfigError
from dspy_prod.lm.config import read
from dspy_prod.lm.embedder import Embedder
from dspy_prod.lm.environment import Sources
from dspy_prod.lm.lm import LM
from dspy_prod.lm.tables import EMBEDDER_FORM, LM_FORM, TABLES, Form, arguments_in
from dspy_prod.production.module import Production
from dspy_prod.telemetry.logs import enable_logging

T = TypeVar("T")

DEFAULT: Final = "default"
"""The name of the LM whose arguments stand at the top of a file."""

SHARED: Final = frozenset(
    {"retry", "breaker", "limit", "cache", "budget", "prices", "store", "namespace", "timeout", "num_retries"}
)
"""Arguments at the top that hold for every LM and embedder. Where a call goes, and with which key, each says itself."""


@dataclass(frozen=True, eq=False)
class Configured:
    """What a file configured, see `from_config`.

    Attributes:
        lms: the LMs by name; the one whose arguments stand at the top of the file is `"default"`.
        lm: that one, or the first of the file.
        embedders: the embedders by name.

    Example:
        ```python
        config = dspy_prod.from_config("prod.toml")
        print(config.lms["small"].model, config.production(program))
        config.close()
        ```
    """

    lms: Mapping[str, LM]
    embedders: Mapping[str, Embedder]
    _production: Mapping[str, Any] = field(repr=False)
    _sources: Sources = field(repr=False)
    _undo: tuple[Callable[[], None], ...] = field(default=(), repr=False)

    @property
    def lm(self) -> LM:
        return next(iter(self.lms.values()))

    def production(self, program: dspy.Module, **overrides: Any) -> Production:
        """The program in a `dspy_prod.Production`, with the arguments in `[production]`.

        Args:
            program: the program.
            overrides: arguments that win over the file's.

        Raises:
            ConfigError: an impossible argument; the message names the place and the remedy.
        """
        arguments = {**self._production, **overrides}
        try:
            return Production(program, **arguments)
        except ConfigError as error:
            raise placed(error, "production", self._production, self._sources) from None

    def close(self) -> None:
        """Close the LMs and embedders, and turn off what else the file has turned on."""
        for lm in self.lms.values():
            lm.close()
        for embedder in self.embedders.values():
            embedder.close()
        for undo in self._undo:
            undo()


def from_config(path: str | Path | None = None) -> Configured:
    """The LMs and embedders of a TOML file, and the `Production`, tracking, logging, metrics and alerts it describes.

        store = "sqlite:////var/lib/triage/state.db"     # at the top: one LM, or what holds for all of them

        [[budget]]
        usd = 50
        per = "day"

        [lm.small]                          # arguments of dspy_prod.LM, as for LM.from_config
        model = "openai/gpt-4o-mini"
        limit = { rpm = 500 }

        [lm.big]
        model = "openai/gpt-4o"
        api_key_env = "TEAM_KEY"            # the NAME of an environment variable; keys stay out of files

        [embedder.docs]                     # of dspy_prod.Embedder; its `caching` is `cache` here, as of an LM
        model = "openai/text-embedding-3-small"

        [production]                        # of dspy_prod.Production
        name = "triage"
        fallback_response = "We will get back to you."

        [tracking]                          # of dspy_prod.tracking.enable; or: tracking = false
        experiment_name = "triage"

        [logging]                           # of dspy_prod.enable_logging; or: logging = false
        format = "json"

        [metrics]                           # of dspy_prod.metrics.prometheus; or: metrics = false
        port = 9464
        workers = 4                         # processes that read this file: each takes one of the ports 9464 to 9467

        [alerts]                            # of dspy_prod.alerts.webhook
        url_env = "SLACK_WEBHOOK"           # the NAME of an environment variable: the URL is a secret

    All but `[production]` begin at once. A file with `model` at the top has one LM of these arguments, alone or beside
    others. Retry, breaker, limit, cache, budget, prices, store, namespace and timeout at the top hold for every LM and
    embedder that does not say otherwise: a budget there is one budget for all of them.

    Environment variables win over the file: `DSPY_PROD__LM__BIG__MODEL=openai/gpt-4.1`,
    `DSPY_PROD__PRODUCTION__NAME=triage`, `DSPY_PROD__TRACKING=false`.

    Args:
        path: the file; None for environment variables alone.

    Returns:
        A `Configured`: `.lms["big"]`, `.lm`, `.embedders["docs"]`, `.production(program)`.

    Raises:
        ConfigError: a key is unknown or impossible; the message names file, line or variable, and the remedy. Nothing
            has begun then.
        StoreUnavailableError: a store cannot be used.

    Example:
        ```python
        config = dspy_prod.from_config("prod.toml")
        dspy.configure(lm=config.lm)
        service = config.production(program)
        ```
    """
    told = told_by(path)
    tracking, logging, metrics, alerts, sources = told.tracking, told.logging, told.metrics, told.alerts, told.sources
    lms = MappingProxyType({name: LM(**given) for name, given in told.lms.items()})
    embedders = MappingProxyType({name: Embedder(**given) for name, given in told.embedders.items()})
    undo: list[Callable[[], None]] = []
    try:
        if logging is not None:
            undo.append(_begun("logging", enable_logging, logging, sources))
        if tracking is not None:
            from dspy_prod.tracking import enable

            undo.append(_begun("tracking", enable, tracking, sources))
        if metrics is not None:
            from dspy_prod.metrics import prometheus

            undo.append(_begun("metrics", prometheus, metrics, sources).close)
        if alerts is not None:
            from dspy_prod.alerts import webhook

            undo.append(_begun("alerts", webhook, alerts, sources).close)
    except BaseException:
        for end in undo:
            end()
        raise
    return Configured(lms, embedders, MappingProxyType(told.production), sources, tuple(reversed(undo)))


@dataclass(frozen=True, eq=False)
class Told:
    """What a file and the environment tell, of which nothing has begun.

    Attributes:
        lms, embedders: the arguments of each, by name.
        production: those of a `Production`.
        tracking, logging, metrics, alerts: those of what begins with the file; None where it does not.
    """

    lms: Mapping[str, dict[str, Any]]
    embedders: Mapping[str, dict[str, Any]]
    production: dict[str, Any]
    tracking: dict[str, Any] | None
    logging: dict[str, Any] | None
    metrics: dict[str, Any] | None
    alerts: dict[str, Any] | None
    sources: Sources


def told_by(path: str | Path | None) -> Told:
    """Read a file and the environment.

    Raises:
        ConfigError: see `from_config`.
    """
    values, env, sources = read(path, os.environ, TEXTS)
    return Told(
        _lms(values, env, sources),
        _embedders(values, env, sources),
        read_table("production", PRODUCTION, values.get("production", {}), sources),
        _optional("tracking", TRACKING, values, sources),
        _optional("logging", LOGGING, values, sources),
        _optional("metrics", METRICS, values, sources),
        _alerts(_optional("alerts", ALERTS, values, sources), sources),
        sources,
    )


def _begun(name: str, begin: Callable[..., T], given: Mapping[str, Any], sources: Sources) -> T:
    try:
        return begin(**given)
    except ConfigError as error:
        raise placed(error, name, given, sources) from None


def _alerts(given: dict[str, Any] | None, sources: Sources) -> dict[str, Any] | None:
    """The arguments of the webhook, with the URL that a variable holds."""
    if given is None:
        return None
    name = given.pop("url_env", None)
    if name is None:
        raise ConfigError(
            f'{sources.of("alerts")}: [alerts] url_env: is missing; add url_env = "SLACK_WEBHOOK", the name of an '
            "environment variable with the URL"
        )
    url = os.environ.get(name)
    if not url:
        raise ConfigError(f"{sources.of('alerts', 'url_env')}: [alerts] url_env: ${name} is not set, or empty")
    return {"url": url, **given}


def _optional(name: str, kinds: Any, values: Mapping[str, Any], sources: Sources) -> dict[str, Any] | None:
    """The arguments in a table; None when there is none, or `false` instead."""
    given = values.get(name, False)
    if isinstance(given, bool):
        return {} if given else None
    return read_table(name, kinds, given, sources)


def _lms(values: Mapping[str, Any], env: Mapping[str, str], sources: Sources) -> dict[str, dict[str, Any]]:
    """Arguments of each LM, by name."""
    top = {key: value for key, value in values.items() if key not in TABLES}
    several = _named("lm", "LM", values, sources)
    found: dict[str, dict[str, Any]] = {}
    if "model" in top or not several:
        found[DEFAULT] = _with_model(arguments_in(top, LM_FORM, env, sources), sources)
    for key in top.keys() - SHARED if several and "model" not in top else ():
        arguments_in({key: top[key]}, LM_FORM, env, sources)  # an unknown one is told as such
        raise ConfigError(
            f"{sources.of(key)}: {key}: belongs to one LM; move it into [lm.{next(iter(several))}], or name a model "
            "beside it"
        )
    for name, table in several.items():
        if name == DEFAULT:
            raise ConfigError(
                f"{sources.of('lm', name)}: lm.{name}: is the LM at the top of the file; choose another name"
            )
        found[name] = _of_one(LM_FORM, top, table, env, sources, "lm", name)
    return found


def _embedders(values: Mapping[str, Any], env: Mapping[str, str], sources: Sources) -> dict[str, dict[str, Any]]:
    """Arguments of each embedder, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, table in _named("embedder", "embedder", values, sources).items():
        given = _of_one(EMBEDDER_FORM, values, table, env, sources, "embedder", name)
        found[name] = {"caching" if key == "cache" else key: value for key, value in given.items()}
    return found


def _of_one(
    form: Form, top: Mapping[str, Any], table: Mapping[str, Any], env: Mapping[str, str], sources: Sources, *place: str
) -> dict[str, Any]:
    """Arguments of what stands in a table of its own, with those at the top that hold for it too."""
    retries = {"retry", "num_retries"} if {"retry", "num_retries"} & table.keys() else set()
    shared = {key: value for key, value in top.items() if key in SHARED - retries}
    given = arguments_in({**shared, **table}, form, env, sources.within(*place), place)
    return _with_model(given, sources, *place)


def _named(kind: str, what: str, values: Mapping[str, Any], sources: Sources) -> dict[str, Mapping[str, Any]]:
    """The tables `[<kind>.<name>]`."""
    tables = values.get(kind, {})
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise ConfigError(f"{sources.of(kind)}: {kind}: takes a table for each {what}, such as {_SUCH_AS[kind]}")
    written = [name for name in tables if not sources.of(kind, name).startswith("$")]
    for name in tables:
        where = sources.of(kind, name)
        if not (name.isascii() and name.isidentifier() and name == name.lower() and "__" not in name):
            raise ConfigError(
                f"{where}: {kind}.{name}: a name has small letters, digits and '_', so that a variable can name it too"
            )
        if written and name not in written:
            raise ConfigError(f"{where}: there is no [{kind}.{name}] in the file; it has {', '.join(written)}")
    return dict(tables)


_SUCH_AS: Final = {
    "lm": '[lm.big] with model = "openai/gpt-4o"; the arguments of a single LM stand at the top of the file',
    "embedder": '[embedder.docs] with model = "openai/text-embedding-3-small"',
}


def _with_model(arguments: dict[str, Any], sources: Sources, *place: str) -> dict[str, Any]:
    if "model" not in arguments:
        table = f"[{'.'.join(place)}] " if place else ""
        model = "openai/text-embedding-3-small" if place[:1] == ("embedder",) else "openai/gpt-4o-mini"
        raise ConfigError(f'{sources.of(*place)}: {table}model: is missing; add model = "{model}"')
    return arguments
