"""An evaluation file for the tests of deployments. `case.json` beside it says what it shall find, and when to die."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy

from dspy_prod.registry.aliases import promotion
from dspy_prod.registry.deployment import run as deploying

CASE: dict[str, Any] = json.loads(Path("case.json").read_text())
THRESHOLDS: dict[str, float] = CASE.get("thresholds", {"score": 0.5})
BASELINE = CASE.get("baseline")


def program() -> dspy.Predict:
    """The bare program."""
    return dspy.Predict("question, context: list[str] -> answer")


def evaluate(candidate: Any) -> dict[str, float]:
    """Count the evaluations, and find what the case says."""
    with open("evaluated", "a") as file:
        file.write(f"{len(candidate.demos)}\n")
    print("evaluating")
    if CASE.get("kill") == "gate":
        die()
    if CASE.get("exit"):
        sys.exit(0)
    if CASE.get("raise"):
        raise RuntimeError(CASE["raise"])
    if "together" in CASE:  # wait for the other deployer
        Path(f"here-{os.getpid()}").touch()
        until = time.monotonic() + 30
        while len(list(Path().glob("here-*"))) < CASE["together"]:
            assert time.monotonic() < until
            time.sleep(0.01)
    return {"examples": 10, **{name: float(value) for name, value in CASE.get("metrics", {"score": 0.9}).items()}}


def die() -> None:
    """As a machine does that is switched off."""
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(home: Any, name: str, *, alias: str | None = None, before: bool = False) -> None:
    """Let this process die before or after a function did its work, on an alias."""
    original: Callable[..., Any] = getattr(home, name)

    def work(*arguments: Any, **more: Any) -> Any:
        aimed = alias is None or alias in [getattr(each, "alias", each) for each in arguments]
        if aimed and before:
            die()
        found = original(*arguments, **more)
        if aimed:
            die()
        return found

    setattr(home, name, work)


match CASE.get("kill", "").split(":"):
    case ["published"]:
        deadly(deploying, "publish")
    case ["written", alias]:  # in the journal, and not yet in MLflow's alias
        deadly(promotion, "project", alias=alias, before=True)
    case ["moved", alias]:
        deadly(deploying, "carry_out", alias=alias)
