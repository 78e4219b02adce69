"""A model made without validation is the one that pydantic would have made."""

from __future__ import annotations

import copy
import pickle

import pydantic
import pytest

from dspy_prod.records import OTHER, Totals
from dspy_prod.status.costs import cost_row
from dspy_prod.status.spending import CostRow

SUMS = Totals(*range(1_500_000_000, 1_500_000_000 + len(Totals._fields)))


@pytest.mark.parametrize("value", ["u7", OTHER, f"\\{OTHER}", "", "ä", "\udc80x"])
def test_a_row_of_sums_is_one(value: str) -> None:
    made = cost_row(value, SUMS)
    validated = CostRow(**made.__dict__)
    constructed = CostRow.model_construct(**made.__dict__)
    for other in (validated, constructed):
        assert made == other
        assert repr(made) == repr(other)
        assert str(made) == str(other)
        assert hash(made) == hash(other)
        assert made.model_dump_json() == other.model_dump_json()
        assert made.model_fields_set == other.model_fields_set == set(CostRow.model_fields)
        assert [type(each) for each in made.__dict__.values()] == [type(each) for each in other.__dict__.values()]
        assert list(made.__dict__) == list(CostRow.model_fields)
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.model_copy()):
        assert twin == made
        assert type(twin) is CostRow
    assert made.model_copy(update={"usd": 2.0}).usd == 2.0
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        made.usd = 3.0  # type: ignore[misc]


def test_a_copy_with_other_fields_leaves_the_rows_after_it_as_they_are() -> None:
    first = cost_row("u7", SUMS)
    first.model_copy(update={"unknown": 1}).model_fields_set.discard("usd")
    assert cost_row("u8", SUMS).model_fields_set == set(CostRow.model_fields)
