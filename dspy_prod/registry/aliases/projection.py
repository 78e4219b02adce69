"""MLflow's aliases as a projection of the journal: finished when broken off, and noted when moved by other hands."""

from __future__ import annotations

import time
from typing import Final

from dspy_prod.registry.aliases.journal import AuditEntry, Journal, Replay, Request
from dspy_prod.registry.errors import UnknownVersionError
from dspy_prod.registry.names import Reference
from dspy_prod.registry.published.copies import MOVES
from dspy_prod.registry.published.follow import look_at
from dspy_prod.registry.server import Server

PRODUCTION: Final = "production"
PREVIOUS: Final = "previous"
"""The alias that shows what a rollback of `production` goes back to; it moves by itself."""

USUAL: Final = ("production", "canary", "staging", PREVIOUS)
SETTLING: Final = 0.2
"""Seconds after which an alias that another promoter is just moving is looked at again."""


def alias_version(server: Server, name: str, alias: str) -> int | None:
    """What an alias of MLflow's has, None when there is no such alias."""
    try:
        return int(server.prompt(Reference(name, alias=alias)).version)
    except UnknownVersionError:
        return None


def project(server: Server, name: str, alias: str, journal: Journal, replay: Replay) -> None:
    """Let MLflow's alias follow the journal. Whoever is late finds that the journal went on, and follows it.

    Raises:
        RegistryUnavailableError: MLflow did not answer; the move is on record, and the next promoter finishes it.
    """
    while True:
        entry = replay.last(alias)
        if entry is None:
            return
        _point(server, name, alias, replay.version(alias))
        if alias == PRODUCTION:
            _point(server, name, PREVIOUS, replay.previous(alias))
        replay = journal.read()
        if replay.last(alias) == entry:
            journal.confirm(entry)
            return


def _point(server: Server, name: str, alias: str, version: int | None) -> None:
    reference = f"{name}@{alias}"
    try:
        if version is not None:
            server.write(lambda client: client.set_prompt_alias(name, alias, version))
        elif alias_version(server, name, alias) is not None:
            server.write(lambda client: client.delete_prompt_alias(name, alias))
    finally:  # also when it is unknown whether it was moved
        MOVES[reference] = object()
    look_at(reference)


def settled(server: Server, name: str, alias: str, journal: Journal) -> Replay:
    """The journal, once it and MLflow's alias agree.

    A move that was broken off is finished, and one that was made in MLflow itself is noted in the journal.
    """
    drift: tuple[int | None, AuditEntry | None] | None = None
    while True:
        shown = alias_version(server, name, alias)
        replay = journal.read()
        if not replay.is_projected(alias):  # also when it has its version, for `previous` may not have followed yet
            project(server, name, alias, journal, replay)
        elif shown == replay.version(alias):
            return replay
        elif drift == (shown, replay.last(alias)):
            request = Request(
                "moved", alias, shown, replay.version(alias) or 0, "unknown", "moved in MLflow, not by dspy_prod"
            )
            entry, replay = journal.append(request)
            if entry.moved:
                journal.confirm(entry)
        else:  # perhaps somebody is just moving it
            drift = (shown, replay.last(alias))
            time.sleep(SETTLING)
