"""What a deployment did, for people (Markdown, a table) and programs (JSON), and how to go on."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from dspy_prod.registry.deployment.markdown import code, fenced, literal, table
from dspy_prod.registry.files import plain, write
from dspy_prod.views import Cell, Page, Shown, Table
from dspy_prod.views.cells import Tone

if TYPE_CHECKING:
    from dspy_prod.registry.aliases.gates import GateReport

DIRECTORY: Final = Path(".dspy_prod") / "deployments"
Outcome = Literal["deployed", "waiting", "unchanged", "failed", "error", "inconclusive", "conflict", "interrupted"]
StepResult = Literal["done", "before", "reused", "skipped", "stopped"]
_TONES: Final[dict[str, Tone]] = {"deployed": "good", "waiting": "good", "unchanged": "good", "inconclusive": "warn"}


@dataclass(frozen=True)
class Step:
    """One step of a deployment.

    Attributes:
        name: `load`, `gate`, `publish`, or the alias that was moved.
        result: `done` now; done `before`, by an earlier run; `reused`: the verdict of an earlier run; `skipped`:
            there was nothing to do; `stopped`: the deployment ended here.
        detail: what happened, in words.
        at: when it ended, in UTC; for what an earlier run did, when that was.
        seconds: how long it took now.

    Example:
        ```python
        deployment = registry.deploy(
            "triage", second, program=program, evaluate=evaluate, thresholds={"accuracy": 0.85}
        )
        for step in deployment.steps:
            print(step.name, step.result, step.detail)
        ```
    """

    name: str
    result: StepResult
    detail: str
    at: dt.datetime
    seconds: float = 0.0


@dataclass(frozen=True)
class Deployment(Shown):
    """What a deployment did.

    Attributes:
        name: the program.
        version: the candidate; None while it is a file that was not published.
        candidate: the candidate as it was named.
        id: the same for every run that continues this deployment; None when there was nothing to deploy.
        outcome: `deployed`; `waiting`: up to the stage that was asked for, and an experiment decides about the others;
            `unchanged`: every alias had the version already; `failed`, `error`, `inconclusive`: the
            gate's verdict, and no alias was moved; `conflict`: somebody else moved an alias; `interrupted`.
        stages: the aliases, in the order of their moves.
        resumed: an earlier run had begun it.
        forced: an inconclusive gate was overruled.
        reason: why, as given.
        by: who.
        started_at, seconds: this run.
        steps: what was done, in order.
        gate: the gate's report; None when there was no need for one.
        before, after: the versions of the aliases at the deployment's begin and now.
        previous: the version that `production` had before, None for none.
        difference: unified diff from `previous` to the candidate; a sentence where there is none to show.
        changes: the status of each predictor in that difference (`changed`, `equal`, ...).
        error: what ended it, None when nothing did.
        advice: how to go on, or back.
        files: where this report is.

    Example:
        ```python
        deployment = registry.deploy(
            "triage", second, program=program, evaluate=evaluate, thresholds={"accuracy": 0.85}
        )
        print(deployment.outcome, deployment.before, deployment.after)
        ```
    """

    name: str
    version: int | None
    candidate: str
    id: str | None
    outcome: Outcome
    stages: tuple[str, ...]
    resumed: bool
    forced: bool
    reason: str | None
    by: str
    started_at: dt.datetime
    seconds: float
    steps: tuple[Step, ...]
    gate: GateReport | None
    before: Mapping[str, int | None]
    after: Mapping[str, int | None]
    previous: int | None
    difference: str = ""
    changes: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    advice: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The candidate: `triage/7`, or the file's name while it is not published."""
        return f"{self.name} ({self.candidate})" if self.version is None else f"{self.name}/{self.version}"

    def __str__(self) -> str:
        return f"{self.title}: {self.outcome}" + (f": {self.error}" if self.error else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(plain(self))

    def to_markdown(self) -> str:
        """For people."""
        return "\n\n".join(_markdown(self)) + "\n"

    def _view(self) -> Page:
        title = Cell(f"Deployment of {self.title}: {self.outcome}", _TONES.get(self.outcome, "bad"))
        rows = [
            (step.name, step.result, f"{step.at.astimezone():%Y-%m-%d %H:%M:%S}", step.detail) for step in self.steps
        ]
        return Page(Table(title, ("step", "result", "when", "what"), rows), *self.advice)


def advice(found: Deployment) -> tuple[str, ...]:
    """What a person may do next, a sentence each."""
    moved = [alias for alias in found.stages if found.version is not None and found.after.get(alias) == found.version]
    back = _back(found, moved)
    if found.outcome == "deployed":
        return back
    if found.outcome == "waiting":
        return (*_experiment(found, moved), *back)
    if found.outcome == "unchanged":
        return (f"There was nothing to do: {', '.join(moved)} {_has(moved)} version {found.version}.",)
    if found.outcome == "inconclusive":
        return (
            "No alias was moved. Look at the checks of the gate. If you take responsibility, run the same command with "
            '--force --reason "..." (in Python: force=True, reason="..."); else measure more and run it again.',
        )
    if found.outcome == "failed":
        return ("No alias was moved. A gate that fails cannot be overruled: deploy a better candidate.",)
    if found.outcome == "error":
        return ("No alias was moved. Mend the evaluation and run the same command again.",)
    stand = (f"{', '.join(moved)} {_has(moved)} version {found.version}; that stays.",) if moved else ()
    if found.outcome == "conflict":
        again = (
            f"See who moved it: dspy-prod prompts {found.name} --history. To deploy all the same, from what the "
            "aliases have now and with a new evaluation, run the same command with --recheck (in Python: "
            "recheck=True).",
        )
        return (*stand, *again, *back)
    return (*stand, "To continue where it stopped, run the same command again.", *back)


def _experiment(found: Deployment, moved: list[str]) -> tuple[str, ...]:
    rest = [alias for alias in found.stages if alias not in moved]
    if not moved or not rest:
        return ()
    control, candidate = f"{found.name}@{rest[-1]}", f"{found.name}@{moved[-1]}"
    kept = "has what it had" if len(rest) == 1 else "have what they had"
    return (
        f"{moved[-1]} has version {found.version}, {', '.join(rest)} {kept}. An experiment decides from here: "
        f'Experiment(..., variants={{"control": "{control}", "candidate": "{candidate}"}}), then '
        "dspy-prod experiment start NAME, and dspy-prod experiment run NAME; its promotion continues this deployment.",
    )


def _back(found: Deployment, moved: list[str]) -> tuple[str, ...]:
    names = [alias for alias in moved if found.before.get(alias) not in (None, found.version)]
    if not names:
        return ()
    commands = "; ".join(
        f"dspy-prod rollback {found.name}" + ("" if alias == "production" else f" --alias {alias}") for alias in names
    )
    return (f"To take it back: {commands}",)


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def path_of(directory: Path, name: str, version: int | None) -> Path:
    """Where the JSON report lies; the Markdown is beside it."""
    return directory / f"deployment-{name}-{'unpublished' if version is None else version}.json"


def save(deployment: Deployment, path: Path) -> None:
    """Write JSON and Markdown; raises as `write`."""
    write(path, json.dumps(deployment.to_dict(), indent=2, ensure_ascii=False) + "\n")
    write(path.with_suffix(".md"), deployment.to_markdown())


def _markdown(found: Deployment) -> Iterator[str]:
    yield f"# Deployment of {literal(found.title)}: {found.outcome}"
    about = [f"{found.started_at:%Y-%m-%d %H:%M:%S} UTC, {found.seconds:.1f} s, by {literal(found.by)}."]
    if found.resumed:
        about.append("An earlier run had begun it; this one went on where that had stopped.")
    if found.reason:
        overruled = " (an inconclusive gate was overruled)" if found.forced else ""
        about.append(f"Reason: {literal(found.reason)}{overruled}")
    yield "\n".join(about)
    if found.error:
        yield f"**{literal(found.error)}**"
    yield from _table("Steps", ("step", "result", "at (UTC)", "seconds", "what"), [
        (step.name, step.result, f"{step.at:%Y-%m-%d %H:%M:%S}", f"{step.seconds:.2f}", step.detail)
        for step in found.steps
    ])  # fmt: skip
    yield from _table("Aliases", ("alias", "before", "after"), [
        (alias, _or_dash(found.before.get(alias)), _or_dash(found.after.get(alias))) for alias in found.before
    ])  # fmt: skip
    if found.gate is not None:
        yield from _gate(found.gate)
    yield "## Changes against what production had"
    if found.previous is not None and found.changes:
        yield f"Version {found.previous} -> {_or_dash(found.version)}."
        yield "\n".join(f"- {code(predictor)}: {status}" for predictor, status in found.changes.items())
    told = found.difference or "No predictor differs."
    yield fenced(told) if found.difference and found.changes else literal(told)
    if found.advice:
        yield "## How to go on"
        yield "\n".join(f"- {literal(line)}" for line in found.advice)


def _gate(gate: GateReport) -> Iterator[str]:
    yield "## Gate"
    examples = "" if gate.examples is None else f", {gate.examples} examples"
    error = f" {literal(gate.error)}" if gate.error else ""
    yield f"It says **{gate.result}**{examples}, {gate.seconds:.1f} s.{error}"
    if gate.checks:
        yield table(("check", "result", "why"), [(one.name, one.result, one.reason) for one in gate.checks])
    yield from _table("Metrics", ("metric", "candidate", "baseline", "difference"), [
        (name, *(_or_dash(value) for value in (new, old, None if new is None or old is None else new - old)))
        for name in {**gate.metrics, **gate.baseline}
        for new, old in [(gate.metrics.get(name), gate.baseline.get(name))]
    ])  # fmt: skip


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if rows:
        yield f"## {title}"
        yield table(columns, rows)


def _or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:g}" if isinstance(number, float) else str(number)
