"""Online experiments: which version of a program is better for real users, and when it is safe to say so.

Pure arithmetic, one room beside the optimizers. `betting` has the bets and `expecting` what they go by; `comparing`
places them for one metric of one candidate, on what `scores` and `amounts` say. `evidence` holds all of an experiment
and makes checkpoints; `decisions` says what to do, with `alphas` for how much proof that needs and `trust` for whether
there is any; `intervals` is for people to look at; `planning` foretells how many units it takes.
"""

from __future__ import annotations

from dspy_prod.experiments.decisions import CandidateDecision, Decision, MetricEvidence
from dspy_prod.experiments.evidence import Evidence, Exposure, Outcome
from dspy_prod.experiments.intervals import Interval

__all__ = ["CandidateDecision", "Decision", "Evidence", "Exposure", "Interval", "MetricEvidence", "Outcome"]
