"""`promote` and `rollback`: aliases move by compare-and-set, and every move is on record."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Mapping
from typing import Any, Final

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.aliases.gates import Gate, refused_error
from dspy_prod.registry.aliases.journal import AuditEntry, Journal, Request
from dspy_prod.registry.aliases.projection import PREVIOUS, PRODUCTION, project, settled
from dspy_prod.registry.errors import PromotionConflictError, RegistryError
from dspy_prod.registry.names import checked_name
from dspy_prod.registry.published import provenance
from dspy_prod.registry.published.manifest import ProgramVersion, reference_to, version_of
from dspy_prod.registry.server import Server, server_at
from dspy_prod.telemetry.events import BUS

_ALIAS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")


def promote(
    name: str,
    version: int | str | ProgramVersion,
    *,
    alias: str = PRODUCTION,
    expected: int | ProgramVersion | None = None,
    gate: Gate | None = None,
    program: dspy.Module | None = None,
    force: bool = False,
    reason: str | None = None,
    by: str | None = None,
    evidence: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
) -> AuditEntry:
    """Point an alias to a version.

    Promoting to the version that the alias has already does nothing, and the entry's `outcome` says `unchanged`. Of
    two promoters that expect the same version, exactly one wins, whatever they run on.

    Args:
        name: the program.
        version: its number, a `ProgramVersion`, or a reference such as `"triage@staging"`.
        alias: `production`, `canary`, `staging`, or one of your own.
        expected: the version the alias must have, else nothing is moved; 0: it must not exist yet. None: whatever it
            has is replaced; with a gate, what it had when the evaluation began.
        gate: what the version has to pass first; its report becomes evidence of the move.
        program: the program from the code, on a copy of which the gate is evaluated; needed with `gate`.
        force: move although the gate is inconclusive; needs a `reason`. A gate that fails cannot be overruled.
        reason: why, for the record.
        by: who, for the record; default: user@machine.
        evidence: what speaks for it, as JSON has it, for the record.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Returns:
        The audit entry.

    Raises:
        PromotionConflictError: the alias does not have the expected version.
        PromotionRefusedError: the gate failed, had an error, or is inconclusive and `force` is not given.
        UnknownVersionError: there is no such version.
        RegistryUnavailableError: MLflow did not answer; promote again to be sure.
        ConfigError: an impossible argument; the message names it.

    Example:
        ```python
        registry.promote("triage", second, expected=first, reason="3 points better")
        ```
    """
    tracking_uri = unshown(tracking_uri)
    check_alias(name, alias)
    if force and not reason:
        raise ConfigError("promote(force=True) needs a reason=, which is kept in the audit log")
    if gate is not None and program is None:
        raise ConfigError("promote(gate=...) needs program=, the program from your code to evaluate the version with")
    server = server_at(tracking_uri)
    chosen = find_version(server, name, version)
    wanted = _number(expected)
    journal = Journal(server, name)
    replay = settled(server, name, alias, journal)
    before = replay.version(alias)
    if wanted is not None and wanted != (before or 0):
        raise conflict_error(name, alias, wanted, before)
    who = by or provenance.author()
    if before == chosen.version:
        return _nothing_to_do("promote", alias, chosen.version, who, reason)
    found: dict[str, Any] = {**(evidence or {}), "metrics": dict(chosen.metrics)}
    forced = False
    if gate is not None:
        report = gate.check(server, chosen, program)
        found["gate"] = report.to_dict()
        forced = report.result == "inconclusive" and force
        if report.result != "pass" and not forced:
            journal.append(Request("refused", alias, chosen.version, None, who, reason, evidence=found))
            raise refused_error(alias, chosen, report)
        wanted = before or 0  # the verdict is about what the alias had then; an evaluation may take hours
    request = Request("promote", alias, chosen.version, wanted, who, reason, forced, found)
    return carry_out(server, name, journal, request)


def rollback(
    name: str,
    *,
    alias: str = PRODUCTION,
    to: int | ProgramVersion | None = None,
    expected: int | ProgramVersion | None = None,
    reason: str | None = None,
    by: str | None = None,
    evidence: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
) -> AuditEntry:
    """Take the last promotion of an alias back: at once, and without an evaluation.

    It is idempotent. A promotion is taken back once: a second call finds that the last move was a rollback already,
    and does nothing. To go further back, name the version with `to`. What the alias had before is in the journal on
    the server, so any process can do it.

    Args:
        name: the program.
        alias: the alias.
        to: the version to go back to; default: the one before the last promotion.
        expected: the version to get away from. If the alias has been rolled back from it, nothing is done; if it was
            promoted to another one meanwhile, that is a conflict.
        reason, by, evidence, tracking_uri: as in `promote`.

    Returns:
        The audit entry.

    Raises:
        RegistryError: there is nothing to go back to.
        PromotionConflictError: somebody promoted another version meanwhile; nothing was moved.
        UnknownVersionError, RegistryUnavailableError, ConfigError: as in `promote`.

    Example:
        ```python
        registry.promote("triage", second)
        registry.rollback("triage", reason="users complain")
        ```
    """
    tracking_uri = unshown(tracking_uri)
    check_alias(name, alias)
    server = server_at(tracking_uri)
    journal = Journal(server, name)
    replay = settled(server, name, alias, journal)
    now, last, who = replay.version(alias), replay.last(alias), by or provenance.author()
    if last is None:
        raise RegistryError(f"{name} has no alias {alias!r} that was ever promoted, so there is nothing to roll back")
    wanted = _number(expected)
    rolled_back = last.action == "rollback"
    if wanted is not None and wanted != now and not (rolled_back and last.from_version == wanted):
        raise conflict_error(name, alias, wanted, now)
    target = _number(to) if to is not None else replay.previous(alias)
    if (to is None and rolled_back) or target == now:
        return _nothing_to_do("rollback", alias, now, who, reason)
    if target is None:
        raise RegistryError(
            f"{name}@{alias} has had no other version than {now}; publish a repaired version and promote it, or name "
            "one with rollback(to=...)"
        )
    find_version(server, name, target)
    try:
        request = Request("rollback", alias, target, now or 0, who, reason, evidence=evidence or {})
        return carry_out(server, name, journal, request)
    except PromotionConflictError as error:
        if error.actual == target:  # somebody else rolled back at the same moment
            return _nothing_to_do("rollback", alias, target, who, reason)
        raise


def carry_out(server: Server, name: str, journal: Journal, request: Request) -> AuditEntry:
    """Write a request into the journal, and let MLflow's alias follow if it won; raises as `promote`."""
    entry, replay = journal.append(request)
    if entry.outcome == "conflict":
        assert request.expected is not None
        raise conflict_error(name, entry.alias, request.expected, entry.from_version)
    project(server, name, entry.alias, journal, replay)
    if entry.moved and BUS.active:
        BUS.emit(
            "promotion", time.time(), program=name, action=entry.action, alias=entry.alias,
            from_version=entry.from_version, to_version=entry.to_version, by=entry.by,
        )  # fmt: skip
    return entry


