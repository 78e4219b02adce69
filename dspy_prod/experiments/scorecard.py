"""What is known of an experiment at a look, and what follows from it: `exp.scorecard()`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.experiments.decisions import Decision
from dspy_prod.experiments.declaration import source_of
from dspy_prod.experiments.facts import Event, Facts, StageUsers, Waited
from dspy_prod.experiments.history import Look
from dspy_prod.experiments.unseen import Unseen
from dspy_prod.experiments.variants_in_mlflow import address, tracked
from dspy_prod.options.metrics import Metric
from dspy_prod.stores.trials import Arm, Ended, Tally, Trial, Waiting
from dspy_prod.stores.trials import Decision as Line
from dspy_prod.views import Shown
from dspy_prod.views.frames import frame

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from dspy_prod.views import Page


@dataclass(frozen=True, repr=False)
class Scorecard(Shown, Facts):
    """An experiment, as of a look. Immutable; it prints as a table, and shows itself in a notebook.

    Its facts are the attributes of `dspy_prod.experiments.facts.Facts`.

    Example:
        ```python
        card = exp.scorecard()
        print(card)                     # decision and reason first
        card.to_html("triage-cot.html")  # a page to send around
        ```
    """

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON.

        Example:
            ```python
            Path("card.json").write_text(json.dumps(card.to_dict()))
            ```
        """
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        told["declared"] = [each.model_dump(mode="json") for each in self.declared]
        told["candidates"] = {name: asdict(each) for name, each in self.candidates.items()}
        told["stages"], told["audit"] = ([asdict(each) for each in one] for one in (self.stages, self.audit))
        told["waiting"] = {name: asdict(each) for name, each in self.waiting.items()}
        told["unseen"] = None if self.unseen is None else asdict(self.unseen)
        told["calls"] = {name: each._asdict() for name, each in self.calls.items()}
        told["history"] = [each._asdict() for each in self.history]
        told["warnings"] = self.warnings
        plain: dict[str, Any] = _plain(told)
        return plain

    def to_frame(self, history: bool = False) -> pandas.DataFrame:
        """A row for each candidate and metric; what there is no number of is NaN.

        Args:
            history: a row for each point of `history` instead.

        Raises:
            ConfigError: pandas is not installed.
        """
        if history:
            found = frame((each._asdict() for each in self.history), Look._fields)
            numbers = [name for name in Look._fields if name not in ("candidate", "metric", "units")]
            return found.astype(dict.fromkeys(numbers, float))
        return frame(_rows(self), _COLUMNS).astype(dict.fromkeys(_NUMBERS, float))

    def plot(self) -> Figure:
        """The differences with their intervals, and how they grew, as a figure of matplotlib's.

        Raises:
            ConfigError: matplotlib is not installed.

        Example:
            ```python
            card.plot().savefig("triage-cot.png")
            ```
        """
        from dspy_prod.experiments.drawing import drawn

        return drawn(self)

    def to_html(self, path: str | Path) -> Path:
        """Write it as a page that needs nothing else: decision, differences, how they grew, users and the audit.

        The page has no script and loads nothing; it can be sent by mail, read on a phone, and printed.

        Args:
            path: of the file; one that is there is written over.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.
        """
        from dspy_prod.experiments.document import document

        found = Path(path)
        found.write_text(document(self), encoding="utf-8")
        return found

    def _view(self) -> Page:
        from dspy_prod.experiments.pages import page

        return page(self)

    def _repr_html_(self) -> str:
        from dspy_prod.experiments.pages import page

        return page(self, pictures=True).html()

    def __repr__(self) -> str:
        return f"<Scorecard of {self.name!r}: {self.state}, {self.decision}, {sum(self.users.values()):,} users>"


_COLUMNS: Final = (
    "candidate", "metric", "role", "status", "control", "value", "difference", "low", "high", "p_value",
    "better", "better_at", "worse", "worse_at", "no_worse", "no_worse_at", "control_units", "candidate_units",
)  # fmt: skip
_NUMBERS: Final = (
    "control", "value", "difference", "low", "high", "p_value", "better", "better_at", "worse", "worse_at",
    "no_worse", "no_worse_at",
)  # fmt: skip


