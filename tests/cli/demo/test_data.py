"""The demo's data and its program, without a model."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Any

import dspy
import pytest

from dspy_prod.cli.demo.triage import CATEGORIES, URGENCIES, Triage, messages, similar_examples
from dspy_prod.testing import ScriptedEngine

ANSWER = '{"category": "shipping", "urgency": "high", "reply": "We will ask the courier."}'


def test_there_are_sixty_messages_with_ids_and_texts_of_their_own() -> None:
    found = messages()
    assert len(found) == 60
    assert len({message.id for message in found}) == 60
    assert len({message.message for message in found}) == 60
    assert found == messages()


def test_every_label_is_one_of_the_signature_and_no_category_is_rare() -> None:
    found = messages()
    assert Counter(message.category for message in found) == dict.fromkeys(CATEGORIES, 15)
    urgencies = Counter(message.urgency for message in found)
    assert set(urgencies) == set(URGENCIES)
    assert min(urgencies.values()) >= 10


def test_the_first_messages_already_show_every_category_user_and_tenant() -> None:
    first = messages()[:13]
    assert {message.category for message in first} == set(CATEGORIES)
    assert {message.user for message in first} == {"u1", "u2", "u3"}
    assert {message.tenant for message in first} == {"acme", "globex"}


def test_a_user_belongs_to_one_tenant_and_every_user_writes() -> None:
    tenants = {(message.user, message.tenant) for message in messages()}
    assert sorted(user for user, _ in tenants) == ["u1", "u2", "u3"]


def test_no_address_in_the_messages_can_belong_to_anybody() -> None:
    addresses = [found for message in messages() for found in re.findall(r"\S+@([\w.-]+\w)", message.message)]
    assert len(addresses) >= 5
    assert set(addresses) == {"example.com"}


def test_examples_are_labelled_like_the_messages_and_none_of_them_is_one() -> None:
    examples = similar_examples("anything", 100)
    assert Counter(example.category for example in examples) == dict.fromkeys(CATEGORIES, 8)
    assert {example.urgency for example in examples} == set(URGENCIES)
    assert all(re.fullmatch(r"[^.!?]{8,70}\.", example.reply) for example in examples)
    assert not {example.message for example in examples} & {message.message for message in messages()}


def test_the_most_similar_example_comes_last_and_word_endings_do_not_matter() -> None:
    *_, nearest = similar_examples("They refunded nothing of what was promised last week!", 3)
    assert nearest.message == "I was promised a refund last week and my money is not back."
    assert similar_examples("anything", 0) == []


def test_taking_the_nearest_examples_category_gets_as_many_right_as_documented() -> None:
    right = sum(similar_examples(one.message, 1)[0].category == one.category for one in messages())
    assert right == 47


def test_triage_shows_the_model_the_similar_example_and_asks_for_a_schema() -> None:
    engine = ScriptedEngine(ANSWER)
    with dspy.context(lm=dspy.LM("openai/scripted", engine=engine, cache=False), adapter=dspy.JSONAdapter()):
        answer = Triage()(message="Where is my parcel? The courier does not answer.")
    assert (answer.category, answer.urgency, answer.reply) == ("shipping", "high", "We will ask the courier.")
    [request] = engine.requests
    said = str(request)
    assert "The parcel is late and the courier does not answer." in said
    assert "'enum': ['billing', 'technical', 'account', 'shipping']" in said
    assert "'pattern'" in said


def test_triage_answers_asynchronously_too() -> None:
    engine = ScriptedEngine(ANSWER)
    lm = dspy.LM("openai/scripted", engine=engine, async_engine=engine.asynchronous, cache=False)

    async def ask() -> Any:
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            return await Triage().acall(message="Where is my parcel?")

    assert asyncio.run(ask()).category == "shipping"


def test_a_long_reply_of_a_model_that_ignores_the_pattern_is_accepted() -> None:
    reply = "We are sorry. " * 20
    engine = ScriptedEngine(ANSWER.replace("We will ask the courier.", reply))
    with dspy.context(lm=dspy.LM("openai/scripted", engine=engine, cache=False), adapter=dspy.JSONAdapter()):
        assert Triage()(message="Where is my parcel?").reply == reply


@pytest.mark.parametrize("examples", [0, 2])
def test_demos_found_by_an_optimizer_replace_the_examples(examples: int) -> None:
    program = Triage(examples)
    found = dspy.Example(message="a", category="account", urgency="low", reply="Found by an optimizer.")
    program.sort.demos = [found]
    engine = ScriptedEngine(ANSWER)
    with dspy.context(lm=dspy.LM("openai/scripted", engine=engine, cache=False), adapter=dspy.JSONAdapter()):
        program(message="Where is my parcel? The courier does not answer.")
    said = str(engine.requests[0])
    assert "Found by an optimizer." in said
    assert "The parcel is late" not in said
