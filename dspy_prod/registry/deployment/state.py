"""How far a deployment is: read from the journal, so that any machine can continue what another one began.

Each move of a deployment bears its id, its stages, what the aliases had at its begin, and the conditions and the
verdict of its gate. Nothing else is kept anywhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from dspy_prod.registry.aliases.gates import Gate, GateReport
from dspy_prod.registry.aliases.journal import AuditEntry, Replay
from dspy_prod.registry.aliases.projection import alias_version
from dspy_prod.registry.files import plain, read
from dspy_prod.registry.names import Reference
from dspy_prod.registry.server import Server

EVIDENCE: Final = "deployment"


@dataclass(frozen=True)
class _Told:
    """What a move says of its deployment, see `Begin.evidence`."""

    id: str
    stages: list[str]
    before: dict[str, int | None]
    conditions: dict[str, Any] | None
    verdict: str | None


def told(entry: AuditEntry) -> Mapping[str, Any] | None:
    """The deployment that an entry belongs to, None for none; a RegistryError when it was tampered with."""
    said = entry.evidence.get(EVIDENCE)
    if said is not None:
        read(_Told, said, f"the deployment in journal entry {entry.number}")
    return said


def continued(replay: Replay, alias: str, version: int) -> Mapping[str, Any] | None:
    """The deployment to which a move of this alias to this version belongs, whoever makes it; None: to none.

    It is the newest that has moved an alias to the version, and left this one for later.
    """
    for entry in reversed(replay.entries):
        said = told(entry)
        if said is not None and entry.moved and entry.to_version == version and alias in said["stages"]:
            return said
    return None


@dataclass(frozen=True)
class Begin:
    """The begin of a deployment.

    Attributes:
        id: of the deployment.
        stages: its aliases, in order.
        before: what they had.
        first: its first move; None when none was made yet.
    """

    id: str
    stages: tuple[str, ...]
    before: Mapping[str, int | None]
    first: AuditEntry | None = None

    @classmethod
    def now(cls, replay: Replay, stages: tuple[str, ...]) -> Begin:
        """A deployment that begins here."""
        return cls(uuid.uuid4().hex, stages, {alias: replay.version(alias) for alias in stages})

    @classmethod
    def found(cls, replay: Replay, stages: tuple[str, ...], version: int) -> Begin | None:
        """The newest deployment of a version through these stages that made a move."""
        first: AuditEntry | None = None
        for entry in replay.entries:
            said = told(entry)
            if said is None or not entry.moved or entry.to_version != version or tuple(said["stages"]) != stages:
                continue
            if first is None or said["id"] != first.evidence[EVIDENCE]["id"]:
                first = entry
        if first is None:
            return None
        said = first.evidence[EVIDENCE]
        return cls(said["id"], stages, said["before"], first)

    def move(self, replay: Replay, alias: str, version: int) -> AuditEntry | None:
        """The entry that gave an alias the version, since this deployment began."""
        since = 0 if self.first is None else self.first.number or 0
        moves = (each for each in reversed(replay.entries) if each.alias == alias and each.moved)
        return next((each for each in moves if each.to_version == version and (each.number or 0) >= since), None)

    def has_passed(self, replay: Replay, alias: str, version: int) -> bool:
        """Whether the alias has been given the version."""
        if self.first is None:
            return replay.version(alias) == version
        return self.before[alias] == version or self.move(replay, alias, version) is not None

    def evidence(self, conditions: Mapping[str, Any] | None, report: GateReport | None) -> dict[str, Any]:
        """What a move has to say about the deployment it belongs to."""
        verdict = None if report is None else report.result
        said = {"id": self.id, "stages": list(self.stages), "before": dict(self.before)}
        return {**said, "conditions": conditions, "verdict": verdict}


def verdict(replay: Replay, version: int, conditions: Mapping[str, Any]) -> tuple[GateReport, AuditEntry] | None:
    """The newest verdict on a version under the very same conditions, and where it is on record.

    The report is without checks and metrics where those were too long to keep.
    """
    for entry in reversed(replay.entries):
        said = told(entry)
        if said is not None and entry.to_version == version and said["verdict"] and said["conditions"] == conditions:
            own = (each.evidence for each in reversed(replay.entries) if each.evidence.get(EVIDENCE) == said)
            full = next((evidence["gate"] for evidence in own if "gate" in evidence), None)
            where = f"the gate's report in journal entry {entry.number}"
            return GateReport(said["verdict"]) if full is None else read(GateReport, full, where), entry
    return None


def pinned(gate: Gate, server: Server, name: str, before: Mapping[str, int | None]) -> Gate:
    """The gate, with the version that its baseline means at the deployment's begin.

    Later, when an alias has moved on to the candidate, it would compare the candidate with itself.
    """
    if not isinstance(gate.baseline, str):
        return gate
    reference = Reference.of(gate.baseline)
    if reference.alias is None:
        return gate
    known = reference.name == name and reference.alias in before
    version = before[reference.alias] if known else alias_version(server, reference.name, reference.alias)
    if version is None:
        return gate
    return replace(gate, baseline=f"{reference.name}/{version}")


def conditions_of(gate: Gate) -> dict[str, Any]:
    """What the verdict of a gate depends on, apart from the evaluation itself, as JSON gives it back."""
    named = (each.name for each in fields(gate) if each.name != "evaluate")  # which is the user's, and may be anything
    return {name: plain(getattr(gate, name)) for name in named}
