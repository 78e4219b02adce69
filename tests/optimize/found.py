"""Candidates as a run of some optimizer finds them, made by chance from a seed."""

from __future__ import annotations

import random
from typing import Any

import dspy

from dspy_prod.optimize.candidates import Candidate
from dspy_prod.optimize.report import OptimizationReport, Selection, Spent


def found(count: int = 16, seed: int = 7, examples: int = 60) -> tuple[Candidate, ...]:
    """The given program and `count` more: most complete, some dropped by a race, two only on minibatches."""
    chance, spent, made = random.Random(seed), 0.0, list[Candidate]()
    for index in range(count + 1):
        demos = 0 if index == 0 else chance.randint(0, 4)
        quality = min(0.97, 0.55 + 0.06 * demos + 0.012 * index + chance.gauss(0, 0.05))
        price = 0.00021 + 0.00006 * demos + chance.random() * 0.00003
        raced = index > 4 and chance.random() < 0.25
        minibatch = index in (3, count)
        asked = 10 if minibatch else examples // 3 if raced else examples
        spent += asked * price
        scores = {place: float(chance.random() < quality) for place in range(asked)}
        mean = sum(scores.values()) / len(scores)
        whole = not raced and not minibatch
        made.append(
            Candidate(
                index=index,
                key=f"key-{index}",
                origin="given program" if index == 0 else f"trial {index}",
                status="complete" if whole else "raced" if raced else "minibatch",
                parents=() if index == 0 else (chance.randrange(index),),
                score=mean if whole else None,
                predicted=mean if raced else None,
                examples=0 if minibatch else asked,
                scores={} if minibatch else scores,
                cost_usd=asked * price,
                usd_per_answer=price,
                tokens=asked * (180 + 90 * demos),
                latency=0.4 + 0.05 * demos,
                prompts={"classify": f"Sort the customer's message. Take care, and think of rule {index}."},
                demos={"classify": demos},
                state={"classify": {"demos": [], "signature": {"instructions": f"rule {index}"}}},
                found_usd=None if minibatch else spent,
                minibatches=((asked, mean),) if minibatch else (),
            )
        )
    return tuple(made)


def best_of(candidates: tuple[Candidate, ...]) -> Candidate:
    """The one with the highest score."""
    return max((one for one in candidates if one.score is not None), key=lambda one: (one.score or 0.0, -one.index))


def report(tried: tuple[Candidate, ...] | None = None, **given: Any) -> OptimizationReport:
    """The report of such a run."""
    tried = found() if tried is None else tried
    best = best_of(tried)
    whole: dict[str, Any] = {
        "run": "triage",
        "optimizer": "MIPROv2",
        "stopped_by": "budget",
        "detail": "the next call could have cost more than was left of $0.5",
        "spent_usd": sum(one.cost_usd for one in tried),
        "spent_by": {"task/openai/small": Spent(0.2, 700, 90_000), "prompt/openai/large": Spent(0.07, 20, 30_000)},
        "phases": {"baseline": Spent(0.02, 60, 9_000), "search": Spent(0.25, 660, 111_000)},
        "calls": 720,
        "cached": 12,
        "tokens": 120_000,
        "seconds": 754.0,
        "budget_usd": 0.5,
        "baseline": tried[0],
        "best": best,
        "best_score": best.score,
        "expected_score": 0.9,
        "expected_interval": (0.84, 0.95),
        "candidates": tried,
        "selection": Selection(60, "valset"),
        "warnings": ("valset is not used by the optimizer; it selects the result",),
        "_make": program,
    }
    return OptimizationReport(**{**whole, **given})


def program(candidate: Candidate) -> dspy.Module:
    """The candidate as a program."""
    made = dspy.Predict(dspy.Signature("message -> category", candidate.prompts["classify"]))
    made.demos = [dspy.Example(message=f"m{n}", category="billing") for n in range(candidate.demos["classify"])]
    return made
