"""What an experiment and all copies of it share, and what the parts of `Experiment` know of each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dspy_prod.experiments.operating import put
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric

if TYPE_CHECKING:
    from dspy_prod.experiments.assignment import Design
    from dspy_prod.experiments.attending import Attending
    from dspy_prod.experiments.exposing import Exposing
    from dspy_prod.experiments.flights import Flights
    from dspy_prod.experiments.judging import Judges
    from dspy_prod.experiments.opened import Opened
    from dspy_prod.experiments.sample import Sample
    from dspy_prod.experiments.shadow import Shadow
    from dspy_prod.experiments.standing import Standing
    from dspy_prod.experiments.traced import Traced
    from dspy_prod.experiments.variants import Variant
    from dspy_prod.stores.base import Store
    from dspy_prod.stores.trials import Trials

Unit = Literal["user", "session", "tenant"]


@dataclass(frozen=True, eq=False)
class Works:
    """What an experiment and all copies of it share."""

    store: Store
    trials: Trials
    design: Design
    exposing: Exposing
    standing: Standing
    opened: Opened
    shadow: Shadow | None
    judges: Judges | None
    sample: Sample
    traced: Traced
    flights: Flights
    unpriced: list[str] = field(default_factory=list)  # the variant that could not be priced, while it is told

    def __deepcopy__(self, memo: dict[int, Any]) -> Works:
        return self


class Inside:
    """What every part of an `Experiment` goes by.

    Attributes:
        name, metrics, variants, rollout: of the experiment.
    """

    name: str
    metrics: tuple[Metric, ...]
    variants: dict[str, Variant]
    rollout: Rollout | None
    _works: Works
    _unit: Unit
    _calls_last: bool
    _attending: Attending | None
    _tracking_uri: str | None

    @property
    def _control(self) -> str:
        return next(iter(self.variants))

    def _put(self, what: str, reason: str | None = None) -> None:
        put(self._works.trials, self.name, what, reason)
        self._works.standing.look()
