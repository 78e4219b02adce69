"""Judges: a DSPy metric scores a sample of the live answers, in the background and within a budget.

Who is judged is drawn by unit, apart from who gets which variant; what the judge sees does not say which variant
answered. The caller has his answer and waits for nothing: what is to be judged stands in a short queue, which a thread
of its own empties; what finds it full is left out. No failure of a judge reaches anybody.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, Literal, NamedTuple

import dspy

from dspy_prod.context.current import EMPTY, call_context, use
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.aside import Aside, settings_here
from dspy_prod.experiments.declaration import BUILT_IN, still_there
from dspy_prod.experiments.purse import Piece, Purse
from dspy_prod.experiments.sample import RESUMED, SPENT, Sample, last_budget
from dspy_prod.experiments.traced import shown_as
from dspy_prod.options.metrics import Metric
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.base import Store
from dspy_prod.stores.trials import Decision, Outcome

_KNOWN: Final = 50_000
"""Units of which is remembered that they were judged, for metrics that count the first value alone."""

_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True)
class Judge:
    """Scores a sample of an experiment's live answers, for the metric under which it stands in `judges=`.

    That metric says what the score is worth: `Metric("quality", judge="untrusted")` may end a candidate, and never
    promotes it alone; `judge="trusted"` may, as does a metric that is plain code.

    It is told the inputs as a `dspy.Example` and the answer as a `dspy.Prediction`, not the variant. Its calls have low
    priority and a context of their own: they cost no variant anything, count for nobody's budget, and carry the tag
    `judge`. Calls that failed have no answer to be judged; a unit in the sample without a score is missing, as
    `Metric(missing=)` says. Units outside of the sample count for nothing.

    Args:
        metric: `metric(example, prediction)`, as `dspy.Evaluate` takes it: a function, or a module. It gives a number,
            a boolean, or a prediction with a `score`.
        share: of the units, above 0, at most 1; the same for all variants.
        usd: what its calls may cost over the whole experiment, in all processes, in USD; None: no cap. Only calls of
            `dspy_prod.LM` can be capped. An answer that is larger than what is left is a unit without a score. Once
            that is below a usual call, or five answers in a row were too large, it is used up: nobody is drawn any
            more, in any process, until one has the experiment with a higher one; units of that time are not in the
            sample.

    Raises:
        ConfigError: an impossible value.

    Example:
        ```python
        exp = dspy_prod.Experiment(
            "triage-cot", variants={"control": plain, "cot": cot},
            metrics=[dspy_prod.Metric("resolved"), dspy_prod.Metric("quality", judge="untrusted")],
            judges={"quality": dspy_prod.Judge(polite, share=0.1, usd=5.0)},
        )
        ```
    """

    metric: Callable[..., Any]
    share: float = 0.1
    usd: float | None = 1.0

    def __post_init__(self) -> None:
        if not callable(self.metric) or inspect.iscoroutinefunction(self.metric):
            raise ConfigError(f"Judge(metric={self.metric!r}) takes a function of (example, prediction), not async")
        if not isinstance(self.metric, dspy.Module):
            try:
                inspect.signature(self.metric).bind(None, None)
            except TypeError as error:
                raise ConfigError(
                    f"Judge: metric(example, prediction) is what it is called as, which it does not take ({error}). "
                    "Give its other parameters a default, as trace=None"
                ) from None
            except ValueError:  # it is written in C
                pass
        for name, number, most in (("share", self.share, 1.0), ("usd", self.usd, float("inf"))):
            if number is None and name == "usd":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= most:
                raise ConfigError(f"Judge({name}={number!r}) is above 0{', at most 1' if name == 'share' else ''}")
            if not isfinite(number):
                raise ConfigError(f"Judge({name}={number!r}): None is no cap")

    @property
    def name(self) -> str:
        """Of its metric, as tracking shows who has judged."""
        return str(getattr(self.metric, "__name__", type(self.metric).__name__))


def checked_judges(where: str, judges: Mapping[str, Judge] | None, metrics: Sequence[Metric]) -> dict[str, Judge]:
    """The judges, each of a metric that says what its score is worth.

    Raises:
        ConfigError: names the metric that is not declared, or says nothing of its judge.
    """
    known = {metric.name: metric for metric in metrics if metric.name not in BUILT_IN}
    for name, judge in (judges or {}).items():
        if not isinstance(judge, Judge):
            raise ConfigError(f"{where}: judges={{{name!r}: ...}} takes dspy_prod.Judge, got {type(judge).__name__}")
        if name not in known:
            own = "calls tell it by themselves" if name in BUILT_IN else f"metrics= has {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: judges={{{name!r}: ...}} is of no metric that can be judged: {own}")
        if known[name].judge is None:
            raise ConfigError(
                f"{where}: judges={{{name!r}: ...}}: say what its score is worth: Metric({name!r}, judge='untrusted') "
                "never promotes alone; 'trusted' may, as a metric that is plain code"
            )
    return dict(judges or {})


class _Answer(NamedTuple):
    metric: str
    unit: str
    at: float
    trace: str | None
    inputs: dict[str, Any]
    prediction: Any
    settings: dict[str, Any]


class Judges:
    """Has a sample of the answers judged.

    Args:
        experiment: its name. salt: its own, by which one of the same name that is made later has budgets of its own.
        store: where scores and budgets are kept. judges: by metric. metrics: the experiment's.
        sample: whom they look at. assessed: told of each score, see `traced.assessed`.
        made: when the experiment was, see `stores.trials.Outcome`.
    """

    _lock: threading.Lock

    def __init__(
        self, experiment: str, salt: str, store: Store, judges: Mapping[str, Judge], metrics: Sequence[Metric],
        sample: Sample,
        assessed: Callable[[str, str, float, Literal["code", "llm_judge"], str | None], None] = lambda *_: None,
        made: float | None = None,
    ) -> None:  # fmt: skip
        self._made = made
        self._name, self._salt, self._trials, self._sample = experiment, salt, store.trials, sample
        self._judges = dict(judges)
        self._metrics = {metric.name: metric for metric in metrics}
        self._assessed = assessed
        self._purses = {
            name: Purse(f"judge {name} of {experiment} ({salt[:8]})", usd=judge.usd, store=store)
            for name, judge in judges.items()
            if judge.usd is not None
        }
        self._spent: dict[str, bool] = {}  # by this process; whether the audit has it
        self._ended: set[str] = set()  # by any, as the audit has it
        self._warned: set[str] = set()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._aside: Aside[_Answer] = Aside("dspy_prod-judge", self._work)
        self._after_fork()
        reset_after_fork(self)
        for name, judge in judges.items():
            self._resume(name, judge.usd)

    def _resume(self, name: str, usd: float | None) -> None:
        """Draw again where a budget that was used up, here or in another process, is higher now; not where it is not.

        Whoever draws on meanwhile would pay for scores that count nowhere.
        """
        what, cap = last_budget(name, self._trials.decisions(self._name))
        raised = cap is not None and (usd is None or usd > cap)
        if what == SPENT and not raised:
            self._ended.add(name)
            return
        self._ended.discard(name)
        if what == SPENT:
            told = {"reason": f"the budget of the judge of {name} was raised", "metric": name, "usd": usd}
            self._trials.decide(self._name, Decision(RESUMED, "judge", json.dumps(told)))

    def offer(
        self, unit: str, at: float, trace: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], prediction: Any
    ) -> None:
        """Have an answer judged, perhaps. Never waits, never raises.

        Args:
            unit: who got it. at: when it was asked for. trace: its trace's id, if it has one.
            args, kwargs: what was asked; judges are told what has no name as `arg0`, `arg1`, ...
            prediction: what was answered.
        """
        for metric in self._judges:
            if not self._spent.get(metric) and self._sample.takes(metric, unit) and self._first(metric, unit):
                self._offer(metric, unit, at, trace, args, kwargs, prediction)

    def _first(self, metric: str, unit: str) -> bool:
        """Whether a score would count: of some metrics a unit has but one."""
        options = self._metrics[metric]
        if options.window and options.per == "unit":
            return True
        with self._lock:
            if (metric, unit) in self._known:
                return False
            self._known[metric, unit] = None
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return True

    def _offer(
        self, metric: str, unit: str, at: float, trace: str | None, args: tuple[Any, ...], kwargs: dict[str, Any],
        prediction: Any,
    ) -> None:  # fmt: skip
        try:
            inputs = copy.deepcopy({**{f"arg{place}": each for place, each in enumerate(args)}, **kwargs})
            # without the report, which says which variant it was
            answer = dspy.Prediction(**prediction) if isinstance(prediction, dspy.Prediction) else prediction
            answer = copy.deepcopy(answer)
        except Exception as error:
            self._warn(f"an answer cannot be copied for it ({type(error).__name__})", metric)
            return
        self._aside.offer(_Answer(metric, unit, at, trace, inputs, answer, settings_here()))

    @property
    def left_out(self) -> int:
        """Answers for which there was no room."""
        return self._aside.left_out

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait until nothing is left to be judged."""
        return self._aside.wait(timeout)

    def _work(self, answer: _Answer) -> None:
        name = answer.metric
        if not self._spent.get(name) and self._is_there() and (name in self._spent or self._is_drawn(name)):
            self._judge(answer)

    def _is_drawn(self, name: str) -> bool:
        """Whether its judge looks at units now; what was known last holds where the store cannot be used."""
        with suppress(StoreUnavailableError):
            self._resume(name, self._judges[name].usd)
        return name not in self._ended

    def _is_there(self) -> bool:
        """Whether it was not removed: nothing is asked for an experiment that is forgotten, nor told of the next one
        of its name. Where the store cannot be read, it was not."""
        try:
            return still_there(self._trials, self._name, self._salt) is not None
        except StoreUnavailableError:
            return True

    def _judge(self, answer: _Answer) -> None:
        """Have one answer judged, and keep the score."""
        judge, purse, name = self._judges[answer.metric], self._purses.get(answer.metric), answer.metric
        if name in self._spent:
            self._end(name)  # the store could not be told before
            return
        example = dspy.Example(**answer.inputs).with_inputs(*answer.inputs)
        run = None if purse is None else Piece(purse)
        score, value, failed = None, 0.0, None
        try:
            with (
                dspy.context(**answer.settings),
                use(EMPTY._replace(aside=True)),
                call_context(priority="low", tags={"judge": name}, run=run),
            ):
                told = judge.metric(example, answer.prediction)
            score = getattr(told, "score", told)
            value = self._metrics[name].checked(score)
        except BaseException as error:  # whatever it is: the unit is missing, and its user has his answer
            failed = f"{type(error).__name__}: {outward(str(error))}"
        if not self._is_there():
            return  # it was removed meanwhile
        if purse is not None and run is not None:
            purse.see(run)
        if purse is not None and run is not None and run.has_refused:  # what a fallback made of that is no score
            if run.is_short and (purse.is_used_up() or not purse.covers(run.left)):
                _log.warning("The judge of %s in %s ends, for its budget is spent", name, self._name)
                self._end(name)
            else:
                held = "is held by calls under way"
                self._warn(f"its budget {'does not cover this answer' if run.is_short else held}", name)
        elif failed is not None:  # also by a budget of its LM's own: others may be judged later
            self._warn(failed, name)
        else:
            id = uuid.uuid4().hex
            self._trials.outcome(Outcome(self._name, answer.unit, name, value, answer.at, id, self._made))
            if answer.trace is not None:
                self._assessed(answer.trace, name, shown_as(score, value), "llm_judge", judge.name)

    def _end(self, name: str) -> None:
        """Nobody is drawn from now on; the audit says since when."""
        self._spent[name] = False
        mine = self._judges[name].usd
        evidence = {"reason": f"the budget of the judge of {name} is used up", "metric": name, "usd": mine}
        try:
            if still_there(self._trials, self._name, self._salt) is None:
                return  # the audit is that of the next one of its name
            what, cap = last_budget(name, self._trials.decisions(self._name))
            raised = what == RESUMED and (cap is None or (mine is not None and cap > mine))  # others go on
            if what != SPENT and not raised:
                self._trials.decide(self._name, Decision(SPENT, "judge", json.dumps(evidence)))
            self._spent[name] = True
        except StoreUnavailableError as error:
            _log.warning("That the budget of the judge of %s is spent cannot be kept now: %s", name, error)

    def _warn(self, why: str, metric: str) -> None:
        """The first time aloud."""
        level = logging.DEBUG if metric in self._warned else logging.WARNING
        self._warned.add(metric)
        _log.log(level, "The judge of %s in %s gave no score: %s. The unit counts as missing", metric, self._name, why)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
