"""`dspy_prod.evaluate`: a program on examples, in threads or in processes, under one cap."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import dspy

from dspy_prod.context.current import call_context
from dspy_prod.errors import ConfigError
from dspy_prod.lm.lm import LM
from dspy_prod.policies.run import Run, accounts_of
from dspy_prod.scaling.on_ray import WORKERS, OnRay, store_of


def evaluate(
    program: Any,
    devset: Sequence[Any],
    metric: Callable[..., Any],
    *,
    engine: Literal["threads", "ray"] = "threads",
    num_threads: int | None = None,
    workers: int | None = None,
    budget_usd: float | None = None,
    run: Run | str | None = None,
    resume: bool | None = None,
    progress: bool = True,
    max_errors: int | None = None,
    failure_score: float = 0.0,
    ray_options: Mapping[str, Any] | None = None,
) -> Any:
    """Evaluate a program on examples, as `dspy.Evaluate` does, in threads of this process or in workers on Ray.

    With `engine="ray"` the examples are done by `workers` processes of the cluster that the program has connected to
    (`ray.init(address=...)`), of `$RAY_ADDRESS`, or of this machine. They share budgets, limits, cache and caps with
    each other and with whoever else uses the same store: a file on one machine. LMs go there without their keys, which
    each worker takes from its environment; DSPy's settings, the call context and tracking hold there as here.

    An example that a worker had under way when it died is done again by another. What was answered until then is not
    paid again: it comes from the log of the run. Of a call whose answer had not arrived, the provider may have billed
    the first, so its upper bound is charged as unconfirmed, and the second is paid. The cap holds over both.

    Args:
        program: a `dspy.Module`. devset: examples, each `.with_inputs(...)`. metric: `metric(example, prediction)`.
        engine: `"threads"`, or `"ray"` (extra `ray`).
        num_threads: examples at once, with `engine="ray"` in each worker; default: DSPy's, 8.
        workers: processes; default: 2. For `engine="ray"`.
        budget_usd: dollars, at most, for everything that the evaluation calls, judges in the metric included.
        run: a `Run`, with caps of its own, or a name: a run of that name keeps its answers, and the same evaluation,
            ended or killed at any moment, goes on where it was.
        resume: with a name: True, it must have been begun; False, what it was answered is forgotten, and what it has
            spent too. Default: it goes on if it was begun.
        progress: show a bar.
        max_errors: failed examples that end it; default: DSPy's setting. Refusals of a policy, such as a budget that is
            used up, end it as themselves.
        failure_score: of an example that failed.
        ray_options: of Ray's actors, such as `{"num_cpus": 0.5}` or `{"resources": {"eval": 1}}`.

    Returns:
        A `dspy.evaluate.EvaluationResult`: `score` in percent, `results` as (example, prediction, score) in the order
        of the examples.

    Raises:
        ConfigError: an argument is impossible, or something cannot go to a worker; the message names it.
        RejectedError: a call was refused; with `run="name"` what was answered is kept.
        RuntimeError: no worker is left. Of threads, too many errors are DSPy's `Exception`.

    Example:
        ```python
        result = dspy_prod.evaluate(program, devset, metric, engine="ray", workers=4, budget_usd=5.0, run="nightly")
        print(result.score)
        ```
    """
    if engine not in ("threads", "ray"):
        raise ConfigError(f"evaluate(engine={engine!r}): use 'threads' or 'ray'")
    if engine == "threads" and (workers is not None or ray_options is not None):
        raise ConfigError("evaluate: workers= and ray_options= are for engine='ray'; threads are num_threads=")
    for name, number in (("num_threads", num_threads), ("workers", workers)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ConfigError(f"evaluate({name}={number!r}): a whole number, 1 or more")
    examples = _examples(devset)
    if not callable(metric):
        raise ConfigError(f"evaluate(metric=...) takes a function of (example, prediction), got {metric!r}")
    if budget_usd is not None:
        _refuse_uncapped(program)
    found = _run(program, run, budget_usd, resume)
    given: dict[str, Any] = {
        "devset": examples, "metric": metric, "num_threads": num_threads, "display_progress": progress,
        "max_errors": max_errors, "failure_score": failure_score,
    }  # fmt: skip
    evaluation = (
        dspy.Evaluate(**given)
        if engine == "threads"
        else OnRay(**given, workers=WORKERS if workers is None else workers, ray_options=ray_options)
    )
    with nullcontext() if found is None else call_context(run=found):
        return evaluation(program)


def _run(program: Any, run: Run | str | None, budget_usd: float | None, resume: bool | None) -> Run | None:
    """The run that everything is in, None when nothing is to be capped or kept."""
    if isinstance(run, Run):
        if budget_usd is not None or resume is not None:
            raise ConfigError("evaluate: budget_usd= and resume= are said by the Run itself: Run(name, usd=...)")
        return run
    if run is None:
        if resume is not None:
            raise ConfigError("evaluate(resume=...): say which: run='name'")
        if budget_usd is None:
            return None
        return Run(f"evaluate-{uuid.uuid4().hex[:8]}", usd=budget_usd, store=store_of(program))
    if not isinstance(run, str) or not run:
        raise ConfigError(f"evaluate(run={run!r}): a name, or a dspy_prod.Run")
    store = store_of(program)
    begun = store.runs.count(run) > 0
    if resume and not begun:
        raise ConfigError(f"evaluate(resume=True): the run {run!r} has no answers in {store.url}")
    if resume is False:
        store.runs.remove(run, accounts_of(run))
    return Run(run, usd=budget_usd, store=store, keep_answers=True)


def _examples(devset: Sequence[Any]) -> list[Any]:
    examples = list(devset)
    if not examples:
        raise ConfigError("evaluate: devset is empty: give examples, each .with_inputs(...)")
    for place, each in enumerate(examples):
        try:
            each.inputs()
        except (AttributeError, ValueError):
            raise ConfigError(
                f"evaluate: devset[{place}] has no inputs: dspy.Example(...).with_inputs('message')"
            ) from None
    return examples


def _refuse_uncapped(program: Any) -> None:
    """A budget must hold every LM that is in sight."""
    for _, predictor in program.named_predictors():
        lm = predictor.lm or dspy.settings.lm
        if isinstance(lm, dspy.BaseLM) and not isinstance(lm, LM):
            raise ConfigError(
                f"evaluate: budget_usd= cannot hold {type(lm).__name__}({getattr(lm, 'model', '?')!r}): make it a "
                "dspy_prod.LM, or dspy_prod.wrap(...) it"
            )
