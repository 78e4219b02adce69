"""What is known of DSPy's optimizers: what they choose by, what they leave undone, and which cannot be capped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError

Chosen = tuple[list[Any], str]
"""The examples that the best is chosen by, and where they come from."""


Grows = Literal["given", "best", "before"]
"""What an optimizer makes a new candidate from: the given program, the best one so far, or the one it has just looked
at on the same examples."""


class Rounds(NamedTuple):
    """How an optimizer that looks at new candidates in rounds goes on with them.

    Attributes:
        size: on how many examples those of a round are compared. kept: the rounds, counted from 1, whose best one it
            evaluates at the end; the others of a round, and of the other rounds, it never evaluates again.
    """

    size: int
    kept: frozenset[int]


@dataclass(frozen=True)
class Traits:
    """How an optimizer works, as far as a run has to know.

    Attributes:
        complete: it evaluates each of its candidates on the whole selection set.
        loose: it asks its candidates example by example, without an evaluation that DSPy would tell of.
        finalists: how many complete evaluations to keep money for, because it leaves them to the end or to others.
        late: what it makes is not seen before it returns it.
        rich: it understands a metric that returns `Prediction(score=, feedback=)`; others are given the score.
        races: whether its evaluations of the selection set may be cut short.
        seeded: two runs propose the same, given the same answers.
        opaque: what it makes of the program is no state, but code: only the very object it returns will do.
        free: nobody knows what it changes about a program; it may be more than its state.
        asks: its `compile` calls LMs.
        grows: see `Grows`. origin: what its candidates are called, `{n}` counts from 1, `{seed}` from -3.
        rounds: see `Rounds`, of the optimizer; None where it has none.
        select: the selection set when no `valset` is given, of (optimizer, compile's arguments).
    """

    complete: bool = False
    loose: bool = False
    finalists: int = 2
    late: bool = False
    rich: bool = False
    races: bool = False
    seeded: bool = True
    opaque: bool = False
    free: bool = False
    asks: bool = True
    grows: Grows = "given"
    origin: str = "candidate {n}"
    rounds: Callable[[Any], Rounds] | None = None
    select: Callable[[Any, Mapping[str, Any]], Chosen] | None = None


def _all_of(optimizer: Any, given: Mapping[str, Any]) -> Chosen:
    return list(given.get("trainset") or ()), "trainset"


def _last_part(optimizer: Any, given: Mapping[str, Any]) -> Chosen:
    train = list(given.get("trainset") or ())
    return train[len(train) - min(1000, max(1, int(len(train) * 0.8))) :], "the last 80 % of trainset"


def _second_half(optimizer: Any, given: Mapping[str, Any]) -> Chosen:
    train = list(given.get("trainset") or ())
    return train[int(0.5 * len(train)) :], "the second half of trainset"


def _first_part(optimizer: Any, given: Mapping[str, Any]) -> Chosen:
    train, share = list(given.get("trainset") or ()), given.get("valset_ratio", 0.1) or 0.0
    part = train[: int(share * len(train))]
    return (part, f"the first {share:.0%} of trainset") if part else (train, "trainset")


def _neighbours(optimizer: Any, given: Mapping[str, Any]) -> Chosen:
    train = list(given.get("trainset") or getattr(getattr(optimizer, "KNN", None), "trainset", None) or ())
    return train, "trainset"


def _rounds_of_simba(optimizer: Any) -> Rounds:
    last, parts = optimizer.max_steps, optimizer.num_candidates
    return Rounds(optimizer.bsize, frozenset(round(part * last / parts) for part in range(parts + 1)))


TRAITS: Final[Mapping[str, Traits]] = {
    "BootstrapFewShotWithRandomSearch": Traits(
        complete=True, finalists=0, races=True, origin="seed {seed}", select=_all_of
    ),
    "BootstrapFewShotWithOptuna": Traits(
        complete=True, finalists=0, races=True, seeded=False, origin="trial {n}", select=_all_of
    ),
    "MIPROv2": Traits(finalists=1, races=True, origin="trial {n}", select=_last_part),
    "GEPA": Traits(complete=True, finalists=0, rich=True, grows="before", origin="proposal {n}", select=_all_of),
    "SIMBA": Traits(loose=True, rich=True, grows="best", rounds=_rounds_of_simba, select=_all_of),
    "COPRO": Traits(complete=True, finalists=0, races=True, grows="best", origin="proposal {n}", select=_all_of),
    "InferRules": Traits(complete=True, finalists=0, races=True, origin="rules {n}", select=_second_half),
    "BetterTogether": Traits(finalists=1, grows="best", origin="step {n}", select=_first_part),
    "BootstrapFewShot": Traits(finalists=1, late=True, select=_all_of),
    "LabeledFewShot": Traits(finalists=1, late=True, asks=False, select=_all_of),
    "KNNFewShot": Traits(finalists=1, late=True, opaque=True, asks=False, select=_neighbours),
    "ReAnchor": Traits(finalists=1, late=True, rich=True, select=_all_of),
}
"""By the name of the class, or of the nearest class that it derives from."""

_TRAINS: Final = (
    "trains weights, which is billed outside of LM calls, so no cap could hold it. Optimize prompts here, and train by "
    "itself"
)
REFUSED: Final[Mapping[str, str]] = {
    "BootstrapFinetune": _TRAINS,
    "FinetuneTeleprompter": _TRAINS,
    "GRPO": _TRAINS,
    "Ensemble": "compiles a list of programs and has no student to optimize. Call it on the programs as it is",
    "AvatarOptimizer": "does not work in this version of DSPy (it needs dspy.TypedPredictor, which is gone). Use GEPA "
    "or SIMBA",
    "SignatureOptimizer": "is the deprecated name of COPRO, with another signature. Use dspy.COPRO",
}


def traits_of(optimizer: Any) -> Traits:
    """What is known of an optimizer; the most careful assumptions of one that is somebody's own.

    Raises:
        ConfigError: it is no optimizer, or cannot be run under a cap; the message says why, and what to do.
    """
    if not isinstance(optimizer, Teleprompter):
        raise ConfigError(
            "BudgetedOptimizer: optimizer: takes one of DSPy's optimizers (a Teleprompter), got "
            f"{type(optimizer).__name__}"
        )
    for kind in type(optimizer).__mro__:
        if kind.__name__ in REFUSED and kind.__module__.startswith("dspy."):
            raise ConfigError(f"BudgetedOptimizer: {type(optimizer).__name__} {REFUSED[kind.__name__]}")
        if kind.__name__ in TRAITS and kind.__module__.startswith("dspy."):
            return TRAITS[kind.__name__]
    return Traits(loose=True, late=True, free=True)


def refuse_steps(optimizer: Any, given: Mapping[str, Any]) -> None:
    """Refuse a `BetterTogether` whose strategy has a step that cannot be capped.

    Raises:
        ConfigError
    """
    steps: Mapping[str, Any] | None = getattr(optimizer, "optimizers", None)
    if not isinstance(steps, dict):
        return
    default = parameters_of(optimizer)["strategy"].default if "strategy" in parameters_of(optimizer) else ""
    for name in str(given.get("strategy", default)).split(" -> "):
        if name in steps:
            try:
                traits_of(steps[name])
            except ConfigError as error:
                raise ConfigError(
                    f"BudgetedOptimizer: the step {name!r} of strategy={given.get('strategy', default)!r}: {error}. "
                    "Name a strategy without it"
                ) from None


def parameters_of(optimizer: Any) -> Mapping[str, inspect.Parameter]:
    """What its `compile` takes, by name."""
    return inspect.signature(optimizer.compile).parameters


def fitting(optimizer: Any, student: Any, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of its `compile`, put where it takes them: also a program that it takes by name alone.

    Raises:
        ConfigError: one is missing, or `compile` has no place for the program, or is asynchronous.
    """
    kind = type(optimizer).__name__
    if inspect.iscoroutinefunction(optimizer.compile):
        raise ConfigError(
            f"BudgetedOptimizer: {kind}.compile is asynchronous, and nobody would wait for it. Give it a compile that "
            "is not, as asyncio.run of the other one"
        )
    signature = inspect.signature(optimizer.compile)
    student_by_name = getattr(signature.parameters.get("student"), "kind", None) is inspect.Parameter.KEYWORD_ONLY
    try:
        if student_by_name:
            return signature.bind(student=student, **arguments)
        return signature.bind(student, **arguments)
    except TypeError as error:
        raise ConfigError(f"BudgetedOptimizer.compile: {kind}.compile would not take this: {error}") from None


def accepts(optimizer: Any, name: str) -> bool:
    """Whether its `compile` takes an argument of this name."""
    parameters = parameters_of(optimizer)
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def selection_of(optimizer: Any, traits: Traits, given: Mapping[str, Any]) -> Chosen:
    """The examples that the best is chosen by, and where they come from.

    Raises:
        ConfigError: there are none.
    """
    if given.get("valset"):
        return list(given["valset"]), "valset"
    examples, source = (traits.select or _all_of)(optimizer, given)
    if not examples:
        raise ConfigError("BudgetedOptimizer.compile: no examples to choose by: give trainset= or valset=")
    return examples, source
