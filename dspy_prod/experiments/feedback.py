"""What people say of traces in MLflow counts as outcomes: an assessment named as a metric, of the unit that called.

Read at the controller's looks, a part at a time, by the process that writes to MLflow: no look waits for it longer than
`FIRST` seconds, and none while MLflow cannot be reached. What is said again is a correction; what a corrected outcome
or a late one counts for is the store's business, as with `exp.record`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dspy_prod.context.assignments import TAG
from dspy_prod.errors import ConfigError
from dspy_prod.experiments.declaration import Declaration, source_of
from dspy_prod.options.metrics import Metric
from dspy_prod.stores.trials import Outcome, Trial, Trials
from dspy_prod.tracking.questions import Questions

EVERY: Final = 10.0
"""Seconds between two readings."""
FIRST: Final = 5.0
"""Seconds for which the first look of a process waits for an answer: a cron job has no other. Later ones: `THEN`."""
THEN: Final = 0.5
_KNOWN: Final = 50_000
_LATE: Final = 60.0
"""Seconds by which a trace may be older than the windows say."""

_log = logging.getLogger("dspy_prod")


class Feedback:
    """Reads MLflow's assessments into the outcomes of one experiment.

    Args:
        name: the experiment's. trials: where outcomes go. metrics: of the experiment.
        judged: metrics that their judges tell. tracking_uri: where to look while tracking is off; None: nowhere.
    """

    def __init__(
        self,
        name: str,
        trials: Trials,
        metrics: Sequence[Metric],
        judged: Mapping[str, float],
        tracking_uri: str | None = None,
    ) -> None:
        self._name, self._trials = name, trials
        self._metrics = {each.name: each for each in metrics if source_of(each) and each.name not in judged}
        self._questions = Questions(tracking_uri)
        self._page: list[Any] | None = None
        self._since = 0
        self._again_at = -math.inf
        self._waits = FIRST
        self._seen: OrderedDict[str, tuple[float, Any]] = OrderedDict()

    def look(self, trial: Trial) -> int:
        """Take in what there is to be had, and ask for more; how many outcomes there were."""
        if not self._metrics:
            return 0
        found = self._take(trial, 0.0)
        due = self._page is not None or time.monotonic() >= self._again_at
        if due and not self._questions.open and self._ask(trial):
            waits, self._waits = self._waits, THEN
            found += self._take(trial, waits)
        return found

    def _ask(self, trial: Trial) -> bool:
        if self._page is None:
            self._again_at = time.monotonic() + EVERY
            longest = max(trial.windows.get(name, 0.0) for name in self._metrics)
            oldest = max(trial.created, self._trials.now() - longest - trial.grace - _LATE)
            self._since = int(1000 * oldest)
        asked = {
            "names": list(self._metrics), "since": self._since, "page": self._page,
            "tags": {"dspy_prod.experiment": self._name, f"dspy_prod.tag.{TAG}{self._name}": "%"},
        }  # fmt: skip
        try:
            return self._questions.ask({"assessments": asked})
        except ConfigError as error:
            _log.warning("No feedback from MLflow counts in the experiment %s: %s", self._name, error)
            self._metrics = {}
            return False

    def _take(self, trial: Trial, seconds: float) -> int:
        answer = self._questions.answer(seconds)
        if answer is None:
            if not self._questions.open:
                self._page = None  # what was refused, or never answered, is asked from the start
            return 0
        self._page = answer["page"]
        unit = Declaration.from_json(trial.declaration).unit
        return sum([self._kept(one, one.get(unit), trial.created) for one in answer["found"]])

    def _kept(self, told: Mapping[str, Any], unit: str | None, made: float) -> bool:
        """Keep one assessment as an outcome, unless it is known."""
        said = (float(told["at"]), told["value"])
        if self._seen.get(told["id"]) == said:
            return False
        self._seen[told["id"]] = said
        if len(self._seen) > _KNOWN:
            self._seen.popitem(last=False)
        metric, value = self._metrics[told["name"]], told["value"]
        why = None if unit else "its trace names nobody"
        if isinstance(value, str):
            why = f"{value!r} is neither a boolean nor a number"
        else:
            try:
                value = metric.checked(value)
            except (TypeError, ValueError) as error:
                why = str(error)
        if why is not None or unit is None:
            _log.warning(
                "Feedback %r on trace %s does not count in the experiment %s: %s",
                told["name"], told["trace"], self._name, why,
            )  # fmt: skip
            return False
        id = f"mlflow:{told['id']}"
        self._trials.outcome(Outcome(self._name, unit, metric.name, float(value), said[0], id, made))
        return True
