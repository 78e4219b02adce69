"""Secrets and personal data: found, told apart from what only looks like them, and kept out of logs and files."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, ConfigError, Redactor, call_context, privacy
from tests.logged import logged
from tests.privacy.support import EMAIL, Ask, installed, make_lm

__all__ = ["installed"]

REDACTOR = Redactor()


# -- your own --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", [r"TCK-\d+", re.compile(r"tck-\d+", re.IGNORECASE)])
def test_a_pattern_of_your_own_has_a_token_of_its_own(pattern: Any) -> None:
    """It applies beside the built-in rules, in texts and identities."""
    redactor = Redactor(patterns={"ticket": pattern})
    assert redactor.text("TCK-12 of bob@example.com") == "<ticket> of <email>"
    assert redactor.identity("TCK-12").startswith("ticket-")
    assert redactor.text(redactor.identity("TCK-12")) == redactor.identity("TCK-12")


def test_a_pattern_does_not_take_tokens_apart() -> None:
    """What is inside a token is left alone; a match that reaches into one takes all of it."""
    assert Redactor(patterns={"word": r"[a-z]+"}).text("Bob@example.com") == "<email>"
    assert Redactor(patterns={"note": r"note: .{3}"}).text("note: bob@example.com!") == "<note>!"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"patterns": {"ticket": "TCK-("}}, "'ticket'"),
        ({"patterns": {"ticket": b"TCK"}}, "'ticket'"),
        ({"patterns": {"ticket": re.compile(b"TCK")}}, "'ticket'"),
        ({"patterns": {"ticket": "x*"}}, "'ticket'"),
        ({"patterns": {"my ticket": "TCK"}}, "'my ticket'"),
        ({"patterns": [r"TCK-\d+"]}, "patterns"),
        ({"rules": ("emial",)}, "'emial'"),
        ({"function": "nope"}, "function"),
    ],
)
def test_mistakes_are_told_at_construction(arguments: dict[str, Any], named: str) -> None:
    """The message names what is wrong."""
    with pytest.raises(ConfigError, match=re.escape(named)):
        Redactor(**arguments)


def test_a_function_of_your_own_is_the_last_step() -> None:
    """It sees what the rules left, and its result is looked at again."""
    seen: list[str] = []

    def hide(text: str) -> str:
        seen.append(text)
        return text.replace("Alice", "al@example.com")

    redactor = Redactor(function=hide)
    assert redactor.text("Alice and bob@example.com") == "<email> and <email>"
    assert seen == ["Alice and <email>"]
    assert redactor.identity("Alice").startswith("private-")
    assert redactor.identity("nobody") == "nobody"


@pytest.mark.parametrize("wrong", [lambda text: 1 / 0, lambda text: None])
def test_a_function_that_fails_leaks_nothing(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The whole text is replaced, once with a line in the log that holds none of it."""
    redactor = Redactor(function=wrong)
    with caplog.at_level(logging.DEBUG, logger="dspy_prod"):
        assert redactor.text("a secret plan of Alice") == "<redaction failed>"
        assert redactor.text("another") == "<redaction failed>"
        names = {redactor.identity("Alice"), redactor.identity("Bob")}
    assert len(names) == 2
    assert all(re.fullmatch(r"private-[0-9a-f]{12}", name) for name in names)
    assert len(logged(caplog)) == 1
    assert "Alice" not in caplog.text


# -- values ----------------------------------------------------------------------------------------------------------
class Pair(NamedTuple):
    left: Any
    right: Any


class Odd:
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        if not self.text:
            raise RuntimeError("no text")
        return f"Odd {self.text}"


