"""What is known of a run of an optimizer when it has ended, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dspy_prod.optimize import figures
from dspy_prod.optimize.candidates import Candidate, StoppedBy

if TYPE_CHECKING:
    import dspy
    from matplotlib.figure import Figure

    from dspy_prod.optimize.racing import Raced
    from dspy_prod.optimize.rehearsal import Forecast
    from dspy_prod.statistics.paired import Paired


@dataclass(frozen=True)
class Spent:
    """What a part of a run used.

    Attributes:
        usd: dollars. calls: attempts that were sent upstream. tokens: input and output together.
    """

    usd: float = 0.0
    calls: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Selection:
    """The examples by which the best candidate was chosen.

    Attributes:
        size: how many. source: where they come from, as "valset" or "trainset".
    """

    size: int
    source: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Facts:
    """The facts of a run; `OptimizationReport` shows them.

    Attributes:
        run: the run's name. optimizer: the optimizer's class.
        stopped_by: why it ended; detail: the same as a sentence.
        spent_usd: dollars, earlier parts of a resumed run included; unconfirmed_usd: those among them that are
            bounds, of calls whose bill is not known.
        spent_by: by LM, "role/model". phases: by phase.
        calls: attempts sent upstream. cached, replayed: calls that the cache or the run's log answered for nothing.
        first_new: number of the first call that the log did not know, None without a log. tokens: in all.
        seconds: how long it took.
        budget_usd, max_calls, max_tokens, max_time: the caps (max_time in seconds), None without.
        forecast: what was expected before the search, None without.
        baseline: the given program. best: the program that was returned.
        best_score: its mean score on the selection set, which flatters: it is the highest of many noisy numbers.
        expected_score: what to expect on new examples of the same kind. expected_interval: 95 % lie in it.
        test: comparison with the given program on `testset=`, None without.
        candidates: all that were tried. racing: what races saved, None without.
        selection: what the best was chosen by. warnings: what should be known.
        experiment_run: id of the MLflow run, None without.
    """

    run: str
    optimizer: str
    stopped_by: StoppedBy
    detail: str
    spent_usd: float
    unconfirmed_usd: float = 0.0
    spent_by: Mapping[str, Spent] = field(default_factory=dict)
    phases: Mapping[str, Spent] = field(default_factory=dict)
    calls: int = 0
    cached: int = 0
    replayed: int = 0
    first_new: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    budget_usd: float | None = None
    max_calls: int | None = None
    max_tokens: int | None = None
    max_time: float | None = None
    forecast: Forecast | None = None
    baseline: Candidate | None = None
    best: Candidate | None = None
    best_score: float | None = None
    expected_score: float | None = None
    expected_interval: tuple[float, float] | None = None
    test: Paired | None = None
    candidates: tuple[Candidate, ...] = ()
    racing: Raced | None = None
    selection: Selection | None = None
    warnings: tuple[str, ...] = ()
    experiment_run: str | None = None
    _make: Callable[[Candidate], dspy.Module] | None = None

    def plot(self) -> Figure:
        """Two pictures: best score against dollars, and quality against the cost of an answer.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows and `savefig` keeps.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        return figures.both(
            self.candidates,
            spent_usd=self.spent_usd,
            budget_usd=self.budget_usd,
            baseline=None if self.baseline is None else self.baseline.score,
            best=self.best,
        )
