"""`diff`: what changed between two versions of a program, predictor by predictor."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.names import checked_name
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import exact
from dspy_prod.registry.published.manifest import ProgramVersion, named, reference_to
from dspy_prod.registry.server import server_at
from dspy_prod.views import Cell, Code, Page, Shown, Table
from dspy_prod.views.cells import Tone

PARTS: Final = ("instructions", "fields", "demos", "settings")
_TONES: Final[dict[str, Tone]] = {"equal": "faint", "changed": "warn", "added": "good", "removed": "bad"}


@dataclass(frozen=True)
class PredictorDiff:
    """What changed in one predictor.

    Attributes:
        name: the predictor.
        status: `changed`, `added`, `removed` or `equal`.
        instructions, fields, demos, settings: unified diffs of its parts, each empty when nothing changed.

    Example:
        ```python
        for predictor in registry.diff("triage", first, second).predictors:
            print(predictor.name, predictor.status, predictor.demos)
        ```
    """

    name: str
    status: str
    instructions: str = ""
    fields: str = ""
    demos: str = ""
    settings: str = ""

    def __str__(self) -> str:
        return "".join(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class VersionDiff(Shown):
    """What changed between two versions; printed, a unified diff, and in a notebook one in colours.

    Attributes:
        name: the program.
        old, new: the version numbers.
        predictors: every predictor that either version has.

    Example:
        ```python
        difference = registry.diff("triage", first, second)
        if difference.changed:
            print(difference)
        ```
    """

    name: str
    old: int
    new: int
    predictors: tuple[PredictorDiff, ...]

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return any(predictor.status != "equal" for predictor in self.predictors)

    def __bool__(self) -> bool:
        return self.changed

    def __str__(self) -> str:
        return "".join(str(predictor) for predictor in self.predictors)

    def _view(self) -> Page:
        title = f"{self.name}: version {self.old} -> {self.new}"
        rows = [(each.name, Cell(each.status, _TONES[each.status])) for each in self.predictors]
        parts = [Code(str(each), diff=True) for each in self.predictors if each.status != "equal"]
        return Page(Table(title, ("predictor", "status"), rows), *parts)


def diff(
    name: str,
    old: int | str | ProgramVersion,
    new: int | str | ProgramVersion,
    *,
    tracking_uri: str | None = None,
) -> VersionDiff:
    """Compare two versions of a program: instructions, fields, demos and model settings of each predictor.

    Args:
        name: the program.
        old, new: version numbers, aliases such as `"production"`, or `ProgramVersion`s.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Raises:
        UnknownVersionError: there is no such version.
        RegistryUnavailableError: MLflow did not answer.

    Example:
        ```python
        print(registry.diff("triage", 1, "triage@staging"))
        ```
    """
    tracking_uri = unshown(tracking_uri)
    checked_name(name)
    server = server_at(tracking_uri)
    before, after = (exact(server, reference_to(name, named(name, version))) for version in (old, new))
    was, now = _described(before), _described(after)
    predictors = [
        _compared(key, f"{before} {key}", f"{after} {key}", was.get(key), now.get(key)) for key in {**was, **now}
    ]
    return VersionDiff(name, before.version, after.version, tuple(predictors))


def _described(release: Release) -> dict[str, dict[str, list[str]]]:
    """The parts of each predictor as lines."""
    found = {}
    for entry in release.manifest.predictors:
        state: dict[str, Any] = json.loads(release.states[entry.name])
        signature = state["signature"]
        found[entry.name] = {
            "instructions": signature["instructions"].splitlines(),
            "fields": [
                f"{field.kind} {field.name}: {field.type}, described as {told['description']!r}"
                for field, told in zip(entry.fields, signature["fields"], strict=True)
            ],
            "demos": [line for number, demo in enumerate(state["demos"], 1) for line in _demo(number, demo)],
            "settings": _settings(release.manifest.settings.get(entry.name, {}), state),
        }
    return found


def _demo(number: int, demo: dict[str, Any]) -> Iterator[str]:
    for key, value in demo["values"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for line in text.splitlines() or [""]:
            yield f"{number}. {key}: {line}"


def _settings(settings: dict[str, Any], state: dict[str, Any]) -> list[str]:
    flat = {**settings, **({"fields": state["fields"]} if state.get("fields") else {})}
    return [
        f"{group}.{key} = {json.dumps(value, ensure_ascii=False, sort_keys=True)}"
        for group, values in sorted(flat.items())
        for key, value in sorted(values.items())
    ]


def _compared(
    name: str, old: str, new: str, was: dict[str, list[str]] | None, now: dict[str, list[str]] | None
) -> PredictorDiff:
    parts = {}
    for part in PARTS:
        had, has = (each[part] if each else [] for each in (was, now))
        lines = difflib.unified_diff(had, has, f"{old} {part}", f"{new} {part}", lineterm="")
        parts[part] = "".join(f"{line}\n" for line in lines)
    if was is None or now is None:
        return PredictorDiff(name, "added" if was is None else "removed", **parts)
    return PredictorDiff(name, "changed" if any(parts.values()) else "equal", **parts)
