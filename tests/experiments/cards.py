"""Scorecards of made-up experiments: evidence is told units drawn at random, as a controller would."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from dspy_prod.experiments.evidence import Evidence, Exposure
from dspy_prod.experiments.history import History
from dspy_prod.experiments.scorecard import Scorecard, scorecard
from dspy_prod.options.metrics import Metric, guardrails
from dspy_prod.stores.trials import Arm, Decision, Tally, Trial

BEGAN = 1_790_000_000.0
STAGES = ("shadow", "5 %", "50 %")
SHARES = (0.0, 0.05, 0.5)
RESOLVED = Metric("resolved", margin=0.02)


def told(
    units: int,
    *,
    quality: float = 0.0,
    cost: float = 1.0,
    candidates: Sequence[str] = ("cot",),
    control: str = "control",
    metrics: Sequence[Metric] = (RESOLVED,),
    seed: int = 1,
) -> tuple[Evidence, History, list[Arm]]:
    """Evidence of so many units.

    Args:
        quality: by how much the first candidate is better than control's 0.8. cost: by which factor it is dearer.
    """
    draw = random.Random(seed)
    every = (*metrics, *guardrails())
    evidence = Evidence(every, candidates, control=control)
    history = History(len(every), len(candidates))
    counts: dict[tuple[int, str], int] = {}
    for number in range(1, units + 1):
        stage = 1 if number <= units // 4 else 2
        share = SHARES[stage] / len(candidates)
        shares = {control: 1 - SHARES[stage], **dict.fromkeys(candidates, share)}
        arm = draw.choices(list(shares), list(shares.values()))[0]
        exposure, first = Exposure(arm, shares, str(stage)), arm == candidates[0]
        counts[stage, arm] = counts.get((stage, arm), 0) + 1
        values = {
            "error_rate": float(draw.random() < 0.01), "fallback_rate": float(draw.random() < 0.02),
            "cost": draw.lognormvariate(-8, 0.6) * (cost if first else 1.0),
            "latency": draw.lognormvariate(-0.3, 0.5),
        }  # fmt: skip
        evidence.exposed(exposure)
        for metric in every:
            right = float(draw.random() < 0.8 + (quality if first else 0.0))
            evidence.matured(metric.name, exposure, values.get(metric.name, right))
            history.see(evidence, metric.name, number, BEGAN + 60.0 * number)
    return evidence, history, [Arm(stage, arm, 0, many, many, 0) for (stage, arm), many in counts.items()]


def card(
    units: int = 2_000, *, name: str = "triage-cot", state: str = "running", late: int = 0, **world: Any
) -> Scorecard:
    """The card of such an experiment; see `told`."""
    evidence, history, counts = told(units, **world)
    decision = evidence.look()
    trial = Trial(name, "{}", {None: 0.0}, 0.0, state, 2, BEGAN + 3600, 3, BEGAN)
    variants = (evidence.control, *evidence.candidates)
    audit = [
        Decision("start", "operator", json.dumps({"reason": "by hand"}), BEGAN, 1),
        Decision("stage", "controller", json.dumps({"reason": "stage 1 of the rollout"}), BEGAN + 1800, 2),
        Decision("stage", "controller", json.dumps({"reason": "stage 2 of the rollout"}), BEGAN + 3600, 3),
    ]
    serves = None
    if state == "decided":
        serves = decision.winner or evidence.control
        why = json.dumps({"reason": decision.reason})
        audit.append(Decision(decision.verdict, "controller", why, BEGAN + 60.0 * units, 4))
    return scorecard(
        trial, STAGES[2], decision, counts, Tally(units, 0, late, 0, 0), variants, serves, (),
        metrics=evidence.metrics, stages=STAGES, audit=audit, history=history.looks(evidence),
    )  # fmt: skip
