"""What must not be found anywhere: keys, and personal data once it is redacted. Searched for as bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Production, tracking
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.testing import FaultPlan, Status
from dspy_prod.tracking.content import Content
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import outcome
from tests.tracking.conftest import traces_in

KEY = "sk-proj-Zq81fTnVbR4mXw7LcYd2HsKe9GuPjA3o"
EMAIL = "jane.roe@example.org"
CARD = "4111 1111 1111 1111"
IBAN = "DE89 3704 0044 0532 0130 00"
PHONE = "+49 30 9018 2045"
TICKET = "TCK-99812"
SENTENCE = f"I am {EMAIL}, call {PHONE}. Card {CARD}, IBAN {IBAN}, key {KEY}, about {TICKET}."
ANSWER = f"[[ ## answer ## ]]\nDear {EMAIL}, your card {CARD} is fine. {TICKET}\n\n[[ ## completed ## ]]"


def everything_below(folder: Path) -> bytes:
    """All bytes of all files: MLflow's database with its journals, artifacts, and the ledger."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize(
    ("content", "autolog"),
    [
        pytest.param("redacted", True, id="redacted-autolog"),
        pytest.param("off", False, id="off-lean"),
        pytest.param("redacted", False, id="redacted-lean", marks=pytest.mark.slow),
        pytest.param("off", True, id="off-autolog", marks=pytest.mark.slow),
    ],
)
def test_no_secret_and_no_personal_data_is_written(
    serve: MakeProvider,
    connect: MakeLM,
    track: Callable[..., None],
    uri: str,
    sqlite_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: str,
    autolog: bool,
) -> None:
    """Neither in MLflow's database and artifacts, nor in the ledger, nor in a log, prompts included."""
    caplog.set_level(logging.DEBUG)
    track(content=content, redact={"ticket": r"TCK-\d+"}, autolog=autolog)
    stop = dspy_prod.enable_logging("DEBUG", prompts=True)
    provider = serve(answer=ANSWER, faults=FaultPlan.script([Status(500), Status(401)]))
    lm = connect(provider, api_key=KEY, store=sqlite_url, retry={"attempts": 2, "backoff": 0.001})
    prod = Production(dspy.Predict("question -> answer"), name="asked")
    with dspy.context(lm=lm), dspy_prod.call_context(user=EMAIL, session=EMAIL, tags={"from": EMAIL}):
        outcome(lambda: prod(question=SENTENCE))
        assert EMAIL in prod(question=SENTENCE).answer, "the caller gets what the model said"
    assert tracking.flush(60)
    stop()
    assert len(traces_in(uri)) == 2
    lm.close()
    lm.pipeline.store.close()
    written = everything_below(tmp_path) + caplog.text.encode()
    assert b"asked" in written
    for hidden in (KEY, EMAIL, CARD, CARD.replace(" ", ""), IBAN, PHONE, TICKET):
        assert hidden.encode() not in written, hidden
    records = lm.ledger.records(user=EMAIL)
    assert len(records) >= 2, "one's own records are found by the real name"
    assert records[0].user is not None
    assert records[0].user.startswith("email-")
    if content == "redacted":
        assert b"<email>" in written
        assert b"<ticket>" in written


@pytest.mark.parametrize("mode", ["full", "redacted", "off"])
def test_a_span_of_mlflow_s_own_shows_no_header_of_an_lm(mode: Any) -> None:
    """MLflow's autologging writes an LM's `kwargs` as attributes, its headers and addresses among them."""
    attributes = {
        "extra_headers": '{"x-gateway": "hidden-1"}', "aws_secret_access_key": '"hidden-2"', "temperature": "0.5",
        "base_url": '"https://user:hidden-3@host"',
    }  # fmt: skip
    shown = Content(mode, Redactor()).foreign({"name": "LM.__call__", "attributes": attributes})
    assert "hidden" not in str(shown)
    assert ("temperature" in shown["attributes"]) is (mode != "off")
