"""Secrets and personal data stay out of error texts and logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import ConfigError, Redactor, call_context, enable_logging, privacy
from dspy_prod.privacy.error_text import error_text
from tests.privacy.support import EMAIL, MODEL, Ask, installed, make_lm

__all__ = ["installed"]
KEY = "sk-proj-Zq7Zq7Zq7Zq7Zq7Zq7"
REDACTOR = Redactor()


# -- errors ----------------------------------------------------------------------------------------------------------
def test_error_texts_are_redacted(installed: Redactor, caplog: pytest.LogCaptureFixture) -> None:
    """In reports, events, and the log of an unexpected error with its traceback."""
    events: list[Any] = []
    remove = dspy_prod.add_listener(events.append)

    class Fails(dspy.Module):
        def forward(self, question: str) -> Any:
            raise RuntimeError(f"no account for {EMAIL}")

    try:
        production = dspy_prod.Production(Fails(), fallback_response={"answer": "later"}, catch="all")
        with caplog.at_level(logging.ERROR, logger="dspy_prod"), call_context(user=EMAIL):
            report = dspy_prod.call_report(production(question="q"))
    finally:
        remove()
    assert report.error == "RuntimeError: no account for <email>"
    assert EMAIL not in repr(events)
    assert "Traceback" in caplog.text
    assert EMAIL not in caplog.text


def test_error_texts_stay_as_they_are_without_a_redactor() -> None:
    """The text of an error is the user's to see."""
    assert EMAIL in error_text(RuntimeError(f"no account for {EMAIL}"))


# -- logs ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The lines of the logger `app.privacy`, as its own handler formats them."""
    written: list[str] = []
    logger = logging.getLogger("app.privacy")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Keep()
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def speak(**options: Any) -> None:
    """A call with personal data in prompt, answer, user and error, logged."""
    stop = enable_logging("DEBUG", prompts=True, logger="app.privacy", **options)
    try:
        lm = make_lm(f"answer to {EMAIL}", LMServerError(f"{KEY} of {EMAIL}", model=MODEL, status=500))
        with call_context(user=EMAIL, tenant=EMAIL):
            lm(f"I am {EMAIL}, my key is {KEY}, ticket TCK-77")
            production = dspy_prod.Production(Ask(lm), fallback_response={"answer": "later"})
            production(question="again")
    finally:
        stop()


@pytest.mark.parametrize("format", ["human", "json"])
@pytest.mark.parametrize("active", [False, True])
def test_no_line_holds_an_address_or_a_key(lines: list[str], format: str, active: bool) -> None:
    """With a redactor in force or without, prompts included; users are still told apart."""
    restore = privacy.install(Redactor() if active else None)
    try:
        speak(format=format)
    finally:
        restore()
    text = "\n".join(lines)
    assert "<email>" in text
    assert "my key is <" in text  # of the mark that follows nothing is left where "secret" is somebody's password
    assert "TCK-77" in text
    assert REDACTOR.identity(EMAIL) in text
    assert EMAIL.encode() not in text.encode()
    assert KEY.encode() not in text.encode()


def test_the_given_redactor_wins_over_the_installed_one(lines: list[str], installed: Redactor) -> None:
    """A log may be stricter than the rest."""
    speak(redact=Redactor(patterns={"ticket": r"TCK-\d+"}))
    text = "\n".join(lines)
    assert "<ticket>" in text
    assert "TCK-77" not in text


def test_logs_are_not_redacted_when_told_so(lines: list[str]) -> None:
    """`redact=False` logs as it is, and anything else than these is a mistake."""
    speak(redact=False)
    assert EMAIL in "\n".join(lines)
    with pytest.raises(ConfigError, match="redact"):
        enable_logging(logger="app.privacy", redact="yes")  # type: ignore[arg-type]


def test_ids_are_never_taken_for_personal_data(lines: list[str]) -> None:
    """A call can be followed by its id from the log to the ledger."""
    stop = enable_logging("DEBUG", "json", logger="app.privacy")
    lm = make_lm("ok")
    lm("hello")
    stop()
    record = lm.ledger.records()[0]
    row = json.loads(lines[-1])
    assert (row["call_id"], row["record_id"]) == (record.call_id, record.id)
