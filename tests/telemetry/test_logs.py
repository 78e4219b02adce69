"""`enable_logging`: each event is one line, and no line says too much."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import CircuitBreaker, CircuitOpenError, ConfigError, Event, Price, Retry, call_context, enable_logging
from dspy_prod.telemetry.events import BUS, EventBus
from dspy_prod.telemetry.logs import LEVELS, human_line, json_line
from dspy_prod.testing import Provider, ScriptedEngine, Status

MODEL = "openai/test-model"
_names = itertools.count()


def make_lm(*answers: Any, **policies: Any) -> dspy_prod.LM:
    engine = ScriptedEngine(list(answers))
    defaults: dict[str, Any] = {
        "retry": False,
        "breaker": False,
        "cache": False,
        "prices": {MODEL: Price(input=1, output=2)},
    }
    return dspy_prod.LM(
        MODEL, engine=engine, async_engine=engine.asynchronous, store=f"memory://logs-{next(_names)}",
        **{**defaults, **policies},
    )  # fmt: skip


def down() -> LMServerError:
    return LMServerError("the server had an error", model=MODEL, status=500)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The lines of the logger `app.llm`, as its own handler gets them."""
    written: list[str] = []
    logger = logging.getLogger("app.llm")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(f"{record.levelname} {record.getMessage()}")

    handler = Keep()
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def timeless(line: str) -> str:
    """A line without how long it took, which nobody knows on a busy machine."""
    return re.sub(r", \d+\.\d\d s", ", N s", line)


def test_a_run_reads_as_a_short_story(lines: list[str]) -> None:
    """Failure, retry, opened breaker and refusal are one short line each."""
    lm = make_lm(
        down(), retry=Retry(attempts=2, backoff=0.001),
        breaker=CircuitBreaker(failure_threshold=2, recovery_timeout=60, jitter=0),
    )  # fmt: skip
    stop = enable_logging("DEBUG", logger="app.llm")
    with call_context(user="u1"):
        with pytest.raises(LMServerError):
            lm("hello")
        with pytest.raises(CircuitOpenError):
            lm("hello again")
    stop()
    told = [timeless(line).split("  ") for line in lines]
    assert [parts[0] for parts in told] == [
        "INFO attempt failed",
        "INFO retry",
        "WARNING breaker opened",
        "INFO attempt failed",
        "WARNING rejected",
    ]
    assert told[0][1:] == [MODEL, "LMServerError 500, attempt 1, N s, user=u1"]
    assert told[1][1:] == [MODEL, "attempt 2 in 0.0 s, after LMServerError"]
    assert told[2][1:] == [MODEL, "2 failures in a row, last: LMServerError 500, retry in 60.0 s"]
    assert told[4][1:] == [MODEL, "circuit_open, user=u1"]


def test_a_finished_call_is_a_debug_line_with_its_cost(lines: list[str]) -> None:
    """Ordinary calls are quiet at the default level."""
    lm = make_lm("ok")
    stop = enable_logging(logger="app.llm")
    lm("hello")
    assert lines == []
    stop()
    stop = enable_logging("DEBUG", logger="app.llm")
    with call_context(tenant="acme"):
        lm("hello")
    stop()
    assert list(map(timeless, lines)) == [f"DEBUG call finished  {MODEL}  ok, N s, 0.000020 USD, tenant=acme"]


def test_json_lines_are_one_object_each(lines: list[str]) -> None:
    """Machines get every detail, with the event's name, time and level first."""
    lm = make_lm(down())
    stop = enable_logging(format="json", logger="app.llm")
    with pytest.raises(LMServerError):
        lm("hello")
    stop()
    level, _, text = lines[0].partition(" ")
    row = json.loads(text)
    assert level == row["level"] == "INFO"
    assert list(row)[:3] == ["event", "at", "level"]
    assert row["event"] == "attempt_failed"
    assert row["at"].endswith("+00:00")
    assert (row["model"], row["error"], row["status"]) == (MODEL, "LMServerError", 500)


def test_the_returned_function_ends_it_and_restores_the_level(lines: list[str]) -> None:
    """What was switched on can be switched off, once and for all."""
    logger = logging.getLogger("app.llm")
    logger.setLevel(logging.ERROR)
    stop = enable_logging("DEBUG", logger="app.llm")
    assert logger.level == logging.DEBUG
    stop()
    stop()
    assert logger.level == logging.ERROR
    make_lm("ok")("hello")
    assert lines == []
    logger.setLevel(logging.NOTSET)


