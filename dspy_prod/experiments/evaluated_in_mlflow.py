"""An evaluation in MLflow: a run for each variant, with its scores, its cost and its traces, side by side.

Told through the queue of the traces, to the process that writes them; without tracking nothing is told.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from dspy_prod.experiments.offline import OfflineReport, OfflineScores
from dspy_prod.experiments.traced import assessed, bare
from dspy_prod.experiments.variant_figures import TAG, tags
from dspy_prod.experiments.variants import Variant
from dspy_prod.experiments.variants_in_mlflow import address
from dspy_prod.privacy.names import bare_url
from dspy_prod.tracking import setup
from dspy_prod.tracking.run_messages import RunMessages, TrackedRun

WAIT: Final = 30.0
"""Seconds for which an evaluation waits for MLflow to say where its runs are; it has taken minutes itself. An MLflow
that cannot be reached is not waited for: the runs follow, and only the link is missing."""
SCORE: Final = "score"
"""As which MLflow shows the scores."""

_DIGITS: Final = 4
_NOTE: Final = (
    "Variant **{variant}** of the experiment **{experiment}**, {role}, on {examples} examples, before any traffic.\n\n"
    "{summary}"
)


def written(
    report: OfflineReport, variants: Sequence[Variant], traces: Mapping[str, Mapping[int, str]]
) -> OfflineReport:
    """Tell MLflow what was found, while tracking is on; the report, with the address of the page that compares it.

    Args:
        report: of the evaluation. variants: control first. traces: ids by variant, and by the example's place.
    """
    courier = setup.courier()
    if courier is None:
        return report
    told = RunMessages(f"evaluation/{report.experiment}/{uuid.uuid4().hex[:8]}")
    times = Counter(trace for its in traces.values() for trace in its.values())
    runs: dict[str, TrackedRun] = {}
    for variant, scores in zip(variants, report.variants, strict=True):
        runs[variant.name] = _told(told, report, variant, scores)
        for place, trace in traces.get(variant.name, {}).items():
            score = scores.scores[place]
            if score is not None and times[trace] == 1:  # else it is a trace of several answers
                assessed(trace, SCORE, score, "code", None)
        runs[variant.name].link(f"tr-{bare(trace)}" for trace in traces.get(variant.name, {}).values())
        runs[variant.name].end()
    return replace(report, url=_url(courier, runs, report))


def _told(told: RunMessages, report: OfflineReport, variant: Variant, scores: OfflineScores) -> TrackedRun:
    role = "control" if variant.name == report.variants[0].variant else "candidate"
    result = report.results.get(variant.name)
    named = {
        **tags(report.experiment, variant.name, variant.version, role), TAG + "evaluation": told.scope,
        TAG + "stopped_by": report.stopped_by, **({} if result is None else {TAG + "result": result}),
    }  # fmt: skip
    run = told.open(
        f"{variant.name} ({report.experiment}, offline)", key=variant.name, tags=named,
        params={"examples": report.examples, "margin": report.margin},
        note=_NOTE.format(
            variant=variant.name, experiment=report.experiment, role=role, examples=report.examples,
            summary=report.summary,
        ),
    )  # fmt: skip
    found: dict[str, float | None] = {
        SCORE: scores.mean, "answered": scores.answered, "failed": scores.failed,
        "usd_per_1000_calls": scores.usd_per_1000, "latency_s": scores.seconds,
    }  # fmt: skip
    paired = report.paired.get(variant.name)
    if paired is not None:
        found |= {f"{SCORE}/{name}": getattr(paired, name) for name in ("difference", "low", "high", "p_value")}
    run.log({name: None if value is None else round(value, _DIGITS) for name, value in found.items()})
    return run


def _url(courier: Any, runs: Mapping[str, TrackedRun], report: OfflineReport) -> str | None:
    """The page that compares the first candidate with control; None where MLflow has not said so in time."""
    where, until = setup.status(), time.monotonic() + WAIT
    while any(run.id is None for run in runs.values()) or courier.messages.experiment is None:
        where = setup.status()
        if where is None or where.failing or time.monotonic() >= until:
            return None
        time.sleep(0.02)
    if where is None:
        return None
    ids = {variant: run.id for variant, run in runs.items()}
    kept = {"uri": bare_url(where.uri), "experiment": courier.messages.experiment, "runs": ids}
    return address(kept, [each.variant for each in report.variants])