def _rows(card: Scorecard) -> Iterator[dict[str, Any]]:
    for name, candidate in card.candidates.items():
        for each in candidate.metrics:
            row = {column: getattr(each, column) for column in _COLUMNS if hasattr(each, column)}
            shown = each.interval
            if shown is not None:
                row |= {
                    "control": shown.control, "value": shown.candidate, "difference": shown.difference,
                    "low": shown.low, "high": shown.high, "p_value": shown.p_value,
                }  # fmt: skip
            yield {**row, "candidate": name}


def scorecard(
    trial: Trial, stage: str, decision: Decision, counts: Sequence[Arm], tally: Tally, variants: Sequence[str],
    serves: str | None, dropped: Sequence[str], *, metrics: Sequence[Metric] = (), stages: Sequence[str] = (),
    audit: Sequence[Line] = (), history: Sequence[Look] = (), waiting: Mapping[str | None, Waiting] | None = None,
    unwritten: str | None = None, impossible: Mapping[str, int] | None = None, unseen: Unseen | None = None,
    calls: Sequence[Ended] = (), horizon: str | None = None,
) -> Scorecard:  # fmt: skip
    """Put together what is known.

    Args:
        trial: as the store has it. stage: in words. decision: of the look. counts, tally: of its units.
        variants: control first. serves, dropped: as in the declaration. metrics: as declared.
        stages: all of them, in words. audit: what was decided. history: how the evidence grew.
        waiting: as the store has it. unwritten: why the store cannot be written.
        impossible: units with what their metric cannot be, by metric. unseen: of a shadow stage. calls: how all of
            them ended. horizon: in words.
    """
    users, got = dict.fromkeys(variants, 0), dict.fromkeys(variants, 0)
    by_stage = {place: dict.fromkeys(variants, 0) for place in sorted({each.stage for each in counts})}
    for arm in counts:
        users[arm.arm] += arm.first
        got[arm.arm] += arm.first + arm.entered
        by_stage[arm.stage][arm.arm] += arm.first
    back = [name for name in variants[1:] if name in dropped or (trial.state == "decided" and serves != name)]
    worse = [name for name in back if decision.candidates[name].verdict == "rollback"]
    return Scorecard(
        name=trial.name, state=trial.state, stage=stage, since=trial.since, decision=decision.verdict,
        reason=decision.reason, winner=decision.winner, candidates=decision.candidates, users=users,
        hurt=sum(got[name] for name in worse), crossed=tally.mixed, late=tally.late, stray=tally.stray,
        unkept=tally.unkept, early=tally.early, unpriced=tally.unpriced, unwritten=unwritten,
        impossible=dict(impossible or {}), unseen=unseen,
        horizon=horizon, repeated=tally.repeated, calls={each.arm: each for each in calls},
        serves=serves, sample_ratio=decision.sample_ratio, declared=tuple(metrics),
        stages=tuple([StageUsers(_named(stages, place), found) for place, found in by_stage.items()]),
        audit=tuple([Event(each.at, each.what, each.by, _reason(each)) for each in audit]), history=tuple(history),
        waiting={
            each.name: Waited(found.units, found.until)
            for each in metrics if (found := (waiting or {}).get(source_of(each))) is not None
        },
        url=address(tracked(audit), variants, decision.winner or serves),
    )  # fmt: skip


def _named(stages: Sequence[str], place: int) -> str:
    return stages[place] if place < len(stages) else f"stage {place + 1}"


def _reason(line: Line) -> str:
    try:
        told = json.loads(line.evidence)
    except ValueError:
        return ""
    return str(told.get("reason", "")) if isinstance(told, dict) else ""


def _plain(value: Any) -> Any:
    """The value as JSON has it, which knows no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value
