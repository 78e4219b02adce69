"""What MLflow is told of an optimization, as the messages that `tracking.runs_exporter` takes: plain data, no state."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.optimize import figures
from dspy_prod.optimize.candidates import Candidate, Progress
from dspy_prod.policies.answers import SHOWS
from dspy_prod.privacy.outward import outward

if TYPE_CHECKING:
    from dspy_prod.optimize.report import OptimizationReport

_log = logging.getLogger("dspy_prod")

TAG: Final = "dspy_prod."
"""How our tags begin."""
_LONGEST: Final = 5000
"""Characters of a parameter or a tag; MLflow refuses longer ones. Artifacts have the whole text."""
_PLACES: Final = 9
"""Of a metric: MLflow's tables show every digit, and a nano-dollar is the smallest amount."""
_STATUS: Final = {"failed": "FAILED", "interrupted": "KILLED"}
_CAPS: Final = ("budget_usd", "max_calls", "max_tokens", "max_time")
_MARKDOWN: Final = re.compile(r"[\\`*_{}\[\]<>#|!~]")


def beginning(
    progress: Progress, settings: Mapping[str, Any], datasets: Mapping[str, Sequence[Any]], resumed: bool
) -> dict[str, Any]:
    """The run of the compile. A run that goes on may have other caps: parameters keep the first, tags have the last."""
    caps = {name: value for name in _CAPS if (value := getattr(progress, name)) is not None}
    params = {**settings, "optimizer": progress.optimizer, "run": progress.run, **caps}
    named = {TAG + "optimization": short(progress.run)}
    tags = {"optimizer": progress.optimizer, **(caps if resumed else {})}
    return {
        "name": short(progress.run),
        "start": now(),
        "tags": {**named, **{TAG + name: short(value) for name, value in tags.items()}},
        "params": {name: short(value) for name, value in params.items() if value is not None},
        "datasets": [_dataset(*one) for one in datasets.items() if one[1]],
        **({"continues": named} if resumed else {}),
    }


def standing(progress: Progress, step: int) -> dict[str, Any]:
    """How far the run is."""
    best = progress.best
    measured = {
        "best_score": None if best is None else best.score,
        "baseline_score": progress.baseline,
        "spent_usd": progress.spent_usd,
        "calls": progress.calls,
        "tokens": progress.tokens,
        "candidates": len(progress.candidates),
    }
    return {"metrics": _metrics(measured, step)}


def candidate(one: Candidate, best: bool, resumed: bool) -> dict[str, Any]:
    """The run of a candidate.

    All its figures stand at step 0: MLflow's charts then have a bar for each candidate, beside each other, and what is
    told last holds, also when a candidate's number has changed meanwhile.
    """
    measured = {
        "score": one.score,
        "predicted": one.predicted if one.score is None else None,
        "examples": one.examples,
        "cost_usd": one.cost_usd,
        "usd_per_1000": None if one.usd_per_answer is None else 1000 * one.usd_per_answer,
        "tokens": one.tokens,
        "latency_s": one.latency,
        "demos": sum(one.demos.values()),
    }
    name = f"#{one.index} {one.origin}"
    tags = {
        "mlflow.runName": name,  # a number may change while earlier candidates turn out to be some
        TAG + "candidate": str(one.index),
        TAG + "status": one.status,
        TAG + "parents": lineage(one),
        TAG + "state": one.key,
        **({TAG + "best": "true"} if best else {}),
    }
    return {
        "name": short(name),
        "status": "FINISHED" if one.status == "complete" else "KILLED",
        "metrics": _metrics(measured, 0),
        "tags": {name: short(value) for name, value in tags.items()},
        # What earlier parts of the run have paid for it is answered for nothing now, and belongs to its cost.
        **({"continues": {TAG + "state": one.key}, "adds": ["cost_usd", "tokens"]} if resumed else {}),
    }


def content(one: Candidate, *, whole: bool) -> dict[str, Any]:
    """What the program of a candidate is; unless `whole`, only how it came about."""
    said: dict[str, Any] = {"params": {"origin": short(one.origin)}}
    if whole:
        alone = len(one.prompts) == 1
        said["params"].update({
            "prompt" if alone else f"prompt.{_name(name)}": short(text) for name, text in one.prompts.items()
        })  # fmt: skip
        prompts = "\n\n".join(f"# {name}\n\n{text}" for name, text in one.prompts.items())
        state = json.dumps(one.state, default=str, indent=2, ensure_ascii=False)
        said["texts"] = {"prompts.md": outward(prompts), "program.json": outward(state)}
    return said


