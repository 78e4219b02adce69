"""What candidates were made of."""

from __future__ import annotations

from typing import Any

import dspy

from benchmarks.world import World
from dspy_prod import BudgetedOptimizer


class Two(dspy.Module):  # type: ignore[misc]
    """Right at a third of the messages for each of two instructions, and at the rest with both or none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = dspy.Predict("message -> label"), dspy.Predict("message -> label")

    def forward(self, message: str) -> Any:
        self.first(message=message)
        self.second(message=message)
        one, other = ("[good]" in each.signature.instructions for each in (self.first, self.second))
        kind = int(message.split()[1]) % 3
        return dspy.Prediction(right=one if kind == 0 else other if kind == 1 else one == other)


def score(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    return dspy.Prediction(score=float(pred.right), feedback="try [good]")


class Proposer:
    """Proposes the same for each predictor."""

    def __call__(self, candidate: Any, reflective_dataset: Any, components_to_update: list[str]) -> dict[str, str]:
        return {name: f"{candidate[name]} [good]" for name in components_to_update}


def test_a_merge_has_both_parents(world: World, asked: Any, store: str) -> None:
    """As GEPA itself keeps them, whichever candidate was looked at before; its own callbacks are called too."""
    told: list[Any] = []

    class Own:
        def on_merge_accepted(self, event: Any) -> None:
            told.append(event["parent_ids"])

    given = {"callbacks": [Own()]}
    optimizer = dspy.GEPA(
        metric=score, max_metric_calls=400, reflection_lm=world.prompt_lm(), num_threads=4, seed=3, use_merge=True,
        track_stats=True, instruction_proposer=Proposer(), gepa_kwargs=given,
    )  # fmt: skip
    best = BudgetedOptimizer(optimizer, budget_usd=5, store=store, view=None).compile(
        Two(), trainset=world.trainset, valset=world.valset
    )
    candidates = best.optimization.candidates
    pool = [each for each in candidates if each.status == "complete"]
    theirs = best.detailed_results.parents
    assert len(pool) == len(theirs)
    places = [each.index for each in pool]
    assert [set(each.parents) for each in pool[1:]] == [{places[up] for up in ups} for ups in theirs[1:]]
    assert any(len(each.parents) == 2 for each in pool)
    assert told
    assert optimizer.gepa_kwargs is given
    assert len(given["callbacks"]) == 1
