"""What a metric says of an answer: a number, or nothing that could be one, which counts as a score of 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from dspy_prod.compat.scoring import number
from dspy_prod.context.current import begin, current, merged_tags
from dspy_prod.errors import ConfigError
from dspy_prod.optimize.camera import ASIDE, FAILURE, Camera


class Scored:
    """Watches metrics for a camera.

    Args:
        camera: knows whose answer it is, and notes the score.

    Attributes:
        faults: how often a metric has told no score in an evaluation, by what it did instead.
    """

    def __init__(self, camera: Camera) -> None:
        self._camera = camera
        self.faults: Counter[str] = Counter()

    def watched(self, metric: Callable[..., Any], rich: bool) -> Callable[..., Any]:
        """The metric, seen; as a number for optimizers that do not understand a `Prediction(score=, feedback=)`.

        Where it tells no number it tells 0, so that no sum of scores ends an evaluation; what it raises it raises.
        """

        @wraps(metric, updated=())
        def seen(*args: Any, **kwargs: Any) -> Any:
            context = current()
            scope = begin(context._replace(tags=merged_tags(context.tags, {"candidate": ASIDE, "role": "metric"})))
            traced = kwargs.get("trace", args[2] if len(args) > 2 else None) is not None
            try:
                told = metric(*args, **kwargs)
            except Exception as error:
                if self._camera.blames_program(error):
                    self._note(args, None, traced, f"raised {type(error).__name__}: {error}")
                raise
            finally:
                scope.end()
            score = number(told)
            self._note(args, score, traced, "" if score is not None else f"told {told!r}, which is no number")
            if score is None:
                return FAILURE
            return told if rich or isinstance(told, (bool, int, float)) else score

        return seen

    def _note(self, args: tuple[Any, ...], score: float | None, traced: bool, fault: str) -> None:
        if fault and not traced:  # with a trace, None says: this is no demonstration
            self.faults[fault] += 1
        if len(args) >= 2:
            self._camera.scored(args[0], args[1], FAILURE if score is None else score, traced, failed=score is None)

    def refuse_untold(self) -> None:
        """After the first examples: nothing comes of a metric that tells no numbers even there.

        Raises:
            ConfigError: it has told something else; that it raises may be an example's fault.
        """
        untold = next((fault for fault in self.faults if fault.startswith("told ")), None)
        if untold is not None:
            raise ConfigError(
                f"BudgetedOptimizer: metric: it {untold}, for the first example. It has to tell a number, a bool, or "
                "dspy.Prediction(score=...), when it is called as metric(example, prediction)"
            )

    def warnings(self) -> list[str]:
        """What there is to tell of metrics that told no score."""
        found = self.faults.most_common(3)
        if not found:
            return []
        said = "; ".join(f"{times}x it {what[:200]}" for what, times in found)
        return [f"the metric told no score for {self.faults.total()} answers, which count as {FAILURE:g}: {said}"]
