"""A decision's evidence, short enough for the registry's journal: what was decided, why, and what it rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dspy_prod.registry.aliases.journal import SHORT

LONGEST_REASON: Final = 1_000
"""Characters of a reason that are kept."""

_PROVEN: Final = ("better", "worse", "no_worse")


def shortened(said: Mapping[str, Any], most: int = SHORT) -> dict[str, Any]:
    """What a line of an experiment's audit says, in at most so many characters of JSON.

    Verdict and reason are always there. Of each metric of each candidate there are the e-values with what they need,
    units of control and candidate, and the interval; where that is too long, first the intervals are left out, then
    metrics that are unclear, then all metrics.

    Args:
        said: its evidence, as the controller writes it: `{"reason": ..., "decision": Decision.to_dict()}`.
        most: characters.
    """
    decision = said.get("decision") or {}
    kept = {
        "verdict": decision.get("verdict"),
        "reason": _cut(str(said.get("reason", ""))),
        **{key: decision[key] for key in ("winner", "units", "crossed") if decision.get(key) is not None},
        **({} if said.get("forced") is None else {"forced": bool(said["forced"])}),
    }
    candidates: Mapping[str, Any] = decision.get("candidates") or {}
    for level in range(3):
        told = {name: _candidate(each, level) for name, each in candidates.items()}
        found = {**kept, "candidates": told}
        if len(json.dumps(found)) <= most:
            return found
    verdicts = {**kept, "candidates": {name: each.get("verdict") for name, each in candidates.items()}}
    return verdicts if len(json.dumps(verdicts)) <= most else kept


def _candidate(told: Mapping[str, Any], level: int) -> dict[str, Any]:
    metrics = {
        each["metric"]: _metric(each, intervals=level == 0)
        for each in told.get("metrics", ())
        if level < 2 or each["status"] in ("better", "worse", "void")
    }
    return {"verdict": told.get("verdict"), "metrics": metrics}


def _metric(told: Mapping[str, Any], intervals: bool) -> dict[str, Any]:
    interval = told.get("interval")
    proven = {claim: [_round(told[claim]), _round(told[f"{claim}_at"])] for claim in _PROVEN if told[claim] is not None}
    shown = {}
    if intervals and interval is not None:
        shown["interval"] = [_round(interval[part]) for part in ("difference", "low", "high")]
    return {
        "status": told["status"], "e_values": proven, "units": [told["control_units"], told["candidate_units"]], **shown
    }  # fmt: skip


def _round(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