def test_enabling_twice_logs_once_and_the_last_one_counts(lines: list[str]) -> None:
    """A notebook cell that is run again does not double the lines; an outdated handle ends nothing."""
    first = enable_logging("DEBUG", logger="app.llm")
    second = enable_logging("DEBUG", format="json", logger="app.llm")
    make_lm("ok")("hello")
    first()
    make_lm("ok")("hello")
    second()
    make_lm("ok")("hello")
    assert [line.startswith('DEBUG {"event":"call_finished"') for line in lines] == [True, True]


def test_two_loggers_do_not_disturb_each_other(lines: list[str]) -> None:
    """Enabling is per logger."""
    other = enable_logging("DEBUG", logger="another")
    stop = enable_logging("DEBUG", logger="app.llm")
    other()
    make_lm("ok")("hello")
    stop()
    assert len(lines) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_prompts_and_answers_are_logged_only_when_asked_for(lines: list[str], as_json: bool) -> None:
    """Users' data stays out of the log by default."""
    lm = make_lm("the answer", "second answer")
    stop = enable_logging("DEBUG", "json" if as_json else "human", logger="app.llm")
    lm("a private question")
    assert not any("private" in line or "the answer" in line for line in lines)
    assert not BUS.wants_content
    stop()
    stop = enable_logging("INFO", "json" if as_json else "human", prompts=True, logger="app.llm")
    lm("a private question")
    stop()
    line = lines[-1]
    if as_json:
        row = json.loads(line.removeprefix("INFO "))
        assert row["prompt"] == [{"role": "user", "text": "a private question"}]
        assert row["answer"] == "second answer"
    else:
        assert line == f"INFO call content  {MODEL}  user: a private question | answer: second answer"
    assert not BUS.wants_content


def test_content_reaches_only_the_listeners_that_asked() -> None:
    """Another listener on the same bus never sees a prompt."""
    bus = EventBus()
    plain: list[Event] = []
    full: list[Event] = []
    bus.add(plain.append)
    remove = bus.add(full.append, content=True)
    bus.emit("retry", 0.0)
    bus.emit_content("call_content", 0.0, prompt=[], answer="x")
    assert [event.name for event in plain] == ["retry"]
    assert [event.name for event in full] == ["retry", "call_content"]
    remove()
    assert not bus.wants_content
    assert bus.active


def test_system_messages_and_other_parts_are_rendered_as_text(lines: list[str]) -> None:
    """A prompt with an image names the image instead of dumping it."""
    image = dspy.Image("data:image/png;base64,iVBORw0KGgo=")
    lm = make_lm("[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]")
    stop = enable_logging("INFO", "json", prompts=True, logger="app.llm")
    with dspy.context(lm=lm):
        dspy.Predict("picture: dspy.Image -> answer")(picture=image)
    stop()
    prompt = json.loads(lines[0].removeprefix("INFO "))["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert "[image]" in prompt[1]["text"]
    assert "iVBORw0KGgo" not in lines[0]


def test_no_line_holds_a_key(lines: list[str]) -> None:
    """A key is neither in an ordinary line nor in one with prompts."""
    with Provider() as provider:
        provider.faults = [Status(401, message="Incorrect API key provided: sk-verysecret123")]
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini",
            api_base=provider.url,
            api_key="sk-verysecret123",
            store="memory://log-keys",
            retry=False,
        )
        stop = enable_logging("DEBUG", "json", prompts=True, logger="app.llm")
        prod = dspy_prod.Production(dspy.Predict("question -> answer"), fallback_response="later")
        with dspy.context(lm=lm):
            prod(question="q")
            prod(question="q")
        stop()
    assert {json.loads(line.partition(" ")[2])["event"] for line in lines} >= {"fallback_response", "call_finished"}
    assert not any("verysecret" in line for line in lines)


def test_without_handlers_lines_go_to_stderr_until_the_application_sets_some_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script sees the lines without any setup, and an application that configures logging later sees them once."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    stop = enable_logging("DEBUG", logger="script")
    make_lm("ok")("hello")
    assert err.getvalue().count("call finished") == 1
    assert " DEBUG " in err.getvalue()
    mine = io.StringIO()
    root.addHandler(logging.StreamHandler(mine))
    make_lm("ok")("hello")
    stop()
    assert err.getvalue().count("call finished") == 1
    assert mine.getvalue().count("call finished") == 1
    assert logging.getLogger("script").handlers == []


