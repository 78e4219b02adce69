"""Which run of MLflow's has the traces of a variant: one for each variant of each experiment that this process has.

The traces of a unit that was drawn are linked to the run of its variant once they are kept, after they are written: who
got a variant by an override or a holdout, and what a shadow stage asked, is not in what the experiment measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from dspy_prod.context.assignments import Assignment

SALT: Final = 8
"""Characters of the salt in a key: an experiment that is made anew has runs of its own."""


class VariantRun(NamedTuple):
    """The run of a variant: by which key it is found again, and its name, which MLflow's tables cut off at its end."""

    key: str
    name: str


_KNOWN: Final[dict[tuple[str, str], VariantRun]] = {}


def variant_runs(experiment: str, salt: str, variants: Iterable[str]) -> dict[str, VariantRun]:
    """The run of each variant; from now on their traces are linked to them.

    Args:
        experiment: its name. salt: tells it from an earlier one of that name.
    """
    scope = f"experiment/{experiment}/{salt[:SALT]}"
    found = {each: VariantRun(f"{scope}/{each}".replace("'", "’"), f"{each} ({experiment})") for each in variants}
    _KNOWN.update({(experiment, variant): run for variant, run in found.items()})
    return found


def run_of(place: Assignment) -> VariantRun | None:
    """The run that a call with this place belongs to; None if it counts for nothing."""
    if place.propensity is None or place.propensity >= 1.0 or place.variant is None:
        return None
    return _KNOWN.get((place.experiment, place.variant))


class Links:
    """Gathers which traces belong to which run, until they are told."""

    def __init__(self) -> None:
        self._traces: dict[VariantRun, list[str]] = {}

    def add(self, trace: str, places: dict[Assignment, bool]) -> None:
        """A kept trace; `places` has True for those it is linked by already, and afterwards for all of them."""
        for place, linked in places.items():
            run = None if linked else run_of(place)
            if run is not None:
                self._traces.setdefault(run, []).append(trace)
            places[place] = True

    def taken(self) -> list[dict[str, Any]]:
        """The messages that tell of them, see `runs_exporter`; nothing is told twice."""
        traces, self._traces = self._traces, {}
        return [
            {"run": run.key, "name": run.name, "shared": True, "links": list(dict.fromkeys(ids))}
            for run, ids in traces.items()
        ]
