"""What an optimization will cost, before it is paid for: the optimizer itself is run on answers that cost nothing.

No formula knows how often an optimizer asks, and what it caches; the optimizer does. It is rehearsed for several seeds
of who is right when, and each call is priced by our own price book. The program's own code, its tools and the metric
run for real; LMs do not, wherever they are called from, except that a proposer or a judge is asked a few times, so that
its answers have the right length.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.compat.dspy import mark_compiled
from dspy_prod.compat.rehearsing import answered_by
from dspy_prod.context.current import current, use
from dspy_prod.lm.lm import LM
from dspy_prod.optimize.bill import Bill
from dspy_prod.optimize.live import quiet
from dspy_prod.optimize.pilot import Pilot, chars_of, model_of, text_of
from dspy_prod.optimize.samples import Samples
from dspy_prod.optimize.stage import Stage
from dspy_prod.optimize.supported import fitting
from dspy_prod.pricing.book import PriceBook
from dspy_prod.pricing.rates import Rates
from dspy_prod.privacy.outward import outward
from dspy_prod.views import Shown

if TYPE_CHECKING:
    from dspy_prod.views import Table

Showing = Callable[[str, int | None, str], AbstractContextManager[Callable[[], None]]]

SEEDS: Final = 3

UNMEASURED: Final = 0.25
"""How far off the price of what no pilot measured may be: instructions that proposers write, and their length."""

MEASURED: Final = 0.08
"""How far off the rest may be at least: tokens per character differ between texts."""

_NO_END: Final = 10**9


@dataclass(frozen=True)
class Forecast(Shown):
    """What an optimization is expected to need, its baseline evaluation included.

    The ranges are made to hold the truth nine times in ten. Three rehearsals show only half of how far the next one
    may be off, so each side is widened by their whole spread, by 8 % and by a quarter of what no pilot measured: what
    proposers cost, and how much longer their instructions and demonstrations make the program's prompts.

    Attributes:
        usd, usd_low, usd_high: dollars. calls, calls_low, calls_high: calls that are sent; answers of caches are none.
        tokens: input and output together. seconds: how long it takes.
        by: dollars by "role/model". pilot_usd: what was paid to find out.
        cached: calls that the cache answers.
        warnings: what makes it less sure, or why there is none.
    """

    usd: float
    usd_low: float
    usd_high: float
    calls: int
    calls_low: int
    calls_high: int
    tokens: int = 0
    seconds: float = 0.0
    by: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    pilot_usd: float = 0.0
    cached: int = 0

    def __str__(self) -> str:
        text = (
            f"{_usd(self.usd)} ({_usd(self.usd_low, '')} to {_usd(self.usd_high, '')}), {self.calls:,} calls, "
            f"{_duration(self.seconds)}; the pilot cost {_usd(self.pilot_usd)}"
        )
        return "\n".join([text, *[f"warning: {outward(each)}" for each in self.warnings]])

    def _view(self) -> Table:
        from dspy_prod.optimize.foretold import table

        return table(self)


def rehearse(
    optimizer: Any,
    student: dspy.Module,
    arguments: Mapping[str, Any],
    pilot: Pilot,
    *,
    baseline: Sequence[Any] | None = None,
    num_threads: int | None = None,
    roles: Mapping[str, str] | None = None,
    ask: bool = True,
    seeds: int = SEEDS,
    shown: Showing | None = None,
) -> Forecast:
    """Run an optimizer on free answers, and tell what it would have cost.

    Neither the optimizer nor the program is changed. Nothing is shown, tracked or kept in a history meanwhile.

    Args:
        optimizer: any of DSPy's, or your own. arguments: of its `compile`, without the student.
        pilot: what `recording` measured of the program.
        baseline: examples on which the given program is evaluated first; those of the pilot by default.
        num_threads: of the evaluations; DSPy's setting by default.
        roles: by model, for `Forecast.by`.
        ask: proposers and judges may really be asked a few times, which costs, and counts in a run that is in force.
        seeds: how many rehearsals.
        shown: shows how far a rehearsal is: given a text, how many calls there will be (None: nobody knows) and the
            unit, a context manager that gives what is called after each.

    Example:
        ```python
        with recording(program, devset) as pilot:
            pilot.scored(evaluate(program).results)
        print(rehearse(dspy.MIPROv2(metric=metric), program, {"trainset": train, "valset": val}, pilot))
        ```
    """
    warnings: list[str] = []
    pilot_models = set(pilot.models)
    before = pilot.usd
    samples = Samples(pilot, _Real(pilot, warnings) if ask else None)
    first = list(pilot.examples if baseline is None else baseline)
    examples = [*first, *pilot.examples, *(arguments.get("trainset") or ()), *(arguments.get("valset") or ())]
    prices = _Prices()
    bills: list[Bill] = []
    for seed in range(seeds):
        known = bills[0].calls + bills[0].cached if bills else None
        text = f"rehearsal {seed + 1} of {seeds}"
        with nullcontext(lambda: None) if shown is None else shown(text, known, "call") as step:
            stage = Stage(pilot, samples, examples, seed, prices.of, _caches, step)
            problem = _play(stage, optimizer, student, arguments, first)
        bills.append(stage.bill)
        if problem is not None:
            warnings.append(problem)
            break
    if not pilot.played:
        warnings.append("the pilot has seen no example of the program, so its answers are made up")
    unpriced = sorted({model for bill in bills for model in bill.unpriced})
    if unpriced:
        warnings.append(
            f"no price is known for {', '.join(unpriced)}, so its calls are not in the dollars; pass prices="
        )
    threads = num_threads or dspy.settings.get("num_threads") or 8
    used_for = dict.fromkeys(pilot_models, "task") | dict(roles or {})
    return _told(bills, warnings, threads, used_for, max(before, pilot.usd))


def _play(stage: Stage, optimizer: Any, student: Any, arguments: Mapping[str, Any], first: Sequence[Any]) -> str | None:
    """One rehearsal; what went wrong."""
    try:
        own = _unseen(_owned(optimizer))
        given = {name: _owned(value) for name, value in arguments.items()}
        program = student.deepcopy()
        mark_compiled(program, False)
        call = fitting(own, program, given)
    except Exception as error:
        return f"{type(optimizer).__name__} cannot be copied ({type(error).__name__}: {error}), so it is not rehearsed"
    quiet_settings: dict[str, Any] = {
        "callbacks": [stage], "max_errors": _NO_END, "disable_history": True, "usage_tracker": None,
    }  # fmt: skip
    with quiet(), dspy.context(**quiet_settings), answered_by(stage, (LM,)), stage.playing():
        for example in first:
            try:
                student(**example.inputs())
            except Exception:  # in the run, too, it is only a score of 0
                continue
        stage.bill.given = stage.bill.own / max(1, stage.bill.own_calls)
        stage.bill.together, stage.bill.alone = stage.bill.alone + stage.bill.together, 0.0
        try:
            own.compile(*call.args, **call.kwargs)
        except Exception as error:
            name = type(error).__name__
            return f"the rehearsal ended early with {name}: {error}; the forecast is what it had cost by then"
    return None


def _unseen(optimizer: Any) -> Any:
    """Keep a copy of an optimizer, and those within it, from writing files or telling other services."""
    for name, off in (("log_dir", None), ("use_wandb", False), ("use_mlflow", False), ("track_stats", False)):
        if getattr(optimizer, name, None):
            setattr(optimizer, name, off)
    for value in vars(optimizer).values():
        for each in value.values() if isinstance(value, dict) else [value]:
            if isinstance(each, Teleprompter):
                _unseen(each)
    return optimizer


def _owned(value: Any) -> Any:
    """A copy to rehearse with: what an optimizer changes while it compiles is its own; metrics, LMs and examples, which
    may hold anything, are shared.
    """
    if isinstance(value, dspy.Module):
        return value.deepcopy()
    if isinstance(value, Teleprompter):
        own = copy(value)
        vars(own).update({name: _owned(each) for name, each in vars(value).items()})
        return own
    if isinstance(value, dict):
        return {name: _owned(each) for name, each in value.items()} if type(value) is dict else copy(value)
    if type(value) in (list, tuple):
        return type(value)([_owned(each) for each in value])
    if callable(value) or isinstance(value, (dspy.Example, dspy.BaseLM, str)):
        return value
    try:
        return deepcopy(value)
    except Exception:  # it holds something that has no copy, such as a lock
        return value


class _Real:
    """Asks an LM for real, and takes its measures."""

    def __init__(self, pilot: Pilot, warnings: list[str]) -> None:
        self._pilot, self._warnings = pilot, warnings
        self._lock = threading.Lock()

    def __call__(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        asked = {**kwargs, "n": 1} if kwargs.get("n") else kwargs
        records: list[Any] = []
        try:
            with answered_by(None), use(current()._replace(records=records)):
                text = text_of(lm(*args, **asked))
        except Exception as error:
            with self._lock:
                message = f"{model_of(lm)} could not be asked for real ({type(error).__name__}: {error})"
                if message not in self._warnings:
                    self._warnings.append(message)
            return None
        self._pilot.told(lm, chars_of({**kwargs, "prompt": args[0] if args else None}), len(text))
        for record in records:
            self._pilot.measured(record)
        return text


class _Prices:
    """Prices by LM, looked up once."""

    def __init__(self) -> None:
        self._known: dict[str, Rates | None] = {}
        self._book = PriceBook()

    def of(self, lm: Any) -> Rates | None:
        """The prices of an LM's model."""
        model = model_of(lm)
        if model not in self._known:
            self._known[model] = lm.pipeline.primary.rates() if isinstance(lm, LM) else self._book.rates(model)
        return self._known[model]


