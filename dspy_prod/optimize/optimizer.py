"""`BudgetedOptimizer`: one of DSPy's optimizers, at most for what was said."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError, OptionError
from dspy_prod.optimize.candidates import Watcher
from dspy_prod.optimize.forecasting import forecast_of
from dspy_prod.optimize.metrics import checked_metric
from dspy_prod.optimize.opening import Scribe, note_pilot, opened, piloted
from dspy_prod.optimize.rehearsal import Forecast
from dspy_prod.optimize.reporting import report_of
from dspy_prod.optimize.session import Session
from dspy_prod.optimize.supported import traits_of
from dspy_prod.optimize.task import Task, task_of
from dspy_prod.optimize.terms import Terms
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.base import Store

_PILOT: Final = 16
"""Examples that a forecast really asks."""

_BUSY: Final[set[int]] = set()
_LOCK: Final = RegistryLock()

_CAPS: Final = ("budget_usd", "max_calls", "max_tokens", "max_time")


class _Sheltered(Teleprompter):
    """MLflow's autologging patches the direct subclasses of Teleprompter, and would make a run around ours."""


class BudgetedOptimizer(_Sheltered):
    """One of DSPy's optimizers under a hard cap, which always returns the best program found.

    The given program is evaluated first; then the optimizer runs, and every call of every LM that it, the program, a
    teacher or the metric makes is admitted by one guard, so that the bill never exceeds the caps. When a cap, a target,
    Ctrl-C or an outage ends the run, what was found is evaluated completely out of a reserve, and the best program by
    complete evaluations is returned, at least as good as the given one. `best.optimization` is the report.

    What is no call of an LM is not counted: what an embedder, a retriever or a tool costs.

    Args:
        optimizer: any of DSPy's (but those that train weights), or your own `Teleprompter`.
        budget_usd: dollars, at most, of all LMs together.
        max_calls: upstream attempts, at most. max_tokens: input and output tokens together, at most.
        max_time: seconds or a timedelta.
        name: what the run is called in the ledger, in MLflow and when it is resumed; made up when not given.
        metric: scores where the optimizer has no metric of its own, as `LabeledFewShot`.
        racing: drop a candidate early when it is almost certainly not the best: with `racing=0.9`, at least nine times
            in ten the very program is returned that full evaluation would have picked, whatever the scores. About half
            of the calls are saved at 16 candidates and 200 examples, more with more.
        margin: how much worse than the best (in units of the score) does not matter to a race.
        reserve: share of what is left after the first evaluation that is kept for finalists; `"auto"` measures it.
        stop_at: a score (as the metric tells it, 0 to 1 for most) that is good enough.
        patience: how many complete candidates in a row without a better one end the run.
        priority: of the run's calls among others under the same limits.
        patience_outage: seconds that an outage may last before the run ends as `failed`, to be resumed.
        foreign: `"allow"` leaves calls uncapped that no cap can hold: plain LMs that a metric hides, threads of the
            program's own. They are refused otherwise, at the first example.
        view: how the run is shown: `"bar"`, `"table"` (in a notebook), `"log"`, None, or `"auto"`.
        track: whether MLflow gets a run with its candidates; by default when `dspy_prod.tracking` is on.
        sample: share of the run's traces that tracking keeps.
        publish: publish the best program as a version of this name in the registry, linked to its MLflow run.
        store: where the run is counted and its answers are kept, as for `LM`. namespace: as for `LM`.

    Attributes:
        report: the `OptimizationReport` of the latest run, also after an exception.

    Raises:
        ConfigError: an impossible option, no cap at all, or an optimizer that cannot be capped; it names the remedy.

    Example:
        ```python
        optimizer = dspy_prod.BudgetedOptimizer(dspy.MIPROv2(metric=metric, auto="light"), budget_usd=5, name="triage")
        best = optimizer.compile(program, trainset=train, valset=val)
        print(best.optimization)
        ```
    """

    def __init__(
        self,
        optimizer: Teleprompter,
        *,
        budget_usd: float | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_time: float | dt.timedelta | None = None,
        name: str | None = None,
        metric: Callable[..., Any] | None = None,
        publish: str | None = None,
        store: str | Store | None = None,
        namespace: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.traits = traits_of(optimizer)
        self.optimizer = optimizer
        self.name = name
        self.terms = _terms(
            budget_usd=budget_usd, max_calls=max_calls, max_tokens=max_tokens, max_time=max_time, **options
        )
        for option, given in (("name", name), ("publish", publish)):
            if given is not None and (not isinstance(given, str) or not given):
                raise ConfigError(f"BudgetedOptimizer: {option}: must be a non-empty string, got {given!r}")
        if metric is not None:
            checked_metric(metric)
        self._metric = metric
        self._publish = publish
        self._store, self._namespace = store, namespace
        self._session: Session | None = None
        self._begun: tuple[str | None, float] = (None, 0.0)
        self._forecasted: Forecast | None = None
        self.report: Any = None

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[Any] | None = None,
        valset: Sequence[Any] | None = None,
        testset: Sequence[Any] = (),
        resume: bool | None = None,
        dry_run: bool = False,
        **arguments: Any,
    ) -> Any:
        """Optimize a program; the best one found comes back, whatever ended the run.

        Args:
            student: the program, whether it was compiled before or not. It is not changed. A `Production` is looked
                into.
            trainset: passed on, as all that the optimizer's own `compile` takes.
            valset: what candidates are chosen by. Passed on where the optimizer takes it.
            testset: untouched examples, on which the given program and the best one are compared at the end.
            resume: go on with the run of this `name`: its answers cost nothing again. The program, the examples and
                the optimizer must be the same; caps, the metric and how many trials MIPROv2 makes (`num_trials`) may be
                others. False begins another one.
            dry_run: only forecast, and print it.
            arguments: further ones of the optimizer's `compile`; and `budget_usd`, `max_calls`, `max_tokens`,
                `max_time` to replace those of the constructor this time.

        Returns:
            The best program, with the report as `optimization`; a `Forecast` with `dry_run`.

        Raises:
            ConfigError: an argument is impossible; the run cannot be resumed, and why; calls that no cap could hold;
                the metric tells no score; the optimizer is compiling something in another thread.
            LMError: no model could be asked at all, and why.
            KeyboardInterrupt: a second Ctrl-C while it ends after the first.
        """
        terms = self._terms_with(arguments)
        task, kept_back = self._task(student, trainset, valset, testset, arguments)
        if dry_run:
            forecast = self._forecast(task, terms)
            print(forecast)  # noqa: T201 (what was asked for)
            return forecast
        return self._compile(task, terms, kept_back, resume)

    def forecast(self, student: dspy.Module, **arguments: Any) -> Forecast:
        """What `compile` with the same arguments would cost: the optimizer is rehearsed on a free model.

        A small pilot is measured first, and paid for: its calls count within the caps. The comparison on a test set is
        not in it.

        Returns:
            A `Forecast`: dollars, calls, tokens, seconds, each with a range.

        Raises:
            ConfigError: as `compile`.
        """
        terms = self._terms_with(arguments)
        named = {key: arguments.pop(key, None) for key in ("trainset", "valset")}
        testset = arguments.pop("testset", ())
        task, _ = self._task(student, named["trainset"], named["valset"], testset, arguments)
        return self._forecast(task, terms)

    def stop(self) -> None:
        """End the run that is going on, from another thread; `compile` returns the best so far."""
        session = self._session
        if session is not None:
            session.stop()

    # -- before the run ------------------------------------------------------------------------------------------------
    def _terms_with(self, arguments: dict[str, Any]) -> Terms:
        others: dict[str, Any] = {name: arguments.pop(name) for name in _CAPS if name in arguments}
        if not others:
            return self.terms
        kept: dict[str, Any] = {name: getattr(self.terms, name) for name in self.terms.model_fields_set}
        kept.update(others)
        return _terms(**kept)

    def _task(
        self, student: Any, trainset: Any, valset: Any, testset: Any, more: Mapping[str, Any]
    ) -> tuple[Task, list[str]]:
        return task_of(self.optimizer, self.traits, self._metric, student, trainset, valset, testset, more)

    # -- the run -------------------------------------------------------------------------------------------------------
    def _compile(self, task: Task, terms: Terms, warnings: list[str], resume: bool | None) -> Any:
        with _alone(self.optimizer):
            return self._run(task, terms, warnings, resume)

    def _run(self, task: Task, terms: Terms, warnings: list[str], resume: bool | None) -> Any:
        from dspy_prod.optimize.live import quiet, watcher
        from dspy_prod.optimize.mlflow_runs import watcher as in_mlflow
        from dspy_prod.optimize.publishing import publish_found

        pilot, self._begun = self._begun, (None, 0.0)
        begun = opened(task, terms, self.name, resume, self._store, self._namespace, pilot)
        sets = {**{name: task.arguments.get(name) or () for name in ("trainset", "valset")}, "testset": task.testset}
        tracked = in_mlflow(
            track=terms.track, resumed=begun.before is not None, datasets=sets, settings=_told(task, terms)
        )
        scribe = None if begun.header is None else Scribe(begun.run, begun.header, begun.stands)
        watchers: list[Watcher] = [each for each in (scribe, tracked) if each is not None]
        watchers.append(watcher(terms.view))
        session = Session(
            task, terms, begun.run, watchers, (lambda: False) if scribe is None else scribe.asked_to_stop, quiet,
            begun.spent,
        )  # fmt: skip
        session.outcome.warnings.extend([*warnings, *begun.warnings])
        if scribe is not None:
            scribe.claim()
        self._session = session
        if pilot[0] is None and begun.before is None:
            self._forecasted = None  # it was of another run
        try:
            session.go()
        finally:
            try:
                self._session = None
                self.report = report_of(session, self._forecasted, None if tracked is None else tracked.wait_for_id())
                session.told(self.report)
            finally:
                if scribe is not None:
                    scribe.release()
        best = session.programs.best()
        best.optimization = self.report
        if self._publish is not None:
            publish_found(self.report, best, self._publish, dataset=task.selection[0], watching=tracked)
        return best

    def _forecast(self, task: Task, terms: Terms) -> Forecast:
        from dspy_prod.optimize.live import quiet

        with _alone(self.optimizer):
            begun = piloted(task, terms, self.name, self._store, self._namespace)
            self._forecasted = forecast_of(Session(task, terms, begun.run, [], lambda: False, quiet), _PILOT)
            self._begun = begun.run.name, self._forecasted.pilot_usd
            note_pilot(begun, self._forecasted.pilot_usd)
            return self._forecasted


