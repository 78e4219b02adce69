"""A predictor's state is taken whole or not at all."""

from __future__ import annotations

import json
from typing import Any

import dspy
import pytest

from dspy_prod.registry import RegistryError
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import put_into
from dspy_prod.registry.published.manifest import Manifest, PredictorEntry, sha256
from dspy_prod.registry.published.signatures import fields_of
from dspy_prod.registry.published.states import dumped


@pytest.mark.parametrize("instructions", [None, 5, ["answer"], {}])
def test_a_state_whose_instructions_are_no_text_is_refused(instructions: Any) -> None:
    """The program was changed, and failed when it was called or saved next."""
    program = dspy.Predict("question -> answer")
    text = dumped("self", program)
    entry = PredictorEntry("self", None, None, sha256(text), fields_of(program.signature))
    state = json.loads(text)
    state["signature"]["instructions"] = instructions
    before = dict(vars(program))
    with pytest.raises(RegistryError, match="self"):
        put_into(
            program, Release("triage", 1, Manifest("d", (entry,), None, "ChatAdapter"), {"self": json.dumps(state)})
        )
    assert vars(program) == before
