"""`programs` and `versions`: what is published."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from dspy_prod.registry.aliases.journal import Journal
from dspy_prod.registry.aliases.projection import USUAL, alias_version
from dspy_prod.registry.errors import UnknownVersionError
from dspy_prod.registry.names import checked_name
from dspy_prod.registry.published.manifest import KIND, PROGRAM, ProgramVersion, is_program, version_of
from dspy_prod.registry.server import PAGE, server_at

_FILTER: Final = f"tags.`{KIND}` = '{PROGRAM}'"


def programs(*, tracking_uri: str | None = None) -> list[str]:
    """The names of all published programs.

    Raises:
        RegistryUnavailableError: MLflow did not answer.
    """
    server = server_at(tracking_uri)
    names: list[str] = []
    token: str | None = None
    while True:
        page = server.read(partial(_page, token))
        names += [prompt.name for prompt in page]
        token = page.token
        if not token:
            return sorted(names)


def versions(name: str, *, tracking_uri: str | None = None) -> list[ProgramVersion]:
    """The versions of a program with their aliases, newest first.

    Raises:
        UnknownVersionError: there is no such program.
        RegistryUnavailableError: MLflow did not answer.
    """
    server = server_at(tracking_uri)
    found = [prompt for prompt in server.versions(checked_name(name)) if is_program(prompt)]
    if not found:
        raise UnknownVersionError(f"there is no program {name!r} in MLflow at {server.place}; publish it first")
    pointing: dict[int, list[str]] = {}
    for alias in sorted({*USUAL, *Journal(server, name).read().aliases}):
        version = alias_version(server, name, alias)
        if version is not None:
            pointing.setdefault(version, []).append(alias)
    return [version_of(prompt, tuple(pointing.get(int(prompt.version), ()))) for prompt in found]


def _page(token: str | None, client: Any) -> Any:
    return client.search_prompts(_FILTER, PAGE, None, token)