def _caches(lm: Any) -> bool:
    """Whether an LM answers the same question for nothing."""
    return bool(getattr(lm, "cache", False)) and not (isinstance(lm, LM) and lm.pipeline.cache is None)


def _told(
    bills: Sequence[Bill], warnings: list[str], threads: int, roles: Mapping[str, str], pilot_usd: float
) -> Forecast:
    dollars = [sum(bill.usd.values()) for bill in bills]
    calls = [bill.calls for bill in bills]
    seconds = [bill.alone + bill.together / threads for bill in bills]
    middle = sorted(bills, key=lambda bill: sum(bill.usd.values()))[len(bills) // 2]  # whose parts are the sum
    by: dict[str, float] = defaultdict(float)
    for model, dollar in sorted(middle.usd.items()):
        by[f"{roles.get(model, 'prompt')}/{model}"] += dollar
    usd, count = median(dollars), median(calls)
    spread, more = max(dollars) - min(dollars), max(calls) - min(calls)
    guessed = median([bill.guessed + abs(bill.own - bill.own_calls * bill.given) for bill in bills])
    beyond = spread + MEASURED * usd + UNMEASURED * guessed
    beyond_calls = more + MEASURED * count
    return Forecast(
        usd=usd, usd_low=max(0.0, min(dollars) - beyond), usd_high=max(dollars) + beyond, calls=round(count),
        calls_low=max(0, round(min(calls) - beyond_calls)), calls_high=round(max(calls) + beyond_calls),
        tokens=round(median([bill.tokens for bill in bills])), seconds=median(seconds),
        by=dict(by), warnings=tuple(warnings), pilot_usd=pilot_usd,
        cached=round(median([bill.cached for bill in bills])),
    )  # fmt: skip


def _usd(value: float, sign: str = "$") -> str:
    return (
        f"{sign}{value:,.2f}"
        if value >= 0.1 or not value
        else f"{sign}{value:.2g}"
        if value >= 1e-4
        else f"{sign}{value:.1e}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