@pytest.mark.parametrize("arguments", [{"level": "LOUD"}, {"level": None}, {"level": True}, {"format": "xml"}])
def test_impossible_arguments_are_refused(arguments: dict[str, Any]) -> None:
    """A mistake is told before anything is changed."""
    with pytest.raises(ConfigError):
        enable_logging(**arguments, logger="app.llm")
    assert logging.getLogger("app.llm").level == logging.NOTSET


def test_what_a_user_typed_cannot_fake_a_line() -> None:
    """Line breaks and control characters are escaped."""
    line = human_line(
        Event("rejected", 0.0, {"model": "m", "reason": "rate_limited", "user": "u\n2026 ERROR all\x1b[2J"})
    )
    assert line == "rejected  m  rate_limited, user=u\\n2026 ERROR all\\x1b[2J"


def test_text_that_is_not_valid_unicode_is_still_logged() -> None:
    """A broken string costs the line its beauty, not its existence."""
    assert json.loads(json_line(Event("retry", 0.0, {"model": "\ud800"})))["event"] == "retry"


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("fallback", {"to": "b", "reason": "circuit_open"}, "fallback  to b, circuit_open"),
        ("waiting", {"model": "m", "blocked_on": "rpm"}, "waiting  m  for rpm"),
        ("budget_soft", {"budget": "day", "spent_usd": 8.0, "limit_usd": 10.0, "degrade_to": "b"},
         "budget soft  day  8.000000 of 10.000000 USD spent, now using b"),
        ("budget_overrun", {"model": "m", "cost_usd": 2.0, "bound_usd": 1.0},
         "budget overrun  m  billed 2.000000 USD, reserved 1.000000 USD"),
        ("breaker_closed", {"route": "m", "cause": "", "retry_after": None}, "breaker closed  m"),
        ("call_finished", {"model": "m", "outcome": "cached", "cached": True, "cost_usd": 0.0},
         "call finished  m  cached"),
        ("call_finished", {"model": "m", "outcome": "ok", "cost_usd": None, "latency": 0.5},
         "call finished  m  ok, 0.50 s, cost unknown"),
        ("something_new", {"model": "m", "detail": 1, "call_id": "c", "none": None}, "something new  m  detail=1"),
    ],
)  # fmt: skip
def test_each_event_has_its_short_form(name: str, data: dict[str, Any], line: str) -> None:
    """Known events read well, and unknown ones are told all the same."""
    assert human_line(Event(name, 0.0, data)) == line


def test_the_events_of_the_library_have_a_level_each() -> None:
    """What needs a person is a warning at least, what is routine is not."""
    assert all(LEVELS[name] >= logging.WARNING for name in ("breaker_opened", "rejected", "fallback_response"))
    assert LEVELS["call_finished"] == logging.DEBUG


def test_a_json_line_says_whose_call_it_was_and_what_it_used(lines: list[str]) -> None:
    """Who searches the logs for a version, a session, a tag or a trace found no line; tokens were in none either."""
    lm = make_lm("hello", down())
    enable = enable_logging("DEBUG", format="json", logger="app.llm")
    who = {"user": "u1", "tenant": "acme", "session": "s1", "program": "triage", "prompt_version": "triage/3"}
    with call_context(**who, tags={"team": "blue"}, trace_id="tr-1"):
        lm("hi")
        with pytest.raises(LMServerError):
            lm("hi again")
    enable()
    told = [json.loads(line.partition(" ")[2]) for line in lines]
    assert [row["event"] for row in told] == ["call_finished", "attempt_failed"]
    for row in told:
        assert {name: row[name] for name in who} == who
        assert (row["tags"], row["trace_id"]) == ({"team": "blue"}, "tr-1")
    finished, failed = told
    record = lm.ledger.records(limit=1, outcome="ok")[0]
    assert (finished["input_tokens"], finished["output_tokens"]) == (record.input_tokens, record.output_tokens)
    assert finished["output_tokens"] is not None
    assert failed["output_tokens"] is None


def test_personal_tags_are_pseudonyms_in_a_line(lines: list[str]) -> None:
    """A tag may hold an address: two customers stay two."""
    lm = make_lm("hello", "hello")
    stop = enable_logging("DEBUG", format="json", logger="app.llm")
    for customer in ("a@example.org", "b@example.org"):
        with call_context(tags={"customer": customer}):
            lm("hi")
    stop()
    one, other = (json.loads(line.partition(" ")[2])["tags"]["customer"] for line in lines)
    assert one.startswith("email-")
    assert one != other
