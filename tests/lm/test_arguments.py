"""One table says what each argument of an LM means; the signature says the same to people and editors."""

from __future__ import annotations

import inspect
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Cache
from dspy_prod.lm.settings import ARGUMENTS, ATTRIBUTES, DSPY, OPTIONS, ROWS, settings_of

SIGNATURE = {
    name: parameter
    for name, parameter in inspect.signature(dspy_prod.LM.__init__).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
}


def test_table_and_signature_name_the_same_arguments() -> None:
    """An argument without a row would be taken and forgotten."""
    assert SIGNATURE.keys() == ARGUMENTS.keys()
    assert {row.name for row in ROWS.values()}.isdisjoint(DSPY)


def test_every_argument_of_dspys_lm_is_known() -> None:
    """A new one in DSPy is noticed here."""
    theirs = inspect.signature(dspy.LM.__init__).parameters.keys() - {"self", "kwargs"}
    assert theirs == DSPY.keys() | {"cache", "engine", "async_engine"}
    assert set(ATTRIBUTES) <= DSPY.keys()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_nobody_gives_is_the_default(row: Any) -> None:
    """The signature's default stands for the table's."""
    given = SIGNATURE[row.name].default
    if row.name == "namespace":
        assert row.setting(given), "the directory's name"
    else:
        assert row.setting(given) == row.default


@pytest.mark.parametrize("name", ["retry", "breaker", "limit", "cache"])
def test_a_policy_is_given_in_any_of_four_ways(name: str) -> None:
    """An instance, a table of its fields, True and False."""
    kind = OPTIONS[name]
    for given in (kind(), {}, True):
        assert settings_of({name: given}) == {name: kind()}
    assert settings_of({name: False}) == {name: ROWS[name].off}


def test_every_setting_that_differs_is_saved_under_its_argument() -> None:
    """A row of a state for each row of the table, but for what is no part of a state."""
    lm = dspy_prod.LM(
        "openai/gpt-4o-mini", engine="lm15", retry={"attempts": 2}, breaker=False, limit={"rpm": 9}, cache=Cache(ttl=1),
        budget={"usd": 1}, fallbacks=["openai/gpt-4.1-nano"], prices={"a/b": {"input": 1, "output": 1}},
        store="memory://arguments", namespace="arguments",
    )  # fmt: skip
    written = {row.name for row in ROWS.values() if row.saved} - {"async_engine"}
    assert written <= lm.dump_state().keys()


def test_disabled_leaves_no_policy_on() -> None:
    """`DSPY_PROD_DISABLED` switches off what `False` does."""
    lm = dspy_prod.LM("openai/gpt-4o-mini", limit={"rpm": 9}, budget={"usd": 1}, store="memory://arguments")
    off = lm.settings.off()
    assert (off.retry.attempts, off.breaker, off.limit, off.budgets, off.fallbacks) == (1, None, None, (), ())
    assert (off.store, off.engine, off.clients) == (lm.settings.store, "auto", {})
