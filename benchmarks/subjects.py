"""Every optimizer of DSPy that calls LMs, small, and one that a user wrote.

`python -m benchmarks.subjects` compiles each with plain DSPy and prints its natural bill.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import dspy
from dspy.teleprompt import (
    COPRO,
    GEPA,
    SIMBA,
    BetterTogether,
    BootstrapFewShot,
    BootstrapFewShotWithOptuna,
    BootstrapFewShotWithRandomSearch,
    InferRules,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
    Teleprompter,
)

from benchmarks.mind import ADVICE, share
from benchmarks.world import World

THREADS = 6


class Subject(NamedTuple):
    """An optimizer and what its `compile` takes beside the student."""

    optimizer: Any
    arguments: dict[str, Any]
    student: dspy.Module


class Guesses(Teleprompter):
    """What a user may write: instructions put together by chance, each evaluated whole."""

    def __init__(self, metric: Callable[..., Any], tries: int = 6, num_threads: int = THREADS) -> None:
        super().__init__()
        self.metric = metric
        self.tries = tries
        self.num_threads = num_threads

    def compile(self, student: Any, *, trainset: list[Any], valset: list[Any], **_: Any) -> Any:
        draw = random.Random(0)
        evaluate = dspy.Evaluate(devset=valset, metric=self.metric, num_threads=self.num_threads)
        best, best_score = student, float("-inf")
        for _number in range(self.tries):
            program = student.deepcopy()
            for _name, predictor in program.named_predictors():
                text = " ".join(draw.sample(sorted(ADVICE.values()), 3))
                predictor.signature = predictor.signature.with_instructions(f"Sort the message. {text}")
                predictor.demos = draw.sample(trainset, 2)
            score = evaluate(program).score
            if score > best_score:
                best, best_score = program, score
        return best


def embedder() -> dspy.Embedder:
    """A deterministic embedder that costs nothing."""

    def embed(texts: list[str]) -> Any:
        import numpy

        return numpy.array([[share(text, axis) - 0.5 for axis in range(8)] for text in texts])

    return dspy.Embedder(embed)


def optimizers(
    world: World, *, lm: Any = None, prompt_lm: Any = None, threads: int = THREADS, only: str | None = None
) -> dict[str, Subject]:
    """Name of the class → the optimizer, its compile arguments and its student.

    Args:
        lm, prompt_lm: those that optimizers take when they are built.
        threads: of their evaluations. only: the name of one, to make no other.
    """
    task, proposer = lm or world.lm(), prompt_lm or world.prompt_lm()
    train, val, metric = world.trainset, world.valset, world.metric
    few: dict[str, Any] = {"metric": metric, "max_bootstrapped_demos": 2, "max_labeled_demos": 2}
    wide: dict[str, Any] = {**few, "num_threads": threads}
    both: dict[str, Any] = {"trainset": train, "valset": val}
    random_search = lambda programs: BootstrapFewShotWithRandomSearch(  # noqa: E731
        **wide, num_candidate_programs=programs
    )
    gepa = lambda rounds: GEPA(  # noqa: E731
        metric=world.feedback_metric, max_metric_calls=int(rounds * len(val)), reflection_lm=proposer,
        num_threads=threads, seed=0,
    )  # fmt: skip
    made: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "LabeledFewShot": (lambda: LabeledFewShot(k=3), {"trainset": train}),
        "BootstrapFewShot": (
            lambda: BootstrapFewShot(metric=metric, max_bootstrapped_demos=12, max_labeled_demos=2),
            {"trainset": train},
        ),
        "KNNFewShot": (lambda: KNNFewShot(3, train, embedder(), **few), {}),
        "BootstrapFewShotWithRandomSearch": (lambda: random_search(8), both),
        "BootstrapFewShotWithOptuna": (
            lambda: BootstrapFewShotWithOptuna(**wide, num_candidate_programs=8),
            {**both, "max_demos": 4},
        ),
        "MIPROv2": (
            lambda: MIPROv2(**wide, auto=None, num_candidates=4, prompt_model=proposer, task_model=task, verbose=False),
            {**both, "num_trials": 6, "minibatch": True, "minibatch_size": 20, "minibatch_full_eval_steps": 2},
        ),
        "GEPA": (lambda: gepa(5), both),
        "SIMBA": (
            lambda: SIMBA(
                metric=metric, bsize=16, num_candidates=3, max_steps=3, prompt_model=proposer, num_threads=threads
            ),
            {"trainset": train},
        ),
        "COPRO": (
            lambda: COPRO(prompt_model=proposer, metric=metric, breadth=3, depth=2),
            {"trainset": train, "eval_kwargs": {"num_threads": threads}},
        ),
        "InferRules": (lambda: InferRules(**wide, num_candidates=5, num_rules=4), both),
        "BetterTogether": (
            lambda: BetterTogether(metric=metric, a=random_search(2), b=gepa(2.5)),
            {**both, "strategy": "a -> b", "num_threads": threads},
        ),
        # It answers from the cache over and over, so its examples are few.
        "ReAnchor": (lambda: _reanchor(metric, threads), {"trainset": train[:16], "valset": val[:20]}),
        "Guesses": (lambda: Guesses(metric, num_threads=threads), both),
    }
    subjects = {}
    for name, (make, arguments) in made.items():
        if only not in (None, name):
            continue
        student = world.program("choice" if name == "ReAnchor" else "module")
        if name == "BetterTogether":  # it wants an LM in every predictor
            student.set_lm(task)
        subjects[name] = Subject(make(), arguments, student)
    return subjects


def _reanchor(metric: Callable[..., Any], threads: int) -> Any:
    from dspy.teleprompt.reanchor import ReAnchor

    return ReAnchor(metric=metric, num_threads=threads)


def main() -> None:
    """Compile each naturally with plain DSPy."""
    import argparse
    import warnings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.subjects", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="names, separated by commas")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    only = [name for name in given.only.split(",") if name]
    print(f"{'':34}{'calls':>6}{'proposals':>10}{'USD':>11}{'before':>8}{'after':>7}{'s':>6}")
    for name in only or sorted(ONE_OF_EACH):
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
        with World(given.seed) as world:
            task, proposer = world.lm(plain=True), world.prompt_lm(plain=True)
            dspy.configure(lm=task)
            subject = optimizers(world, lm=task, prompt_lm=proposer)[name]
            began = time.monotonic()
            best = subject.optimizer.compile(subject.student, **subject.arguments)
            took, usd, calls, kinds = time.monotonic() - began, world.bill_usd, len(world.calls), world.kinds()
            before, after = world.accuracy(subject.student, world.testset), world.accuracy(best, world.testset)
            asked = calls - kinds.get("task", 0)
            print(f"{name:34}{calls:>6}{asked:>10}{usd:>11.6f}{before:>8.2f}{after:>7.2f}{took:>6.1f}")


ONE_OF_EACH = [
    "LabeledFewShot",
    "BootstrapFewShot",
    "KNNFewShot",
    "BootstrapFewShotWithRandomSearch",
    "BootstrapFewShotWithOptuna",
    "MIPROv2",
    "GEPA",
    "SIMBA",
    "COPRO",
    "InferRules",
    "BetterTogether",
    "ReAnchor",
    "Guesses",
]
"""The names of all of them."""


if __name__ == "__main__":
    main()
