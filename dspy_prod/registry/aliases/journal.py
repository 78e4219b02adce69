"""The journal of promotions: who moved which alias, from where to where, when and why.

MLflow moves an alias without looking at what it was, so two promoters could overwrite each other unseen. MLflow does
number the versions of a prompt, atomically and for ever. Each move is therefore a version of the prompt
`<name>.audit-log` that states what the alias is expected to be and what it shall become. The order of these numbers
decides: whoever replays the journal finds the same winner. The alias in MLflow is a projection of the journal, and a
promoter that died before it moved the alias is finished by the next one.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from dspy_prod.registry.errors import RegistryUnavailableError
from dspy_prod.registry.files import plain, read
from dspy_prod.registry.names import journal_prompt
from dspy_prod.registry.published.manifest import JOURNAL, KIND, ensure_prompt
from dspy_prod.registry.published.rendering import LARGEST, escaped
from dspy_prod.registry.server import Server

ENTRY: Final = "dspy_prod_entry"
PROJECTED: Final = "dspy_prod_projected"

SHORT: Final = 8_000
"""Characters of a piece of evidence that is kept, even if all of it together would be too long."""

Action = Literal["promote", "rollback", "moved", "refused"]
Outcome = Literal["applied", "unchanged", "conflict", "refused"]


@dataclass(frozen=True)
class AuditEntry:
    """One move of an alias, or an attempt at one.

    Attributes:
        action: `promote`; `rollback`; `refused`: a gate did not pass; `moved`: somebody moved the alias in MLflow
            itself, which was noticed later.
        outcome: `applied`; `unchanged`: the alias had this version already; `conflict`: it did not have the expected
            one; `refused`.
        alias: the alias.
        from_version: what it had, None for nothing.
        to_version: what it should become; None when it was deleted in MLflow.
        by: who, as user@machine.
        at: when, in UTC.
        reason: why, in the promoter's words.
        forced: an inconclusive gate was overruled.
        evidence: `metrics` of the version, and `gate`, the gate's report.
        number: its place in the journal; None for a call that had nothing to do and wrote nothing.
        id: unique; a request that was sent twice counts once.

    Example:
        ```python
        entry = registry.history("triage")[0]
        print(entry)  # production: 1 -> 2 (promote), by ...
        ```
    """

    action: Action
    outcome: Outcome
    alias: str
    from_version: int | None
    to_version: int | None
    by: str
    at: dt.datetime
    reason: str | None = None
    forced: bool = False
    evidence: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    number: int | None = None
    id: str = ""

    @property
    def moved(self) -> bool:
        """Whether the alias was moved by it."""
        return self.outcome == "applied"

    def __str__(self) -> str:
        start = "nothing" if self.from_version is None else str(self.from_version)
        goal = "nothing" if self.to_version is None else str(self.to_version)
        what = {
            "applied": f"{self.alias}: {start} -> {goal} ({self.action})",
            "unchanged": f"{self.alias}: is {goal} already, nothing to do ({self.action})",
            "conflict": f"{self.alias}: stays {start}, not {goal}: somebody else was first ({self.action})",
            "refused": f"{self.alias}: stays {start}, not {goal}: the gate did not pass",
        }[self.outcome]
        why = f": {self.reason}" if self.reason else ""
        return f"{what}, by {self.by}{', forced' if self.forced else ''}{why}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(plain(self))


@dataclass(frozen=True)
class Request:
    """What a promoter asks for.

    Attributes:
        expected: the version the alias must have, 0 for none; None: whatever it has.
    """

    action: Action
    alias: str
    version: int | None
    expected: int | None
    by: str
    reason: str | None = None
    forced: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return json.dumps(plain(self), sort_keys=True)


class Replay:
    """What the journal says.

    Attributes:
        entries: all entries, in order.
    """

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self._stacks: dict[str, list[int | None]] = {}
        self._last: dict[str, tuple[AuditEntry, bool]] = {}
        self._ids: set[str] = set()

    def add(self, request: Request, number: int, at: dt.datetime, projected: bool) -> None:
        """Replay one more entry."""
        if request.id in self._ids:
            return
        self._ids.add(request.id)
        before = self.version(request.alias)
        entry = AuditEntry(
            request.action, self._outcome(request, before), request.alias, before, request.version, request.by, at,
            request.reason, request.forced, MappingProxyType(dict(request.evidence)), number, request.id,
        )  # fmt: skip
        self.entries.append(entry)
        if entry.outcome == "applied":
            self._move(entry)
            self._last[entry.alias] = (entry, projected)

    def version(self, alias: str) -> int | None:
        """What the alias has."""
        stack = self._stacks.get(alias)
        return stack[-1] if stack else None

    def previous(self, alias: str) -> int | None:
        """What a rollback goes back to."""
        stack = self._stacks.get(alias, [])
        return stack[-2] if len(stack) > 1 else None

    def last(self, alias: str) -> AuditEntry | None:
        """The move that gave the alias its version."""
        return self._last[alias][0] if alias in self._last else None

    def is_projected(self, alias: str) -> bool:
        """Whether MLflow's alias was seen to follow that move."""
        return alias not in self._last or self._last[alias][1]

    @property
    def aliases(self) -> list[str]:
        """Every alias that was ever moved."""
        return sorted(self._stacks)

    def _outcome(self, request: Request, before: int | None) -> Outcome:
        if request.action == "refused":
            return "refused"
        if request.expected is not None and request.expected != (before or 0):
            return "conflict"
        return "unchanged" if request.version == before else "applied"

    def _move(self, entry: AuditEntry) -> None:
        stack = self._stacks.setdefault(entry.alias, [])
        if entry.action == "rollback" and entry.to_version in stack:
            while stack[-1] != entry.to_version:
                stack.pop()
        else:
            stack.append(entry.to_version)