def test_values_are_redacted_at_any_depth() -> None:
    """Texts in mappings, lists and tuples, names of fields, secret fields, and everything else by its text."""
    value = {
        "messages": [{"role": "user", "content": f"I am {EMAIL}"}, ("a", EMAIL)],
        "password": ["x"],
        "api_key": None,
        EMAIL: 1,
        "bob@example.com": 2,
        "pair": Pair(EMAIL, 1),
        "number": 4111111111111111,
        "count": 12,
        "odd": Odd(EMAIL),
        "broken": Odd(""),
        "mapping": MappingProxyType({"x": EMAIL}),
    }
    assert REDACTOR.value(value) == {
        "messages": [{"role": "user", "content": "I am <email>"}, ("a", "<email>")],
        "password": "<secret>",
        "api_key": None,
        "<email>": 1,
        "<email>-2": 2,
        "pair": Pair("<email>", 1),
        "number": "<card>",
        "count": 12,
        "odd": "Odd <email>",
        "broken": "<redaction failed>",
        "mapping": {"x": "<email>"},
    }
    assert EMAIL in value


def test_a_value_without_anything_comes_back_itself() -> None:
    """Nothing is copied that need not be."""
    value = OrderedDict(a=[1, 2.5, None, True, ("x", {"y": "z"})], password="", b={"max_tokens": 5})
    assert REDACTOR.value(value) is value
    mixed: dict[str, Any] = {"clean": value, "mail": EMAIL}
    assert REDACTOR.value(mixed)["clean"] is value
    assert REDACTOR.value(REDACTOR.value(mixed)) == REDACTOR.value(mixed)


def test_cycles_depth_and_shared_parts_are_bounded() -> None:
    """A value that contains itself, is very deep, or is small but huge when written out, ends."""
    cycle: dict[str, Any] = {"mail": EMAIL}
    cycle["self"] = cycle
    assert REDACTOR.value(cycle) == {"mail": "<email>", "self": "<cycle>"}
    deep: Any = EMAIL
    for _ in range(3000):
        deep = [deep]
    assert EMAIL not in json.dumps(REDACTOR.value(deep))
    wide: Any = [EMAIL]
    for _ in range(50):
        wide = [wide, wide]
    clean = REDACTOR.value(wide)
    assert clean[0] is clean[1]


# -- the one in force ------------------------------------------------------------------------------------------------
def test_installing_and_restoring() -> None:
    """The returned function puts back what was there, once, and only what it replaced."""
    assert privacy.active() is None
    first, second = Redactor(), Redactor()
    undo_first = privacy.install(first)
    undo_second = privacy.install(second)
    undo_first()
    assert privacy.active() is second
    undo_second()
    assert privacy.active() is first
    undo_first()
    undo_first()
    assert privacy.active() is None
    with pytest.raises(ConfigError, match="Redactor"):
        privacy.install("yes")  # type: ignore[arg-type]


def test_redactors_are_shown_and_copied_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle or copy works the same; the key of the pseudonyms is part of neither."""
    monkeypatch.setenv("DSPY_PROD_PSEUDONYM_KEY", "the-key-of-pseudonyms")
    redactor = Redactor(("email",), patterns={"ticket": r"TCK-\d+"})
    blob = pickle.dumps(redactor)
    assert b"the-key" not in blob
    assert "the-key" not in repr(redactor)
    for each in (pickle.loads(blob), copy.deepcopy(redactor)):
        assert each.identity(EMAIL) == redactor.identity(EMAIL)
        assert each.text("TCK-1") == "<ticket>"


def test_the_key_decides_the_pseudonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key nobody can compute whose pseudonym it is."""
    monkeypatch.delenv("DSPY_PROD_PSEUDONYM_KEY", raising=False)
    without = REDACTOR.identity(EMAIL)
    monkeypatch.setenv("DSPY_PROD_PSEUDONYM_KEY", "one")
    one = REDACTOR.identity(EMAIL)
    monkeypatch.setenv("DSPY_PROD_PSEUDONYM_KEY", "two")
    assert len({without, one, REDACTOR.identity(EMAIL)}) == 3


