"""What is published, where its aliases point, and how they came to: `programs`, `versions` and `history`."""

from __future__ import annotations

import logging
from typing import Final

from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.aliases.journal import Journal
from dspy_prod.registry.aliases.listed import History, Versions
from dspy_prod.registry.aliases.projection import USUAL, alias_version
from dspy_prod.registry.errors import RegistryError, UnknownVersionError
from dspy_prod.registry.names import checked_name
from dspy_prod.registry.published.manifest import KIND, PROGRAM, is_program, version_of
from dspy_prod.registry.server import PAGE, Server, server_at

_FILTER: Final = f"tags.`{KIND}` = '{PROGRAM}'"

_log = logging.getLogger("dspy_prod")


def history(name: str, *, alias: str | None = None, tracking_uri: str | None = None) -> History:
    """Every move of the program's aliases and every attempt at one, newest first.

    Args:
        name: the program.
        alias: only this one.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Raises:
        UnknownVersionError: there is no such program.
        RegistryUnavailableError: MLflow did not answer.

    Example:
        ```python
        for entry in registry.history("triage"):
            print(entry)
        ```
    """
    tracking_uri = unshown(tracking_uri)
    checked_name(name)
    server = server_at(tracking_uri)
    if server.read(lambda client: client.get_prompt(name)) is None:
        raise _unpublished_error(name, server)
    entries = Journal(server, name).read().entries
    return History((entry for entry in reversed(entries) if alias is None or entry.alias == alias), name)


def programs(*, tracking_uri: str | None = None) -> list[str]:
    """The names of all published programs.

    Raises:
        RegistryUnavailableError: MLflow did not answer.

    Example:
        ```python
        print(registry.programs())
        ```
    """
    tracking_uri = unshown(tracking_uri)
    pages = server_at(tracking_uri).pages(lambda token, client: client.search_prompts(_FILTER, PAGE, None, token))
    return sorted(prompt.name for page in pages for prompt in page)


def versions(name: str, *, tracking_uri: str | None = None) -> Versions:
    """The versions of a program with their aliases, newest first. One that was tampered with is left out, and told of.

    Raises:
        UnknownVersionError: there is no such program.
        RegistryUnavailableError: MLflow did not answer.

    Example:
        ```python
        for version in registry.versions("triage"):
            print(version.version, version.metrics)
        ```
    """
    tracking_uri = unshown(tracking_uri)
    server = server_at(tracking_uri)
    found = [prompt for prompt in server.versions(checked_name(name)) if is_program(prompt)]
    if not found:
        raise _unpublished_error(name, server)
    pointing: dict[int, list[str]] = {}
    for alias in sorted({*USUAL, *Journal(server, name).read().aliases}):
        version = alias_version(server, name, alias)
        if version is not None:
            pointing.setdefault(version, []).append(alias)
    listed = []
    for prompt in found:
        try:
            listed.append(version_of(prompt, tuple(pointing.get(int(prompt.version), ()))))
        except RegistryError as error:  # the others are as good as ever
            _log.warning("A version of %s is left out: %s", name, error)
    return Versions(listed, f"Versions of {name}")


def _unpublished_error(name: str, server: Server) -> UnknownVersionError:
    return UnknownVersionError(f"there is no program {name!r} in MLflow at {server.place}; publish it first")
