"""Which optimizers can be capped, and what the best is chosen by."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils import DummyLM

from dspy_prod import BudgetedOptimizer, ConfigError
from dspy_prod.optimize.supported import REFUSED, TRAITS, refuse_steps, selection_of, traits_of

TEN = [dspy.Example(number=number).with_inputs("number") for number in range(10)]


def score(*_: Any) -> float:
    return 1.0


def test_every_optimizer_of_this_dspy_is_known() -> None:
    """A new release's optimizer, or one that is gone, is noticed here."""
    import dspy.teleprompt
    from dspy.teleprompt.reanchor import ReAnchor

    kinds = {
        each for each in [*vars(dspy.teleprompt).values(), ReAnchor]
        if isinstance(each, type) and issubclass(each, Teleprompter) and each is not Teleprompter
    }  # fmt: skip
    names = {each.__name__ for each in kinds}
    assert names - set(TRAITS) - set(REFUSED) == set()
    assert set(TRAITS) <= names


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: dspy.BootstrapFinetune(metric=score), "trains weights.*Optimize prompts here"),
        (lambda: dspy.Ensemble(reduce_fn=None), "has no student"),
        (lambda: object.__new__(dspy.AvatarOptimizer), "does not work in this version"),
        (lambda: "MIPROv2", "got str"),
        (lambda: dspy.MIPROv2, "got type"),
    ],
)
def test_what_cannot_be_capped_is_refused_by_name_with_the_remedy(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BudgetedOptimizer(make(), budget_usd=1)


@pytest.mark.parametrize(
    ("steps", "candidates", "kept"), [(8, 6, {0, 1, 3, 4, 5, 7, 8}), (3, 6, {0, 1, 2, 3}), (4, 1, {0, 4})]
)
def test_the_rounds_whose_best_simba_comes_back_to(steps: int, candidates: int, kept: set[int]) -> None:
    """As the end of `dspy.SIMBA.compile` picks them; round 0 is the given program."""
    optimizer = dspy.SIMBA(metric=score, bsize=5, max_steps=steps, num_candidates=candidates)
    rounds = traits_of(optimizer).rounds
    assert rounds is not None
    assert rounds(optimizer) == (5, kept)


def test_steps_that_train_weights_are_refused_unless_the_strategy_leaves_them_out() -> None:
    optimizer = dspy.BetterTogether(
        metric=score, p=dspy.BootstrapFewShot(metric=score), w=dspy.BootstrapFinetune(metric=score)
    )
    for given in ({}, {"strategy": "p -> w"}):
        with pytest.raises(ConfigError, match=r"the step 'w' of strategy=.*trains weights"):
            refuse_steps(optimizer, given)
    refuse_steps(optimizer, {"strategy": "p -> p"})


class Own(Teleprompter):
    def compile(self, student: Any, *, trainset: list[Any]) -> Any:
        return student


@pytest.mark.parametrize(
    ("optimizer", "given", "numbers", "source"),
    [
        (lambda: dspy.COPRO(metric=score), {"valset": TEN[:3], "trainset": TEN}, range(3), "valset"),
        (lambda: dspy.COPRO(metric=score), {"trainset": TEN}, range(10), "trainset"),
        (lambda: dspy.MIPROv2(metric=score), {"trainset": TEN}, range(2, 10), "the last 80 % of trainset"),
        (lambda: dspy.InferRules(metric=score), {"trainset": TEN}, range(5, 10), "the second half of trainset"),
        (
            lambda: dspy.BetterTogether(metric=score, p=dspy.BootstrapFewShot(metric=score)),
            {"trainset": TEN}, range(1), "the first 10% of trainset",
        ),
        (lambda: Own(), {"trainset": TEN}, range(10), "trainset"),
    ],
)  # fmt: skip
def test_the_selection_set_is_the_optimizers_own(optimizer: Any, given: Any, numbers: Any, source: str) -> None:
    with dspy.context(lm=DummyLM([])):
        made = optimizer()
    examples, where = selection_of(made, traits_of(made), given)
    assert [each.number for each in examples] == list(numbers)
    assert where == source


def test_without_examples_there_is_nothing_to_choose_by() -> None:
    made = Own()
    with pytest.raises(ConfigError, match="no examples to choose by: give trainset= or valset="):
        selection_of(made, traits_of(made), {})
