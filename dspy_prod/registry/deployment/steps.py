"""The steps of a deployment, as they are made."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dspy_prod.registry.aliases.journal import AuditEntry
from dspy_prod.registry.deployment.report import Step, StepResult


class Steps:
    """Notes each step with its time and how it ended.

    Args:
        begins: is told the name of each step that begins.
        ends: is called when one has ended well.

    Attributes:
        made: the steps so far.
    """

    def __init__(self, begins: Callable[[str], object], ends: Callable[[], object]) -> None:
        self.made: list[Step] = []
        self._begins, self._ends = begins, ends

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """Make a step; what it gives is to be called with what was done in words, and the result unless `done`."""
        began = time.monotonic()
        told: tuple[StepResult, str] = ("done", "")

        def said(detail: str, result: StepResult = "done") -> None:
            nonlocal told
            told = result, detail

        self._begins(name)
        try:
            yield said
        except BaseException as error:
            said(str(error) or type(error).__name__, "stopped")
            raise
        finally:
            self.made.append(Step(name, *told, now(), time.monotonic() - began))
        self._ends()

    def earlier(self, alias: str, version: int, entry: AuditEntry | None) -> None:
        """Note that an alias has the version already, by a move of an earlier run or from before the deployment."""
        if entry is None:
            self.made.append(Step(alias, "skipped", f"has version {version} already", now()))
        else:
            self.made.append(Step(alias, "before", str(entry), entry.at))
        self._ends()


def now() -> dt.datetime:
    """This moment, in UTC."""
    return dt.datetime.now(dt.timezone.utc)
