"""Every variant answers every example, on nobody's traffic: nothing is exposed, nothing counts for the experiment.

An example is answered by all variants before the next one, so that what a budget pays for can be compared. As within
`dspy.Evaluate`, no fallback answers: what fails by the program's own fault scores 0, and what could not be asked has no
score.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

import dspy
from dspy.utils.exceptions import LMError

from dspy_prod.compat.scoring import number
from dspy_prod.context.current import call_context, current, merged_tags, use
from dspy_prod.context.scoring import raising
from dspy_prod.errors import BudgetExceededError, ConfigError, DeadlineExceededError, RejectedError
from dspy_prod.experiments.offline import OfflineReport, OfflineScores
from dspy_prod.experiments.variants import Variant
from dspy_prod.lm.lm import LM
from dspy_prod.pipeline.outcome import is_of_the_request
from dspy_prod.policies.run import Run, refused_by
from dspy_prod.production.collecting import Records
from dspy_prod.records import NANO, CallRecord
from dspy_prod.statistics.paired import Paired, paired
from dspy_prod.stores.base import Store

TAG: Final = "offline"
"""Tag of the calls in the ledger; its value is the experiment, that of `variant` the variant."""


@dataclass
class _Told:
    """What a variant has done so far."""

    scores: dict[int, float | None] = field(default_factory=dict)
    failed: int = 0
    list_nano: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    traces: dict[int, str] = field(default_factory=dict)


class Evaluation:
    """One evaluation of an experiment's variants.

    Args:
        experiment: its name. variants: control first. devset: examples with inputs. metric: as `dspy.Evaluate` takes
            it: `metric(example, prediction)` tells a number, a bool, or `dspy.Prediction(score=...)`.
        store: where a budget is counted.

    Raises:
        ConfigError: there are no examples, or one has no inputs; the metric cannot be called.
    """

    def __init__(
        self, experiment: str, variants: Sequence[Variant], devset: Sequence[Any], metric: Callable[..., Any],
        store: Store,
    ) -> None:  # fmt: skip
        self._where = f"Experiment({experiment!r}).evaluate"
        self._experiment, self._variants, self._metric, self._store = experiment, variants, metric, store
        if not callable(metric):
            raise ConfigError(f"{self._where}: metric= takes a function of (example, prediction), got {metric!r}")
        self._devset = list(devset)
        if not self._devset:
            raise ConfigError(f"{self._where}: devset is empty: give examples, each .with_inputs(...)")
        for place, each in enumerate(self._devset):
            try:
                each.inputs()
            except (AttributeError, ValueError):
                raise ConfigError(
                    f"{self._where}: devset[{place}] has no inputs: dspy.Example(...).with_inputs('message')"
                ) from None
        self._foreign = {each.name: lm for each in variants if (lm := _foreign(each)) is not None}
        self._told = {each.name: _Told() for each in variants}
        self._faults: Counter[str] = Counter()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def run(self, margin: float, budget_usd: float | None, num_threads: int | None) -> OfflineReport:
        """Answer everything, as far as the money goes.

        Raises:
            ConfigError: an argument is impossible, or the metric tells something that is no number.
            RejectedError: a call was refused for another reason than this budget.
        """
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not (isfinite(margin) and margin >= 0):
            raise ConfigError(f"{self._where}: margin={margin!r}: by how much a mean may be lower, 0 or more")
        if budget_usd is not None and self._foreign:
            variant, lm = next(iter(self._foreign.items()))
            raise ConfigError(
                f"{self._where}: budget_usd= cannot hold {type(lm).__name__}({getattr(lm, 'model', '?')!r}) of "
                f"{variant!r}: make it a dspy_prod.LM (or dspy_prod.wrap it), or leave out budget_usd"
            )
        name = f"{self._experiment} offline {uuid.uuid4().hex[:8]}"
        run = None if budget_usd is None else Run(name, usd=budget_usd, store=self._store)
        records = Records(current().records)
        stopped = False
        with nullcontext() if run is None else call_context(run=run), raising():
            # A call of an evaluation belongs to no variant that is live.
            with use(current()._replace(records=records, experiment=None, variant=None, assignments=())):
                try:
                    self._answer(num_threads)
                except BudgetExceededError as error:
                    if run is None or not refused_by(run, error):
                        raise
                    stopped = True
        return self._report(margin, budget_usd, stopped, records)

    @property
    def traces(self) -> dict[str, dict[int, str]]:
        """Ids of the traces of answers by variant, and by the example's place, as far as there are any."""
        with self._lock:
            return {name: dict(told.traces) for name, told in self._told.items()}

    def _answer(self, num_threads: int | None) -> None:
        # One error is enough to end it, and none that a program may make is told; nothing is asked twice.
        every = dspy.Parallel(num_threads=num_threads, max_errors=1, disable_progress_bar=True, timeout=0)
        try:
            every([(self._one, (place,)) for place in range(len(self._devset))])
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def _one(self, place: int) -> None:
        """All variants answer one example; it counts when they all have."""
        try:
            found = [(each.name, *self._ask(each, self._devset[place])) for each in self._variants]
        except Exception as error:
            with self._lock:
                self._error = self._error or error
            raise
        with self._lock:
            for name, score, failed, records, seconds in found:
                told = self._told[name]
                told.scores[place] = score
                told.failed += failed
                trace = next((each.trace_id for each in records if each.trace_id), None)
                if trace is not None:
                    told.traces[place] = trace
                if score is not None:
                    told.list_nano.append(_list_nano(records))
                    if any(not each.cached for each in records):
                        told.seconds.append(seconds)

    def _ask(self, variant: Variant, example: Any) -> tuple[float | None, bool, list[CallRecord], float]:
        """(score, whether it failed, what was called, seconds) of one answer."""
        outer = current()
        records = Records(outer.records)
        tags = merged_tags(outer.tags, {TAG: self._experiment, "variant": variant.name})
        began = time.monotonic()
        try:
            with use(outer._replace(records=records, tags=tags)):
                prediction = variant.program(**example.inputs())
        except Exception as error:
            took = time.monotonic() - began
            if isinstance(error, RejectedError) and not isinstance(error, DeadlineExceededError):
                raise
            mine = not isinstance(error, LMError) or is_of_the_request(error)
            return (0.0, True, records, took) if mine else (None, False, records, took)
        took = time.monotonic() - began
        return self._score(example, prediction), False, records, took

    def _score(self, example: Any, prediction: Any) -> float:
        try:
            told = self._metric(example, prediction)
        except RejectedError:
            raise
        except Exception as error:
            with self._lock:
                self._faults[f"raised {type(error).__name__}"] += 1
            return 0.0
        score = number(told)
        if score is None:
            raise ConfigError(
                f"{self._where}: metric told {type(told).__name__}, which is no number: return a number, a bool, or "
                "dspy.Prediction(score=...)"
            )
        return score

    def _report(
        self, margin: float, budget_usd: float | None, stopped: bool, records: list[CallRecord]
    ) -> OfflineReport:
        places = range(len(self._devset))
        with self._lock:  # an answer that was under way may still come
            scores = {name: tuple([told.scores.get(place) for place in places]) for name, told in self._told.items()}
            variants = [self._scores(each, scores[each.name]) for each in self._variants]
            faults = dict(self._faults)
        costs = [None] if self._foreign else [each.cost_nano for each in [*records]]
        control, *rest = (each.name for each in self._variants)
        compared = {name: _compared(scores[control], scores[name]) for name in rest}
        return OfflineReport(
            experiment=self._experiment, examples=len(self._devset), variants=tuple(variants),
            paired={name: each for name, each in compared.items() if each is not None}, margin=float(margin),
            stopped_by="budget" if stopped else "completed", budget_usd=budget_usd, faults=faults,
            spent_usd=None if None in costs else sum([each or 0 for each in costs]) / NANO,
        )  # fmt: skip

    def _scores(self, variant: Variant, scores: tuple[float | None, ...]) -> OfflineScores:
        told = self._told[variant.name]
        known = [each for each in told.list_nano if each is not None]
        priced = known and len(known) == len(told.list_nano) and variant.name not in self._foreign
        return OfflineScores(
            variant=variant.name, said=variant.exact, scores=scores, failed=told.failed,
            usd_per_1000=1000 * sum(known) / len(known) / NANO if priced else None,
            seconds=sum(told.seconds) / len(told.seconds) if told.seconds else None,
        )  # fmt: skip


def _foreign(variant: Variant) -> Any:
    """An LM of a variant that is none of ours, whose bill nobody knows; None when all are."""
    asked = [predictor.lm or dspy.settings.lm for _, predictor in variant.program.named_predictors()]
    return next((lm for lm in asked if isinstance(lm, dspy.BaseLM) and not isinstance(lm, LM)), None)


def _compared(control: Sequence[float | None], candidate: Sequence[float | None]) -> Paired | None:
    pairs = [(a, b) for a, b in zip(control, candidate, strict=True) if a is not None and b is not None]
    return paired([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _list_nano(records: Sequence[CallRecord]) -> int | None:
    """What an answer costs at list price."""
    costs = [each.list_nano for each in records]
    return None if None in costs else sum([each or 0 for each in costs])
