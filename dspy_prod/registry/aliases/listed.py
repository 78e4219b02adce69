"""Versions and moves as lists that show themselves as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dspy_prod.registry.aliases.journal import AuditEntry
from dspy_prod.registry.published.manifest import ProgramVersion
from dspy_prod.views import Cell, ShownList, Table
from dspy_prod.views.cells import Tone

_TONES: Final[dict[str, Tone]] = {"applied": "good", "unchanged": "faint", "conflict": "bad", "refused": "bad"}


class History(ShownList[AuditEntry]):
    """The moves of a program's aliases, newest first: a list, which shows itself as a table."""

    def __init__(self, entries: Iterable[AuditEntry] = (), name: str = "a program") -> None:
        super().__init__(entries)
        self.name = name

    def _view(self) -> Table:
        rows = [
            (
                f"{entry.at.astimezone():%Y-%m-%d %H:%M}",
                entry.alias,
                Cell("–" if entry.from_version is None else str(entry.from_version), number=True),
                Cell("–" if entry.to_version is None else str(entry.to_version), number=True),
                f"{entry.action}{', forced' if entry.forced else ''}",
                Cell(entry.outcome, _TONES[entry.outcome]),
                entry.by,
                entry.reason or "",
            )
            for entry in self
        ]
        columns = ("when", "alias", "from", "to", "action", "outcome", "by", "reason")
        return Table(f"Moves of {self.name}'s aliases", columns, rows)


class Versions(ShownList[ProgramVersion]):
    """Versions of programs, newest first: a list, which shows itself as a table."""

    def __init__(self, versions: Iterable[ProgramVersion] = (), title: str = "Versions") -> None:
        super().__init__(versions)
        self.title = title

    def _view(self) -> Table:
        columns = ("version", "aliases", "metrics", "model", "published", "message")
        rows = [
            (
                str(version),
                ", ".join(version.aliases),
                ", ".join(f"{name} {value:g}" for name, value in version.metrics.items()),
                version.model or "",
                f"{version.created_at.astimezone():%Y-%m-%d %H:%M}",
                version.message or "",
            )
            for version in self
        ]
        return Table(self.title, columns, rows)
