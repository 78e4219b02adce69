"""What the tests of deployments share: a working directory with an evaluation file, and the command line in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.cli import main
from tests.registry.processes import forget

STAGES = ("staging", "canary", "production")


class Bench:
    """A working directory with an evaluation file, and the command line in it."""

    def __init__(self, folder: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.uri, self._capsys = folder, uri, capsys
        shutil.copy(Path(__file__).with_name("evaluation.py"), folder / "evals.py")
        self.finds(score=0.9)
        self.out = self.err = ""

    def case(self, **case: Any) -> None:
        """Say what the evaluation shall do."""
        (self.folder / "case.json").write_text(json.dumps(case))

    def finds(self, **metrics: Any) -> None:
        """Say what it shall measure."""
        self.case(metrics=metrics)

    def arguments(self, candidate: object, *more: str) -> list[str]:
        """The command."""
        return [
            "deploy", "it", "--candidate", str(candidate), "--eval", "evals.py", "--tracking-uri", self.uri, *more
        ]  # fmt: skip

    def deploy(self, candidate: object, *more: str) -> int:
        """The exit code."""
        forget()
        code = main(self.arguments(candidate, *more))
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def evaluations(self) -> list[int]:
        """The number of demos of each program that was evaluated."""
        path = self.folder / "evaluated"
        return list(map(int, path.read_text().split())) if path.exists() else []

    def report(self, version: int | str) -> tuple[dict[str, Any], str]:
        """The report as JSON and Markdown."""
        path = self.folder / ".dspy_prod" / "deployments" / f"deployment-it-{version}.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def everywhere(version: int, previous: int | None = None) -> dict[str, int]:
    """The aliases after a deployment."""
    return {**dict.fromkeys(STAGES, version), **({} if previous is None else {"previous": previous})}
