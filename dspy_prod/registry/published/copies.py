"""Last good copies of what was loaded: in memory for speed, on disk for a process that starts while MLflow is down.

A file is JSON, readable by its owner only, replaced atomically, and believed only if its digest is right.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dspy_prod.privacy.names import address
from dspy_prod.registry.files import write
from dspy_prod.registry.published.manifest import Manifest, sha256
from dspy_prod.runtime import private
from dspy_prod.runtime.recent import Recent

DIRECTORY: Final = Path(".dspy_prod") / "registry"
MOST_IN_MEMORY: Final = 64
SAVED_EVERY: Final = 600.0
"""Seconds after which a copy that was confirmed again and again is written again, so that its age is known."""

_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True)
class Release:
    """All that `load` needs of a program version.

    Attributes:
        name, version: which one it is.
        manifest: what it consists of.
        states: the JSON state of each predictor, by its name.
    """

    name: str
    version: int
    manifest: Manifest
    states: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(
            {"name": self.name, "version": self.version, "manifest": self.manifest.to_text(), "states": self.states}
        )

    @classmethod
    def of(cls, text: str) -> Release:
        """Read it back."""
        found = json.loads(text)
        return cls(found["name"], found["version"], Manifest.of(found["manifest"]), found["states"])


@dataclass(frozen=True)
class Copy:
    """A release and when the server last confirmed it, in seconds since the epoch.

    `after` is the last move of its alias that this process had made when it asked (see `MOVES`).
    """

    release: Release
    confirmed_at: float
    after: object = None


MEMORY: Final = Recent[Copy](MOST_IN_MEMORY)
"""The newest copies of this process, by store and reference."""

MOVES: Final[dict[str, object]] = {}
"""The last move that this process made of an alias, by reference, in whatever store: a URI can be written in many ways.

A copy that was asked for before that move is not fresh, whatever its age.
"""


def file_of(key: tuple[str, str], directory: Path | None) -> Path:
    """Where the copy of a reference in a store lies."""
    place, reference = key
    readable = "".join(char if char.isalnum() or char in "-_." else "-" for char in reference)[:80]
    return (directory or DIRECTORY) / f"{readable}-{sha256(f'{address(place)} {reference}')[:12]}.json"


def save(key: tuple[str, str], copy: Copy, directory: Path | None) -> None:
    """Write a copy to disk; a disk that cannot be written is no reason to fail."""
    path, text = file_of(key, directory), copy.release.to_text()
    content = {"confirmed_at": copy.confirmed_at, "sha256": sha256(text), "release": text}
    try:
        write(path, json.dumps(content))
    except OSError as error:
        _log.warning("No copy of %s for the case that MLflow is down: %s cannot be written (%s)", key[1], path, error)


def is_old(key: tuple[str, str], directory: Path | None) -> bool:
    """Whether the file is missing, or was confirmed too long ago to tell the copy's age well."""
    try:
        return time.time() - file_of(key, directory).stat().st_mtime > SAVED_EVERY
    except OSError:
        return True


def saved(key: tuple[str, str], directory: Path | None) -> Copy | None:
    """The copy on disk, or None when there is none that can be believed."""
    path = file_of(key, directory)
    try:
        if path.exists():  # whoever may write it chooses the prompts, for its digest is in it
            private.check_directory(path.parent)
            private.check(path)
            private.restrict(path.parent, path)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if sha256(content["release"]) != content["sha256"]:
            raise ValueError("its digest is wrong")
        return Copy(Release.of(content["release"]), float(content["confirmed_at"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged in whatever way: as if it were not there
        _log.warning("The copy %s of %s is not used: %s", path, key[1], error)
        return None