# -- identities ------------------------------------------------------------------------------------------------------
def test_contexts_hold_pseudonyms(installed: Redactor) -> None:
    """User, tenant, session and tags; what is no personal data stays as it is, and pseudonyms stay themselves."""
    with call_context(user=EMAIL, tenant="acme", session="+49 30 1234567", tags={"who": EMAIL, "n": "1"}) as outer:
        assert outer.user == installed.identity(EMAIL)
        assert outer.tenant == "acme"
        assert outer.session is not None
        assert outer.session.startswith("phone-")
        assert dict(outer.tags) == {"who": outer.user, "n": "1"}
        with call_context(user=outer.user, tags={"x": "y"}) as inner:
            assert inner.user == outer.user
            assert dict(inner.tags)["who"] == outer.user


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_nobody_is_another_by_calling_himself_by_the_pseudonym(tmp_path: Path, installed: Redactor, store: str) -> None:
    """Whoever had read a user's pseudonym in a trace, and took it for a name, spent that user's budget."""
    victim = installed.identity(EMAIL)
    taken = str(victim.encode(), "utf-8")  # as a web request brings it
    place = "memory://" if store == "memory" else f"sqlite:///{tmp_path}/state.db"
    lm = make_lm("ok", "ok", "ok", store=place, namespace=store, budget=Budget(usd=1, scope="user"))
    for name in (EMAIL, taken):
        with call_context(user=name, tags={"who": name}) as context:
            lm(f"of {name}")
            with call_context(user=context.user, tags={"who": dict(context.tags)["who"]}) as again:
                assert (again.user, again.tags) == (context.user, context.tags)
    with call_context(user=taken, tags={"who": taken}) as context:
        assert context.user is not None
        assert context.user.startswith("private-")
        assert dict(context.tags)["who"] == context.user != victim
        assert pickle.loads(pickle.dumps(context)).user == context.user
    assert {row.value: row.attempts for row in lm.costs(by="user")} == {victim: 1, context.user: 1}
    assert {row.value: row.attempts for row in lm.costs(by="tag:who")} == {victim: 1, context.user: 1}
    assert {budget.who for budget in lm.costs().budgets} == {victim, context.user}
    assert [record.user for record in lm.ledger.records(user=victim)] == [victim]
    lm.close()


def test_without_a_redactor_names_stay_as_they_are() -> None:
    """Nothing happens unless it was asked for."""
    with call_context(user=EMAIL, tags={"who": EMAIL}) as context:
        assert context.user == EMAIL
        assert dict(context.tags) == {"who": EMAIL}


def test_the_state_file_never_holds_the_user_s_address(tmp_path: Path, installed: Redactor) -> None:
    """Neither the ledger nor the budgets' accounts; yet costs and budgets keep two users apart, under their names."""
    other = "bob.baker@example.com"
    lm = make_lm(
        *["ok"] * 100, store=f"sqlite:///{tmp_path}/state.db", budget=Budget(usd=300e-6, per="day", scope="user")
    )
    production = dspy_prod.Production(Ask(lm), tags={"owner": EMAIL})
    calls = {EMAIL: 0, other: 0}
    for user in calls:
        with call_context(user=user, tenant=EMAIL, session=EMAIL, tags={"who": user}):
            refusal = None
            while refusal is None:
                try:
                    production(question="hello")
                    calls[user] += 1
                except BudgetExceededError as error:
                    refusal = error
            assert user not in str(refusal)
    assert calls[EMAIL] == calls[other] > 0
    rows = {row.value: row.usd for row in lm.costs(by="user")}
    assert rows == {
        installed.identity(user): pytest.approx(lm.ledger.total(by="user", value=user).usd) for user in calls
    }
    assert all(usd > 0 for usd in rows.values())
    for user in calls:
        found = lm.ledger.records(user=user, tenant=EMAIL, session=EMAIL)
        assert len(found) == calls[user] + 1, "its calls and its refusal"
        assert lm.ledger.records(user=installed.identity(user)) == found
        assert lm.ledger.total(by="tag:who", value=user).attempts == calls[user]
    assert lm.ledger.total(by="tag:owner", value=EMAIL).attempts == sum(calls.values())
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lm.close()
    files.update({f"closed {path.name}": path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    pseudonym = installed.identity(EMAIL).encode()
    assert any(pseudonym in blob for blob in files.values()), "the search would find what is there"
    assert [name for name, blob in files.items() if EMAIL.encode() in blob or other.encode() in blob] == []


def test_the_redactor_is_part_of_the_public_surface() -> None:
    """It is found under its name, lazily."""
    assert "Redactor" in dspy_prod.__all__
    assert dspy_prod.Redactor is Redactor