def outcome(
    progress: Progress, report: OptimizationReport | None, step: int, *, whole: bool
) -> Iterator[dict[str, Any]]:
    """What belongs to the whole run, the most useful first; unless `whole`, without prompts."""
    candidates = progress.candidates if report is None else report.candidates
    rows = [
        [f"#{one.index}", outward(one.origin), lineage(one), one.status, size, round(score, _PLACES // 2)]
        for one in sorted(candidates, key=lambda each: each.status != "minibatch")  # those that were rejected first
        for size, score in one.minibatches
    ]
    if rows:
        columns = ["candidate", "origin", "from", "status", "examples", "score"]
        yield {"tables": {"minibatches.json": {"columns": columns, "data": rows}}}
    if report is None:
        return
    if not whole:
        report = replace(report, warnings=tuple([each.partition(SHOWS)[0].rstrip() for each in report.warnings]))
    found = {  # the best score is told as ever: a figure has one value at a step
        "expected_score": report.expected_score,
        **dict(zip(("expected_low", "expected_high"), report.expected_interval or (), strict=False)),
        "unconfirmed_usd": report.unconfirmed_usd,
        "seconds": report.seconds,
    }
    if report.test is not None:
        found.update(test_score=report.test.best, test_score_given=report.test.given)
    tags = {TAG + "stopped_by": report.stopped_by, "mlflow.note.content": _summary(report)}
    yield {"metrics": _metrics(found, step), "tags": {name: short(text) for name, text in tags.items()}}
    told = report.to_dict()
    if not whole:
        for one in told["candidates"]:
            del one["prompts"]
    yield {"texts": {"report.json": outward(json.dumps(told, indent=2)), "report.txt": str(report)}}
    yield {"texts": {"report.html": f'<meta charset="utf-8">{report._repr_html_()}'}}
    try:
        score = figures.score_against_dollars(
            candidates, spent_usd=report.spent_usd, budget_usd=report.budget_usd,
            baseline=None if report.baseline is None else report.baseline.score,
        )  # fmt: skip
        quality = figures.quality_against_cost(candidates, best=report.best)
    except ConfigError as error:
        _log.debug("MLflow gets no figures of the optimization: %s", error)
        return
    pictures = {"score_against_dollars.png": score, "quality_against_cost.png": quality}
    yield {"files": {path: base64.b64encode(figures.png(one)).decode("ascii") for path, one in pictures.items()}}


def ending(progress: Progress) -> dict[str, Any]:
    """The end of the run of the compile."""
    return {"status": _STATUS.get(progress.stopped_by or "failed", "FINISHED"), "end": now()}


def lineage(one: Candidate) -> str:
    """The numbers of all that a candidate was made from: `"#3 #7"`."""
    return " ".join(f"#{parent}" for parent in one.parents)


def short(value: Any) -> str:
    """A value as a parameter or a tag may have it."""
    text = outward(str(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return time.time_ns() // 1_000_000


def _metrics(values: Mapping[str, float | None], step: int) -> list[tuple[str, float, int, int]]:
    at = now()
    known = {name: float(value) for name, value in values.items() if value is not None and isfinite(value)}
    return [(name, round(value, _PLACES if "usd" in name else _PLACES // 2), step, at) for name, value in known.items()]


def _summary(report: OptimizationReport) -> str:
    """The run's description, in Markdown."""
    interval = report.expected_interval
    given = None if report.baseline is None else report.baseline.score
    why = f", {_plain(report.detail)}" if report.detail else ""
    lines = [f"**{_plain(report.optimizer)}**, ended: **{report.stopped_by}**{why}"]
    if report.best is not None and report.best_score is not None:
        before = "" if given is None else f", the given program {given:.4g}"
        origin = _plain(report.best.origin)
        lines.append(f"Best program: **#{report.best.index}** ({origin}), score {report.best_score:.4g}{before}")
    if report.expected_score is not None:
        within = "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})"
        lines.append(f"Expected on new examples: **{report.expected_score:.4g}**{within}")
    cap = "" if report.budget_usd is None else f" of ${report.budget_usd:,.4g}"
    lines.append(f"Spent: **${report.spent_usd:,.4f}**{cap}, {report.calls:,} calls, {report.tokens:,} tokens")
    lines += [f"Warning: {_plain(warning)}" for warning in report.warnings[:5]]
    return "\n".join(f"- {line}" for line in lines) + "\n\nThe whole report is the artifact `report.html`."


def _plain(text: str) -> str:
    """A text that others wrote, as Markdown that shows it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _dataset(context: str, examples: Sequence[Any]) -> dict[str, str]:
    from dspy_prod.registry.published.provenance import dataset_name

    told = dataset_name(list(examples)) or ""
    digest = told.removeprefix("sha256:").partition(" ")[0]
    return {"name": f"{context} ({len(examples)} examples)", "digest": digest, "context": context}


def _name(predictor: str) -> str:
    """A predictor's name as MLflow takes it for a parameter: no brackets or quotes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in predictor)
