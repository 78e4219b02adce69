"""`programs` and `versions`: what is published."""

from __future__ import annotations

from typing import Final

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
    pages = server_at(tracking_uri).pages(lambda token, client: client.search_prompts(_FILTER, PAGE, None, token))
    return sorted(prompt.name for page in pages for prompt in page)


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
