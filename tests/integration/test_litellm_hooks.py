"""Functions that LiteLLM calls for its user, and functions that only have their names: what they ask is no answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import litellm
import pytest
from litellm.integrations.custom_logger import CustomLogger

from dspy_prod.compat.stay import rejected
from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import ask, outcome, records
from tests.e2e.test_unusable import QUICK, TOLD, WAYS, body

UNREADABLE = body(lambda whole, _, __: whole.update(choices="nonsense"))
"""It was generated, and says what it took: owed once, and by that."""


def booked(lm: Any) -> list[tuple[str, int | None, bool]]:
    return [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)]


# -- names -----------------------------------------------------------------------------------------------------------
def failure_handler(call: Callable[[], Any]) -> Any:
    return call()


def get_model_info(call: Callable[[], Any]) -> Any:
    return call()


def post_call_rules(call: Callable[[], Any]) -> Any:
    return call()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caller", [failure_handler, get_model_info, post_call_rules])
def test_a_caller_may_have_the_name_of_a_function_of_litellm(
    serve: MakeProvider, connect: MakeLM, caller: Callable[[Callable[[], Any]], Any], way: str
) -> None:
    """An answer to it was none: it was asked for three times, and each time booked at its bound."""
    provider = serve(faults=Verbatim(UNREADABLE))
    lm = connect(provider, engine="litellm", retry=QUICK)
    assert isinstance(caller(lambda: ask(lm, way)), Exception)
    assert len(provider.calls) == 1
    assert booked(lm) == [("error", TOLD, False)]


def validate_schema() -> None:
    raise ValueError("not of the schema")


def test_only_a_function_of_litellm_rejects_an_answer_for_its_user() -> None:
    """Others check schemas too, and what they say may be that an answer cannot be read."""
    own = FunctionType(validate_schema.__code__, {**globals(), "__name__": "litellm.litellm_core_utils.rules"})
    errors = [outcome(validate_schema), outcome(own)]
    assert [rejected(error) for error in errors] == [False, True]


class Judge(CustomLogger):
    """Has another model judge an answer when LiteLLM logs that."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self._lm = lm
        self._asks = True
        self.asked = threading.Event()

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        if self._asks:
            self._asks = False
            outcome(lambda: self._lm("Is this good?"))
            self.asked.set()


def test_a_judge_may_be_asked_by_a_logger_of_litellm(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above it on the stack is the function of LiteLLM that logs the call before."""
    lm = connect(serve(faults=Verbatim(body())), engine="litellm", retry=QUICK)
    asked = serve(faults=Verbatim(UNREADABLE))
    judging = connect(asked, engine="litellm", retry=QUICK)
    judge = Judge(judging)
    monkeypatch.setattr(litellm, "callbacks", [judge])
    assert lm("a question") == ["hello"]
    assert judge.asked.wait(30)
    assert len(asked.calls) == 1
    assert booked(judging) == [("error", TOLD, False)]
    assert booked(lm) == [("ok", TOLD, False)]
