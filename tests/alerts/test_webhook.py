"""Alerts reach a webhook that is slow, dead or wrong, or they are counted; a call never waits for them."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, CircuitBreaker, ConfigError, Price, call_context
from dspy_prod.alerts import Notice, sending
from dspy_prod.alerts.folding import Folding
from dspy_prod.alerts.notices import DEFAULT, KINDS, notice_of
from dspy_prod.alerts.posting import post
from dspy_prod.telemetry.events import BUS, EVENTS, Event
from dspy_prod.testing import Provider, Status
from tests.listening import Listening, Silent

SECRET = "/services/T0123456/B7654321/qL3vErYsEcReT9abcdefghij"
MODEL = "openai/gpt-4o-mini"


class Chat:
    """A webhook that does as it is told, and keeps what it gets.

    Attributes:
        got: bodies of the requests. answer: the status of each, or what does something else with the handler.
    """

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.answer: Callable[[Any], None] | int = 200
        self.came = threading.Condition()
        chat = self

        class Handler(Silent):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat.came:
                    chat.got.append(body)
                    chat.paths.append(self.path)
                    chat.came.notify_all()
                if callable(chat.answer):
                    chat.answer(self)
                    return
                self.send_response(chat.answer)
                self.send_header("Content-Length", "0")
                if chat.answer == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

        self._listening = Listening(Handler)
        self.url = self._listening.url + SECRET
        self.stop = self._listening.stop

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        """The bodies of so many requests, once they have come."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.got) >= count, 20), f"{len(self.got)} of {count} came"
            return list(self.got)


@pytest.fixture
def chat() -> Iterator[Chat]:
    chat = Chat()
    yield chat
    chat.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sending, "_BACK_OFF", (0.01, 0.05))
    yield
    for each in list(sending._OPEN):
        each.close(0)


def opened(route: str = MODEL, cause: str = "LMServerError 500") -> None:
    BUS.emit("breaker_opened", time.time(), route=route, cause=cause, retry_after=60.0, generation=1)