def check_alias(name: str, alias: str) -> None:
    """Refuse names of programs and aliases that MLflow does not take: a ConfigError that names the alternative."""
    checked_name(name)
    if not isinstance(alias, str) or _ALIAS.fullmatch(alias) is None or re.fullmatch(r"latest|v\d+", alias):
        raise ConfigError(f"alias={alias!r}: use 'production', 'canary', 'staging', or letters, digits, '-' and '_'")
    if alias == PREVIOUS:
        raise ConfigError("the alias 'previous' follows 'production' by itself; promote or roll back 'production'")


def find_version(server: Server, name: str, version: int | str | ProgramVersion) -> ProgramVersion:
    """The version of a program that a number or a reference means; raises as `promote`."""
    reference = reference_to(name, version)
    if reference.name != name:
        raise ConfigError(f"{reference} is a version of {reference.name!r}, not of {name!r}")
    return version_of(server.prompt(reference))


def _number(version: int | ProgramVersion | None) -> int | None:
    return version.version if isinstance(version, ProgramVersion) else version


def _nothing_to_do(action: Any, alias: str, version: int | None, by: str, reason: str | None) -> AuditEntry:
    now = dt.datetime.now(dt.timezone.utc)
    return AuditEntry(action, "unchanged", alias, version, version, by, now, reason)


def conflict_error(name: str, alias: str, expected: int, actual: int | None) -> PromotionConflictError:
    """The alias was moved by somebody else."""
    has = "does not exist" if actual is None else f"has version {actual}"
    return PromotionConflictError(
        f"{name}@{alias} was expected to have {f'version {expected}' if expected else 'no version'}, but {has}; "
        f"look at dspy_prod.registry.history({name!r}) and decide again",
        alias=alias, expected=expected, actual=actual,
    )  # fmt: skip