class Journal:
    """The journal of one program."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self._prompt = journal_prompt(name)
        self._name = name

    def read(self) -> Replay:
        """Replay it from the beginning.

        Raises:
            RegistryError: an entry was tampered with. Whoever deletes its tag `dspy_prod_entry` leaves it out.
        """
        replay = Replay()
        for version in reversed(list(self._server.versions(self._prompt))):
            if ENTRY in version.tags:
                at = dt.datetime.fromtimestamp(version.creation_timestamp / 1000, dt.timezone.utc)
                request = read(Request, version.tags[ENTRY], f"entry {version.version} of the journal {self._prompt}")
                replay.add(request, int(version.version), at, PROJECTED in version.tags)
        return replay

    def append(self, request: Request) -> tuple[AuditEntry, Replay]:
        """Write an entry, and see from its place what became of it.

        Raises:
            RegistryUnavailableError: MLflow did not answer; the entry may be written all the same. Asking again for
                the same move is safe.
        """
        ensure_prompt(self._server, self._prompt, JOURNAL)
        text = str(request)
        if len(text) > LARGEST:
            note = {"note": f"evidence of {len(text)} characters was too long to keep"}
            short = {key: value for key, value in request.evidence.items() if len(json.dumps(value)) <= SHORT}
            request = replace(request, evidence={**short, **note})
            text = str(request)
        shown = f"{request.action} {request.alias} of {self._name}: {request.version}"
        sentence = escaped(f"{shown}, by {request.by}{f': {request.reason}' if request.reason else ''}")
        tags = {KIND: JOURNAL, ENTRY: text}
        self._server.write(lambda client: client.create_prompt_version(self._prompt, sentence, None, tags))
        replay = self.read()
        entry = next((each for each in reversed(replay.entries) if each.id == request.id), None)
        if entry is None:
            raise RegistryUnavailableError(f"MLflow at {self._server.place} lost an entry of {self._prompt}; try again")
        return entry, replay

    def confirm(self, entry: AuditEntry) -> None:
        """Note that MLflow's alias follows this entry."""
        number = str(entry.number)
        self._server.write(lambda client: client.set_prompt_version_tag(self._prompt, number, PROJECTED, "true"))
