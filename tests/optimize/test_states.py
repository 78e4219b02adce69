"""What makes two programs the same candidate."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from dspy_prod.optimize.states import key_of, read


class Two(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> draft", "Draft it."))
        self.second = dspy.ChainOfThought(dspy.Signature("draft -> answer", "Polish it."))

    def forward(self, question: str) -> dspy.Prediction:
        return self.second(draft=self.first(question=question).draft)


DEMO = dspy.Example(question="a", draft="b").with_inputs("question")


def instructed(program: Any) -> None:
    program.first.signature = program.first.signature.with_instructions("Draft it well.")


def instructed_in_place(program: Any) -> None:
    """As InferRules does it."""
    program.first.signature = program.first.signature.with_instructions("Draft it.")
    program.first.signature.instructions = "Draft it well."


def prefixed(program: Any) -> None:
    """As COPRO does it."""
    program.first.signature = program.first.signature.with_updated_fields("draft", prefix="Here:")


def shown(program: Any) -> None:
    program.first.demos = [DEMO]


def configured(program: Any) -> None:
    program.first.config = {"temperature": 0.3}


def decided(program: Any) -> None:
    program.first.fields = {"draft": {"threshold": 0.3}}


@pytest.mark.parametrize("change", [instructed, instructed_in_place, prefixed, shown, configured, decided])
def test_each_change_of_an_optimizer_makes_another_candidate_and_can_be_put_into_a_copy(change: Any) -> None:
    program, pristine = Two(), Two()
    before = read(program)
    change(program)
    state = read(program)
    assert state.key != before.key
    assert read(state.put(pristine)).key == state.key
    assert read(pristine).key == before.key


def test_the_same_state_is_the_same_candidate_whatever_objects_have_it() -> None:
    """Copies, demonstrations as dicts, another order of an example's fields."""
    program, other = Two(), Two()
    program.first.demos = [DEMO]
    other.first.demos = [{"draft": "b", "question": "a"}]
    assert read(program).key == read(other).key == read(program.deepcopy()).key


def test_the_order_of_demonstrations_matters() -> None:
    program, other = Two(), Two()
    more = dspy.Example(question="c", draft="d")
    program.first.demos, other.first.demos = [DEMO, more], [more, DEMO]
    assert read(program).key != read(other).key


def test_keys_of_examples_tell_contents_apart() -> None:
    assert key_of(DEMO) == key_of(dspy.Example(draft="b", question="a").with_inputs("question"))
    assert key_of(DEMO) != key_of(dspy.Example(draft="b", question="c").with_inputs("question"))
