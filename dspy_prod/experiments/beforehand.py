"""What an experiment tells before anybody is exposed: how long it will take, and what examples say of its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy_prod.experiments.inside import Inside

if TYPE_CHECKING:
    from dspy_prod.experiments.offline import OfflineReport
    from dspy_prod.experiments.planning import Plan


class Beforehand(Inside):
    """The part of an `Experiment` that touches no traffic."""

    def plan(
        self,
        users_per_day: float,
        *,
        baseline: Mapping[str, float | tuple[float, float]] | None = None,
        effect: float | Mapping[str, float] | None = None,
        power: float = 0.8,
    ) -> Plan:
        """How many users and days it takes to decide, at the shares of the last stage. Asks nobody, changes nothing.

        Args:
            users_per_day: new users (or what else `unit=` is) a day, of all variants together.
            baseline: control's mean of each score, in its unit, as `{"resolved": 0.80}`; or mean and standard
                deviation. Of an amount such as `cost`, its standard deviation as a share of its mean.
            effect: by how much a candidate is hoped to be better, in the metric's unit, of amounts as a share: one
                number for all success metrics, or one for each by name. Default: a twentieth of a score's range, a
                tenth of an amount, half of a tail.
            power: the probability with which each claim is to be proven by then.

        Raises:
            ConfigError: a number is impossible, or there is no such metric.

        Example:
            ```python
            print(exp.plan(users_per_day=800, baseline={"resolved": 0.80}, effect=0.05))
            ```
        """
        return self._works.opened.plan(users_per_day, baseline=baseline, effect=effect, power=power)

    def evaluate(
        self,
        devset: Sequence[Any],
        metric: Callable[..., Any],
        *,
        margin: float = 0.0,
        budget_usd: float | None = None,
        num_threads: int | None = None,
    ) -> OfflineReport:
        """Offline first: every variant answers every example, and each candidate is compared with control, paired.

        Nobody is exposed and nothing counts for the experiment; caches are used as by any call, so that what they have
        costs nothing. As in `dspy.Evaluate` no fallback answers: a call that fails scores 0. While tracking is on, each
        variant has a run in MLflow with its scores, cost and traces, and the report has the page that compares them.

        Args:
            devset: examples with inputs.
            metric: as `dspy.Evaluate` takes it: `metric(example, prediction)` tells a number, a bool, or
                `dspy.Prediction(score=...)`; higher is better.
            margin: by how much a candidate's mean may be lower than control's, in units of the metric.
            budget_usd: dollars, at most, judges in the metric included. When they are gone, what was answered by all
                variants is compared, and the gate does not pass.
            num_threads: examples at a time; default: DSPy's setting.

        Returns:
            The comparison; `exp.start(gate=report)` begins only if it passed.

        Raises:
            ConfigError: an argument is impossible, or the metric tells no number.
            RejectedError: a call was refused for another reason than this budget.

        Example:
            ```python
            report = exp.evaluate(devset, metric=accuracy, margin=0.02, budget_usd=2.0)
            exp.start(gate=report)
            ```
        """
        from dspy_prod.experiments.evaluated_in_mlflow import written
        from dspy_prod.experiments.evaluating import Evaluation

        variants = tuple(self.variants.values())
        evaluation = Evaluation(self.name, variants, devset, metric, self._works.store)
        return written(evaluation.run(margin, budget_usd, num_threads), variants, evaluation.traces)