def waits(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if condition():
            return True
        threading.Event().wait(0.005)
    return False


def test_a_real_outage_and_a_spent_budget_are_told_in_the_chat(chat: Chat) -> None:
    """From the calls themselves, through a real server, in words that name the remedy or the reason."""
    with Provider(faults=[Status(500)] * 2, usage=(20, 50), price=(0.15, 0.6)) as provider:
        with pytest.warns(UserWarning, match="more than 5 % of the budget"):
            lm = dspy_prod.LM(
                MODEL, api_base=provider.url, api_key="sk-none-of-yours-1234", store="memory://", retry=False,
                breaker=CircuitBreaker(failure_threshold=2), prices={MODEL: Price(input=0.15, output=0.6)},
                cache=False, max_tokens=50, budget=Budget(usd=0.00006, scope="tenant", name="each"),
            )  # fmt: skip
        hook = dspy_prod.alerts.webhook(chat.url)
        with call_context(tenant="acme", user="ann@acme.com"):
            for _ in range(2):
                with pytest.raises(LMServerError):
                    lm("hi")
            lm.breaker("reset")
            lm("hi")
            for _ in range(3):
                with pytest.raises(BudgetExceededError):
                    lm("hi")
    texts = [each["text"] for each in chat.wait_for(3)]
    assert hook.flush()
    assert texts[0].startswith(
        f":warning: *breaker opened* {MODEL}: The circuit of {MODEL} is open (2 failures in a row, "
    )
    assert texts[1].startswith(f":information_source: *breaker closed* {MODEL}:")
    assert texts[2].startswith(":warning: *budget exhausted* each: The budget 'each' (of one of its accounts) is spent")
    assert chat.wait_for(4)[3]["text"].endswith("_(1 more)_")
    assert "acme" not in str(chat.got)
    assert set(chat.paths) == {SECRET}
    status = hook.status()
    assert (status.sent, status.folded, status.dropped, status.waiting, status.failing) == (4, 2, 0, 0, None)


def test_a_storm_is_one_message_in_a_window(chat: Chat) -> None:
    """A hundred circuits opening are one message now, and one with the count when the window ends."""
    hook = dspy_prod.alerts.webhook(chat.url, every=0.5, format="json")
    for _ in range(100):
        opened()
    first, second = chat.wait_for(2)
    assert (first["event"], first["subject"], first["level"]) == ("breaker_opened", MODEL, "warning")
    assert (first["folded"], second["folded"]) == (0, 98)
    hook.close()
    opened()
    assert hook.status().sent == 2


def test_a_slow_chat_holds_up_no_call(chat: Chat) -> None:
    """Events are heard in microseconds though the webhook takes its time; then it is given up, tried again, counted."""
    release = threading.Event()
    chat.answer = lambda handler: release.wait(30) and None
    hook = dspy_prod.alerts.webhook(chat.url, timeout=0.05)
    began = time.perf_counter()
    for number in range(1_500):
        opened(f"model-{number}")
    took = time.perf_counter() - began
    assert took < 1.0, "as much as one try that nobody waits for takes"
    assert waits(lambda: hook.status().dropped > 400)  # there was no room for
    chat.wait_for(2)
    assert hook.status().failing == "no answer within 0.05 s"
    assert hook.flush(0.2) is False
    release.set()


def test_a_chat_that_sends_a_byte_a_second_is_given_up_too(chat: Chat) -> None:
    """A timeout for each step alone would keep the thread for hours."""
    ended = threading.Event()

    def trickle(handler: Any) -> None:
        try:
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 500:
                handler.wfile.write(bytes([byte]))
                if ended.wait(0.02):
                    return
        except OSError:
            ended.set()

    chat.answer = trickle
    began = time.monotonic()
    outcome = post(chat.url, b"{}", 0.3)
    assert time.monotonic() - began < 3
    assert (outcome.sent, outcome.again, outcome.why) == (False, True, "no answer within 0.3 s")
    assert ended.wait(5), "the connection is closed, and the thread with it"


@pytest.mark.parametrize(("status", "tries"), [(500, 5), (429, 5), (404, 1), (302, 1)])
def test_errors_are_tried_again_where_that_may_help(
    chat: Chat, status: int, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Five times with pauses, or not at all; then it is counted and logged, without the URL."""
    chat.answer = status
    hook = dspy_prod.alerts.webhook(chat.url)
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        opened()
        assert waits(lambda: f"1 alerts were not delivered to the webhook ({status})" in caplog.text)  # last of all
    assert hook.status().dropped == 1
    assert len(chat.got) == tries
    assert hook.status().failing == str(status)
    chat.answer = 200
    opened("another")
    chat.wait_for(tries + 1)
    assert waits(lambda: hook.status().failing is None)


def test_a_dead_chat_is_counted_and_nothing_is_lost_when_it_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody listens there; the next message goes out when somebody does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hook = dspy_prod.alerts.webhook(f"http://127.0.0.1:{port}{SECRET}")
    opened()
    assert waits(lambda: hook.status().failing == "ConnectionRefusedError")
    assert waits(lambda: hook.status().dropped == 1)
    assert SECRET not in caplog.text


def test_the_url_is_shown_nowhere(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has it can write into the chat: it is in no repr, error, log or message."""
    hook = dspy_prod.alerts.webhook(chat.url, events=["breaker_opened"])
    with caplog.at_level(logging.DEBUG):
        opened(cause=f"cannot reach {chat.url}")
        chat.wait_for(1)
        hook.close()
    shown = (repr(hook), str(vars(hook)), caplog.text, str(chat.got))
    assert all(SECRET not in each and "qL3vErY" not in each for each in shown)
    with pytest.raises(ConfigError) as refused:
        dspy_prod.alerts.webhook(chat.url.replace("http:", "ftp:"))
    assert SECRET not in str(refused.value)


def test_messages_hold_no_secret_and_nobody_s_address(chat: Chat) -> None:
    """Texts of errors repeat what was sent to them."""
    dspy_prod.alerts.webhook(chat.url, format="json")
    error = "denied for key sk-proj-abcdefghijklmnopqrstuvwx of ann@acme.com"
    BUS.emit("store_degraded", time.time(), path="/home/ann/state.db", error=error)
    (told,) = chat.wait_for(1)
    assert told["subject"] == "state.db"
    assert "sk-proj" not in str(told)
    assert "ann@acme.com" not in str(told)


def test_a_text_can_neither_call_everybody_nor_show_another_link(chat: Chat) -> None:
    """Slack takes `<!channel>` and `<http://...|text>` for what they say."""
    dspy_prod.alerts.webhook(chat.url)
    opened(cause="<!channel> & <http://evil.example|click>")
    (told,) = chat.wait_for(1)
    assert "<" not in told["text"]
    assert "&lt;!channel&gt; &amp; " in told["text"]


def test_a_format_of_one_s_own_gets_the_notice(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    """And when it fails, the message is counted as dropped and the next one goes out."""

    def pager(notice: Notice) -> dict[str, Any]:
        if notice.subject == "bad":
            raise ValueError("no")
        return {"routing": "llm", "summary": notice.text, "severity": notice.level}

    hook = dspy_prod.alerts.webhook(chat.url, format=pager)
    opened("bad")
    opened("good")
    (told,) = chat.wait_for(1)
    assert told["routing"] == "llm"
    assert told["summary"].startswith("The circuit of good is open")
    assert hook.status().dropped == 1
    assert "format failed with ValueError" in caplog.text


def test_only_what_was_asked_for_is_told(chat: Chat) -> None:
    """And events of every call cannot be asked for."""
    hook = dspy_prod.alerts.webhook(chat.url, events=["breaker_closed"])
    opened()
    BUS.emit("breaker_closed", time.time(), route=MODEL, cause="reset", retry_after=None, generation=2)
    assert hook.flush()
    assert [each["text"].split("*")[1] for each in chat.got] == ["breaker closed"]


SAMPLES: dict[str, dict[str, Any]] = {
    "budget_soft": {"budget": "day/tenant=acme", "spent_usd": 0.81, "limit_usd": 1.0, "degrade_to": "openai/small"},
    "rejected": {"reason": "budget_exceeded", "budget": "day", "model": MODEL, "route": "primary"},
    "budget_overrun": {"model": MODEL, "cost_usd": 0.2, "bound_usd": 0.1},
    "experiment_alarm": {"experiment": "tone", "what": "rollback", "reason": "SRM", "stage": 1, "variant": "control",
                         "verdict": "invalid"},
    "promotion": {"program": "faq", "action": "rollback", "alias": "production", "from_version": 4, "to_version": 3,
                  "by": "ann@acme.com"},
    "tracking_lost": {"lost": 4, "messages_lost": 0, "error": None},
}  # fmt: skip
WORDS = {
    "budget_soft": "The budget 'day/tenant' (of one of its accounts) has passed its soft threshold: 0.81 of 1.00 USD; "
    "calls go to openai/small now",
    "rejected": f"The budget 'day' is spent: calls of {MODEL} are refused",
    "budget_overrun": f"A call of {MODEL} was billed 0.200000 USD, and 0.100000 were reserved: check prices=",
    "experiment_alarm": "Experiment tone: rollback (control). INVALID, nothing can be concluded: SRM",
    "promotion": "rollback of faq@production: from version 4 to version 3",
    "tracking_lost": "4 traces and 0 messages did not reach MLflow",
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_each_event_has_words_of_its_own(name: str) -> None:
    """A person who is woken by it can tell what has happened."""
    event = Event(name, 1.8e9, SAMPLES[name])
    assert notice_of(sending.kind_of(event), event).text == WORDS[name]
    assert set(SAMPLES[name]) <= EVENTS[name].fields


@pytest.mark.parametrize(
    ("of", "told"),
    [
        ({"scope": "all", "value": ""}, "all"),
        ({"scope": "model", "value": "openai/gpt-4o"}, "model openai/gpt-4o"),
        ({"scope": "program", "value": "triage"}, "program triage"),
        ({"scope": "tenant", "value": "acme"}, "one tenant"),
    ],
)
def test_what_an_operator_stops_is_told_without_naming_a_tenant(of: dict[str, Any], told: str) -> None:
    """With the reason and the end; two things that are stopped are two subjects, and not one that was told already."""
    stop = Event("calls_stopped", 1.8e9, {**of, "reason": "a leak", "by": "eve@host", "until": 1.8e9 + 60})
    notice = notice_of("calls_stopped", stop)
    assert notice.text == (
        f"An operator stopped calls: {told} (a leak). They are refused in every worker, until 2027-01-15T08:01:00+00:00"
    )
    assert (notice.level, notice.subject) == ("warning", told)
    goes_on = notice_of("calls_resumed", Event("calls_resumed", 1.8e9, of))
    assert (goes_on.level, goes_on.text) == ("info", f"Calls that an operator had stopped go on: {told}")


def test_two_tenants_that_are_stopped_are_two_alerts() -> None:
    """They are called alike, and the second one was held back as if it had been told."""
    folding = Folding(300.0)
    acme, umbrella, again = (
        notice_of("calls_stopped", Event("calls_stopped", 1.8e9, {"scope": "tenant", "value": value}))
        for value in ("acme", "umbrella", "acme")
    )
    assert folding.note(acme, 0.0) is not None
    assert folding.note(umbrella, 5.0) is not None
    assert folding.note(again, 6.0) is None


@pytest.mark.parametrize("kind", sorted(KINDS - {"budget_exhausted"}))
def test_every_kind_can_be_put_into_words(kind: str) -> None:
    """Whatever details it carries; nobody's name among them."""
    numbers = {
        field for field in EVENTS[kind].fields if field.endswith("_usd") or field in ("retry_after", "lost", "until")
    }
    data = {field: 1.5 if field in numbers else f"the {field}" for field in EVENTS[kind].fields}
    told = notice_of(kind, Event(kind, 1.8e9, data))
    assert told.text
    assert not any(f"the {each}" in told.text for each in ("user", "tenant", "session", "by"))


def test_what_cannot_be_is_refused_with_the_remedy() -> None:
    """At once, and not when the first alert is due."""
    url = "https://hooks.example/x"
    for arguments, said in (
        ({"url": "hooks.example"}, "begins with https://"),
        ({"url": "https:///services/x"}, "names a host"),
        ({"url": "http://user:pw@hooks.example/x"}, "name and password"),
        ({"url": "http://hooks.example:99999/"}, "1 to 65535"),
        ({"url": "http://hooks.example:0/"}, "1 to 65535"),
        ({"url": "http://hooks.example:port/"}, "1 to 65535"),
        ({"url": "http://[::1/x"}, "cannot be read"),
        ({"url": f"https://{'h' * 64}.example/x"}, "cannot be read"),
        ({"url": "http://x y/"}, "a space"),
        ({"url": "https://hooks.example\n/"}, "a line break"),
        ({"url": "https://hooks.example/x\n"}, "a line break"),
        ({"url": "https://hooks.example/größe"}, "another character"),
        ({"url": url, "events": ["breaker_open"]}, "'breaker_open' cannot be told"),
        ({"url": url, "events": ["rejected"]}, "there is 'budget_exhausted'"),
        ({"url": url, "events": "promotion"}, r"use a list of names, such as \['promotion'\]"),
        ({"url": url, "every": 0}, "every=0"),
        ({"url": url, "timeout": float("nan")}, "timeout=nan"),
        ({"url": url, "format": "xml"}, "'slack', 'json' or a function"),
    ):
        with pytest.raises(ConfigError, match=said):
            dspy_prod.alerts.webhook(**arguments)  # type: ignore[arg-type]
    assert not sending._OPEN
    assert set(DEFAULT) <= KINDS


def test_the_end_of_a_program_sends_what_is_left_and_waits_for_no_dead_chat(chat: Chat) -> None:
    """What was held back is told; a webhook that hangs costs twice its timeout, and not an hour."""
    release = threading.Event()
    hanging = Chat()
    hanging.answer = lambda handler: release.wait(30) and None
    source = f"""
import time, dspy_prod
from dspy_prod.telemetry.events import BUS
dspy_prod.alerts.webhook({chat.url!r}, format="json")
dspy_prod.alerts.webhook({hanging.url!r}, timeout=0.3)
for _ in range(5):
    BUS.emit("breaker_opened", time.time(), route="m", cause="c", retry_after=1.0, generation=1)
import atexit
print(time.time(), flush=True)
"""
    told = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True)
    ended = time.time() - float(told.stdout)
    release.set()
    hanging.stop()
    first, rest = chat.wait_for(2)
    assert (first["folded"], rest["folded"]) == (0, 3)
    assert ended < 8
    assert "alerts were not delivered" in told.stderr


def test_a_forked_child_tells_its_own_and_not_its_parent_s(chat: Chat) -> None:
    """Else everybody would be told of everything once for each worker."""
    held = threading.Event()

    def late(handler: Any) -> None:
        held.wait(20)
        handler.send_response(200)
        handler.end_headers()

    chat.answer = late
    hook = dspy_prod.alerts.webhook(chat.url, format="json", timeout=20)
    opened("the parent's")
    chat.wait_for(1)
    opened("the parent's, waiting")
    child = os.fork()
    if child == 0:
        try:
            held.set()
            opened("the child's")
            hook.flush(10)
        finally:
            os._exit(0)
    chat.wait_for(2)
    held.set()
    os.waitpid(child, 0)
    assert hook.flush(10)
    assert sorted(each["subject"] for each in chat.got) == ["the child's", "the parent's", "the parent's, waiting"]
