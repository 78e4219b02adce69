"""Names and braces survive MLflow's alphabet and MLflow's templates."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities.model_registry import PromptVersion
from mlflow.prompt.constants import PROMPT_NAME_RULE

from dspy_prod.registry.names import JOURNAL, Reference, encoded
from dspy_prod.registry.published.rendering import Slots, escaped
from tests.registry.inverses import decoded, unescaped

NAMES = st.text(st.sampled_from("ab1_.-[]'\"ü 5d"), min_size=1, max_size=12) | st.text(min_size=1, max_size=12)
TEXTS = st.text(st.sampled_from("{}%x \n\u2060_.1"), max_size=30) | st.text(max_size=30)


class Signature:
    """As much of a signature as slots need."""

    def __init__(self, fields: list[str]) -> None:
        self.input_fields = {name: type("Info", (), {"annotation": str})() for name in fields}


@given(NAMES)
def test_a_predictor_s_name_can_be_read_back_from_its_prompt(name: str) -> None:
    """Any name becomes one that MLflow takes, and comes back."""
    assert PROMPT_NAME_RULE.match(encoded(name))
    assert decoded(encoded(name)) == name


@given(NAMES)
def test_no_predictor_takes_the_journal_s_name(name: str) -> None:
    """The journal is a prompt beside those of the predictors."""
    assert encoded(name) != JOURNAL


@given(TEXTS)
def test_braces_in_a_text_are_no_variables_and_come_back(text: str) -> None:
    """MLflow finds neither a variable nor a Jinja block in an escaped text, which looks the same."""
    hidden = escaped(text)
    assert PromptVersion("n", 1, [{"role": "user", "content": hidden}]).variables == set()
    assert PromptVersion("n", 1, hidden).variables == set()
    assert "{{" not in hidden
    assert "{%" not in hidden
    assert unescaped(hidden) == text
    assert hidden.replace("\u2060", "") == text.replace("\u2060", "")


@given(st.lists(TEXTS, min_size=3, max_size=3))
def test_inputs_are_found_between_any_texts(texts: list[str]) -> None:
    """MLflow finds the inputs and nothing else, whatever stands around them, and fills them in at their place."""
    slots = Slots(Signature(["question", "context"]))
    first, second = slots.inputs["question"], slots.inputs["context"]
    template = slots.template(f"{texts[0]}{first}{texts[1]}{second}{texts[2]}")
    prompt = PromptVersion("n", 1, [{"role": "user", "content": template}])
    assert prompt.variables == {"question", "context"}
    parts = re.split(r"\{\{(?:question|context)\}\}", template)
    assert [unescaped(part) for part in parts] == texts
    filled = prompt.format(question="Q", context="C")[0]["content"]
    assert filled == f"{escaped(texts[0])}Q{escaped(texts[1])}C{escaped(texts[2])}"
    assert json.loads(json.dumps(template)) == template


def test_references_are_read_in_all_their_forms() -> None:
    """By number or alias, with or without MLflow's scheme."""
    assert Reference.of("triage/3") == Reference.of("prompts:/triage/3") == Reference("triage", version=3)
    assert Reference.of("triage@production") == Reference.of("prompts:/triage@production")
    assert str(Reference.of("prompts:/triage@production")) == "triage@production"
