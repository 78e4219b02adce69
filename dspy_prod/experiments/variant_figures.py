"""What MLflow shows of each variant at a look: metrics of its run, tags and a description. Plain data, no state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from dspy_prod.experiments.decisions import Decision, MetricEvidence
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.spread import Spread
from dspy_prod.stores.trials import Trial

TAG: Final = "dspy_prod."
MOST_PROOF: Final = 1e6
"""E-values above it are shown as this: a chart with 1e300 shows nothing else."""

_DIGITS: Final = 4
_OTHER: Final = re.compile(r"[^\w\-./ ]")

NOTE: Final = (
    "Variant **{variant}**{version} of the experiment **{experiment}**, {role}.\n\n"
    "The metrics of this run are what the decisions go by: of all units, one value each. The percentages in the header "
    "of its list of traces are of the traces that the page has loaded, calls and not users; with "
    "`tracking.enable(sample=...)` below 1 they are biased too, for errors and dear calls are always kept."
)
"""The description of a run."""


def figures(
    variant: str, decision: Decision, evidence: Evidence, spread: Spread, users: Mapping[str, int]
) -> dict[str, float | None]:
    """The metrics of a variant's run, as of now.

    Of each metric its mean; of a candidate also the difference to control with the interval's bounds (of amounts as a
    share of control's), and the e-values of "better", "worse" and "no worse by the margin". Cost is in USD for 1,000
    calls, latency in seconds.

    Args:
        variant: its name. decision: what the evidence says. evidence: all of it. spread: of seconds.
        users: exposed, by variant.
    """
    found: dict[str, float | None] = {"users": users[variant]}  # in the order of the columns of MLflow's table
    compared: dict[str, float | None] = {}
    for metric in evidence.metrics:
        mean, name = evidence.mean(metric.name, variant), _OTHER.sub("_", metric.name)
        if metric.name == "cost":
            found["usd_per_1000_calls"] = None if mean is None else 1000 * mean
        elif metric.name == "latency":
            found.update(latency_p50_s=spread.quantile(variant, 0.5), latency_p95_s=spread.quantile(variant, 0.95))
        else:
            found[name] = mean
        its = _about(decision, variant, metric.name)
        if its is not None:
            compared.update({f"{name}/{key}": value for key, value in _compared(its).items()})
    found.update(sorted(compared.items(), key=lambda each: "/e_" in each[0]))
    return {name: None if value is None else round(value, _DIGITS) for name, value in found.items()}


def tags(experiment: str, variant: str, version: str | None, role: str) -> dict[str, str]:
    """By which a variant's run is found."""
    told = {"experiment": experiment, "variant": variant, "version": version, "role": role}
    return {TAG + name: value for name, value in told.items() if value is not None}


def standing(trial: Trial, stage: str, decision: Decision, serves: str | None) -> dict[str, Any]:
    """How the experiment stands, as tags."""
    told = {"state": trial.state, "stage": stage, "decision": decision.verdict, "reason": decision.reason}
    return {TAG + name: value for name, value in {**told, "serves": serves}.items() if value is not None}


def note(experiment: str, variant: str, version: str | None, role: str) -> str:
    """The description of a variant's run."""
    named = "" if version is None else f" ({version})"
    return NOTE.format(experiment=experiment, variant=variant, version=named, role=role)


def _about(decision: Decision, variant: str, metric: str) -> MetricEvidence | None:
    its = decision.candidates.get(variant)
    return None if its is None else next((each for each in its.metrics if each.metric == metric), None)


def _compared(its: MetricEvidence) -> dict[str, float | None]:
    shown = its.interval
    proof = {"e_better": its.better, "e_worse": its.worse, "e_no_worse": its.no_worse}
    found = {name: None if value is None else min(value, MOST_PROOF) for name, value in proof.items()}
    if shown is not None:
        found.update(difference=shown.difference, low=shown.low, high=shown.high)
    return found
