"""`dspy.Evaluate` whose examples are done by workers on Ray, under the same caps, budgets and limits."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import dspy
from dspy.evaluate import EvaluationResult
from dspy.utils.callback import with_callbacks
from tqdm.auto import tqdm

from dspy_prod.context.current import call_context, current
from dspy_prod.errors import DeadlineExceededError, RejectedError, StoreUnavailableError
from dspy_prod.policies.answers import log_of
from dspy_prod.policies.run import Run
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.switch import disabled
from dspy_prod.scaling.carried import NOTE, Carried, Place
from dspy_prod.scaling.fleet import Fleet
from dspy_prod.scaling.parcel import Parcel
from dspy_prod.scaling.worker import Outcome, Work
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace, open_store

_log = logging.getLogger("dspy_prod")

WORKERS: Final = 2
THREADS: Final = 8


class OnRay(dspy.Evaluate):
    """An evaluation in other processes. It is called, and told of, as `dspy.Evaluate`; tables and files are not made.

    Args:
        workers: processes. ray_options: of Ray's actors, such as `num_cpus` or `resources`. The others are those of
            `dspy.Evaluate`, where `num_threads` is how many examples each worker does at once.
    """

    def __init__(self, *, workers: int = WORKERS, ray_options: Mapping[str, Any] | None = None, **given: Any) -> None:
        super().__init__(**given)
        self.workers = workers
        self.ray_options = dict(ray_options or {})

    @with_callbacks  # type: ignore[untyped-decorator]
    def __call__(
        self,
        program: Any,
        metric: Callable[..., Any] | None = None,
        devset: Sequence[Any] | None = None,
        num_threads: int | None = None,
        display_progress: bool | None = None,
        callback_metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Evaluate a program.

        Returns:
            An `EvaluationResult`, with the results in the order of the examples.
        """
        examples = list(self.devset if devset is None else devset)
        threads = num_threads or self.num_threads or THREADS
        shown = self.display_progress if display_progress is None else display_progress
        scope, own = self._keeping(program)
        with scope, _kept(own):
            most = dspy.settings.max_errors if self.max_errors is None else self.max_errors
            tally = _Tally(examples, self.failure_score, most)
            work, stores = _work(program, metric or self.metric, own)
            self._go(work, stores, tally, threads, shown)
        if own is not None:
            own.store.runs.remove(own.name, None)  # its answers have served
        return tally.result()

    def _keeping(self, program: Any) -> tuple[Any, Run | None]:
        """A run that keeps answers, unless there is one: what a dead worker was answered is not paid again."""
        context = current()
        if disabled() or log_of(context.guards) is not None:
            return nullcontext(), None
        own = Run(f"evaluate-{uuid.uuid4().hex[:8]}", store=store_of(program), keep_answers=True)
        scope = ExitStack()
        scope.enter_context(call_context(run=own))
        if context.run is not None:
            scope.enter_context(call_context(run=context.run))  # the ledger has the name that somebody has said
        return scope, own

    def _go(self, work: Work, stores: Sequence[Store], tally: _Tally, threads: int, shown: bool) -> None:
        context = current()

        def check() -> None:
            for guard in context.guards:
                guard.check()

        def buried(pid: int) -> None:
            for store in stores:
                try:
                    store.runs.bury(pid)
                except StoreUnavailableError as error:
                    _log.warning("What a dead worker holds is charged when its lease ends: %s", error)

        parcel = Parcel({"work": work}).data
        reason: str | None = "the evaluation was ended"
        fleet = Fleet(parcel, self.workers, threads, self.ray_options, buried)
        try:
            for store in stores:
                store.runs.put_note(work.run, NOTE, work.mark)
            with tqdm(total=len(tally.examples), dynamic_ncols=True, disable=not shown) as bar:

                def heard(index: int, outcome: Outcome) -> None:
                    if context.records is not None:
                        for record in outcome.records:
                            context.records.append(record)
                    tally.add(index, outcome)
                    bar.set_description(tally.described)
                    bar.update()

                fleet.run(tally.examples, heard, check)
            reason = None
        finally:
            try:
                fleet.end(reason)
            finally:
                for store in stores:
                    store.runs.put_note(work.run, NOTE, None)


class _Tally:
    """What has come of the examples so far."""

    def __init__(self, examples: Sequence[Any], failure_score: float, max_errors: int) -> None:
        self.examples = examples
        self._failure_score, self._max_errors = failure_score, max_errors
        self._found: dict[int, tuple[Any, Any]] = {}
        self._errors = 0
        self._sum: Any = 0

    def add(self, index: int, outcome: Outcome) -> None:
        """One more; what says nothing about the program, or is too much, is raised, as in `dspy.Evaluate`."""
        error = outcome.error
        if error is None:
            self._found[index] = outcome.prediction, outcome.score
            self._sum += outcome.score
            return
        if isinstance(error, RejectedError) and not isinstance(error, DeadlineExceededError):
            raise error
        self._errors += 1
        _log.error("Example %d failed: %s: %s", index, type(error).__name__, outward(str(error)))
        self._found[index] = dspy.Prediction(), self._failure_score
        self._sum += self._failure_score
        if self._errors >= self._max_errors:
            raise RuntimeError(f"evaluate: {self._errors} examples failed, as many as max_errors allows") from error

    @property
    def described(self) -> str:
        """How it goes, in DSPy's words."""
        count = len(self._found)
        return f"Average Metric: {self._sum:.2f} / {count} ({round(100 * self._sum / count, 1)}%)"

    def result(self) -> Any:
        """All of it."""
        results = [(example, *self._found[index]) for index, example in enumerate(self.examples)]
        total = sum(score for *_, score in results)
        return EvaluationResult(score=round(100 * total / len(results), 2), results=results)


@contextmanager
def _kept(own: Run | None) -> Iterator[None]:
    """Say how to go on, when it ends before everything is done and nobody has given it a name."""
    try:
        yield
    except BaseException:
        if own is not None:
            _log.warning(
                "What the evaluation was answered so far is kept: run=%r goes on with it for nothing", own.name
            )
        raise


def store_of(program: Any) -> Store:
    """Where the program's LM keeps its state, else where an LM would by default."""
    found = [predictor.lm or dspy.settings.lm for _, predictor in program.named_predictors()]
    for lm in [*found, dspy.settings.lm]:
        store: Store | None = getattr(getattr(lm, "pipeline", None), "store", None)
        if store is not None:
            return store
    return open_store(default_store_url(), default_namespace())


def _work(program: Any, metric: Any, own: Run | None) -> tuple[Work, list[Store]]:
    carried = Carried.from_here()
    guards = current().guards
    parts = {"the program": program, "the metric": metric}
    parts.update({f"dspy.settings.{name}": value for name, value in carried.settings.items()})
    stores = Parcel(parts).stores
    for guard in guards:
        if not any(guard.store is each for each in stores):
            stores.append(guard.store)
    run = own.name if own is not None else guards[-1].name if guards else f"evaluate-{uuid.uuid4().hex[:8]}"
    work = Work(program, metric, carried, tuple(map(Place.of, stores)), run, uuid.uuid4().hex)
    return work, stores
