"""What makes two programs the same candidate."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import json
import uuid
from pathlib import PurePosixPath
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_prod.optimize.fingerprints import plain
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


def test_half_a_character_that_a_model_wrote_is_a_demonstration_like_any_other() -> None:
    """The program with it was no candidate: its state could not be read."""
    program, other = Two(), Two()
    program.first.demos = [dspy.Example(question="a", draft="b\ud83d")]
    other.first.demos = [dspy.Example(question="a", draft="b\ud83e")]
    assert read(program).key == read(program.deepcopy()).key != read(other).key


def test_keys_of_examples_tell_contents_apart() -> None:
    assert key_of(DEMO) == key_of(dspy.Example(draft="b", question="a").with_inputs("question"))
    assert key_of(DEMO) != key_of(dspy.Example(draft="b", question="c").with_inputs("question"))


class Shade(enum.Enum):
    LIGHT = "light"
    DARK = "dark"


@dataclasses.dataclass
class Point:
    at: list[int]


class Place:
    def __init__(self, name: str) -> None:
        self.name = name


PAIRS: dict[str, tuple[Any, Any]] = {
    "dates": (dt.date(2026, 1, 1), dt.date(2026, 1, 2)),
    "numbers of a table": (np.int64(1), np.int64(2)),
    "truths of a table": (np.bool_(True), np.bool_(False)),
    "arrays": (np.array([1, 2]), np.array([1, 3])),
    "decimals": (decimal.Decimal("1.0"), decimal.Decimal("1.1")),
    "ids": (uuid.UUID(int=1), uuid.UUID(int=2)),
    "paths": (PurePosixPath("a"), PurePosixPath("b")),
    "bytes": (b"a", b"b"),
    "half a character": ("a\ud83d", "a\ud83e"),
    "enums": (Shade.LIGHT, Shade.DARK),
    "dataclasses": (Point([1]), Point([2])),
    "objects": (Place("here"), Place("there")),
    "within a list": ([np.int64(1)], [np.int64(2)]),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_examples_whose_fields_are_no_texts_are_told_apart(kind: str) -> None:
    """As from the rows of a table: one answer would else be taken for the answer to all of them."""
    one, other = PAIRS[kind]
    assert key_of(dspy.Example(q=one)) == key_of(dspy.Example(q=copy.deepcopy(one)))
    assert key_of(dspy.Example(q=one)) != key_of(dspy.Example(q=other))
    assert plain(dspy.Example(q=one)) == plain(dspy.Example(q=copy.deepcopy(one)))
    assert plain(dspy.Example(q=one)) != plain(dspy.Example(q=other))


def test_objects_that_show_nothing_but_their_place_are_alike() -> None:
    """Another process would have them elsewhere."""
    assert key_of(dspy.Example(q=object())) == key_of(dspy.Example(q=object()))


def test_what_an_object_shows_of_itself_is_not_written_down() -> None:
    assert "secret" not in json.dumps(plain({"where": PurePosixPath("/secret-of-mine")}))