@contextmanager
def _alone(optimizer: Any) -> Iterator[None]:
    """Only one run at a time has an optimizer: its LMs and metric stand in other places meanwhile, and DSPy's own keep
    what they do on themselves.

    Raises:
        ConfigError: another one has it.
    """
    with _LOCK:
        if id(optimizer) in _BUSY:
            raise ConfigError(
                f"BudgetedOptimizer.compile: this {type(optimizer).__name__} is compiling something in another thread. "
                "Wait for it, or give each BudgetedOptimizer an optimizer of its own"
            )
        _BUSY.add(id(optimizer))
    try:
        yield
    finally:
        with _LOCK:
            _BUSY.discard(id(optimizer))


def _terms(**options: Any) -> Terms:
    try:
        terms = Terms(**options)
        if all(getattr(terms, each) is None for each in _CAPS):
            raise ConfigError(f"BudgetedOptimizer: give it a cap: {', '.join(_CAPS)}")
        return terms
    except OptionError as error:
        raise OptionError(
            f"BudgetedOptimizer: {error.field}: {error.problem}", field=error.field, problem=error.problem
        ) from None


def _told(task: Task, terms: Terms) -> dict[str, Any]:
    """What else MLflow is told of a run, beside its caps."""
    size, source = len(task.selection[0]), task.selection[1]
    found = {name: getattr(terms, name) for name in ("racing", "margin", "stop_at", "patience", "reserve")}
    return {**found, "selection": f"{size} examples of {source}"}
