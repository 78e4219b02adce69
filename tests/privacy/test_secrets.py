"""An API key lives in memory and on the wire to its provider, and nowhere else."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.utils.exceptions import LMAuthError

import dspy_prod
from dspy_prod import Cache, CircuitBreaker, CircuitOpenError
from dspy_prod.compat.lm15_transports import _elsewhere
from dspy_prod.testing import Provider, Status
from tests.e2e.support import MODEL, PRICES, make_lm
from tests.listening import Listening, Silent

KEY = "sk-live-Zq7Zq7Zq7Zq7Zq7Zq7Zq7"
PLAIN_KEY = "plainword-of-a-gateway-and-another-plainword"
TOKEN = "gateway-token-8f8f8f8f8f8f"

Ask = Callable[[Any], Any]


def sync(lm: Any) -> Any:
    return lm("q")


def task(lm: Any) -> Any:
    return asyncio.run(lm.acall("q"))


def stream(lm: Any) -> Any:
    request = dspy.lm15.Request(MODEL, (dspy.lm15.Message.user("q"),))
    return list(lm._engine_spec.stream(request))


def astream(lm: Any) -> Any:
    async def run() -> Any:
        program = dspy.streamify(dspy.Predict("question -> answer"))
        with dspy.context(lm=lm):
            return [item async for item in program(question="q")]

    return asyncio.run(run())


def shown(error: BaseException) -> str:
    """Everything a log of this error would show, its causes included."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + repr(error.args)


@pytest.fixture
def echo() -> Any:
    """A provider that refuses the key, and says which."""
    with Provider(prices=PRICES, faults=Status(401, message=f"Incorrect API key provided: {KEY} ({TOKEN}).")) as it:
        yield it


def key_in(secret: str, text: str | bytes) -> bool:
    return (secret.encode() in text) if isinstance(text, bytes) else (secret in text)


# -- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ask", [sync, task, stream, astream], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_an_error_that_echoes_the_key_is_mended(
    echo: Provider, ask: Ask, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The provider's text is kept but for the key, in the error, its causes, its traceback and all logs."""
    lm = make_lm(
        echo.url, api_key=KEY, extra_headers={"x-gateway": TOKEN} if engine == "litellm" else None, engine=engine
    )
    # At DEBUG, LiteLLM shows requests, which is not ours to judge.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.INFO, "LiteLLM"):
        with pytest.raises(Exception) as caught:
            ask(lm)
    error = caught.value
    assert isinstance(error, LMAuthError)
    assert "Incorrect API key provided: ***" in str(error)
    assert echo.calls[0].headers["authorization"] == f"Bearer {KEY}"
    assert not key_in(KEY, shown(error))
    if engine == "litellm":
        assert not key_in(TOKEN, shown(error))
    assert not key_in(KEY, "\n".join(record.getMessage() for record in caplog.records if record.name != "LiteLLM"))


def test_a_key_from_the_environment_is_mended_too(echo: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no difference where the key came from."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm = make_lm(echo.url, api_key=None)
    with pytest.raises(LMAuthError) as caught:
        lm("q")
    assert echo.calls[0].headers["authorization"] == f"Bearer {KEY}"
    assert not key_in(KEY, shown(caught.value))


def test_the_reason_of_an_open_circuit_holds_no_key() -> None:
    """What opened a circuit is told by class and status, even when the upstream's text echoes the key."""
    with Provider(prices=PRICES, faults=Status(500, message=f"cannot use {KEY}")) as provider:
        lm = make_lm(provider.url, api_key=KEY, breaker=CircuitBreaker(failure_threshold=1))
        for _ in range(2):
            with pytest.raises(Exception) as caught:
                lm("q")
            assert not key_in(KEY, shown(caught.value))
    assert isinstance(caught.value, CircuitOpenError)


# -- what is shown and written ---------------------------------------------------------------------------------------
def test_the_key_is_in_nothing_that_is_shown_or_written(tmp_path: Path) -> None:
    """Not in a repr, an event, a history, a record, a health report, a pickle, a saved program or the state file."""
    events: list[Any] = []
    remove = dspy_prod.add_listener(events.append)
    try:
        faults = [None, Status(401, message=f"refused {KEY}"), None, Status(500)]
        with Provider(prices=PRICES, faults=faults) as provider:
            spare = dspy.LM("openai/e2e-cheap", api_key=KEY, api_base=provider.url, max_tokens=10)
            lm = make_lm(
                provider.url, api_key=KEY, store=f"sqlite:///{tmp_path}/state.db", cache=Cache(), fallbacks=[spare],
                breaker=CircuitBreaker(failure_threshold=1),
            )  # fmt: skip
            with dspy.context(lm=lm):
                program = dspy.Predict("question -> answer")
                for question in ("answered", "refused", "answered", "answered again"):
                    program(question=question)
            program.lm = lm
            texts = {
                "lm": repr(lm) + str(lm),
                "engine": repr(lm._engine_spec) + repr(lm._async_engine_spec) + repr(vars(lm)),
                "settings": repr(lm.settings) + str(lm.settings),
                "pipeline": repr(lm.pipeline) + repr([vars(route) for route in lm.pipeline.every_route()]),
                "upstream": repr(lm.pipeline.primary.upstream),
                "events": repr(events),
                "history": repr(lm.history) + repr(program.history),
                "records": repr(lm.ledger.records()),
                "health": lm.health().model_dump_json(),
                "state": json.dumps(lm.dump_state()),
                "program": json.dumps(program.dump_state()),
            }
            blobs = {
                "pickle": pickle.dumps(lm),
                "cloudpickle": cloudpickle.dumps(lm),
                "pickled program": cloudpickle.dumps(program),
                "pickled settings": pickle.dumps(lm.settings.sealed()),
            }
            again = pickle.loads(blobs["pickle"])
            assert again("after pickling") == lm("after pickling"), "the same process finds its key again"
            lm.close()
    finally:
        remove()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    blobs.update({path.name: path.read_bytes() for path in files})
    assert "state.db" in blobs
    assert len(events) > 5
    assert [name for name, text in {**texts, **blobs}.items() if key_in(KEY, text)] == []


def test_a_program_saved_whole_holds_no_key(tmp_path: Path) -> None:
    """`save_program=True` pickles what a program holds; our LM leaves its key behind, and finds it when loaded here."""
    with Provider(prices=PRICES) as provider:
        program = dspy.Predict("question -> answer")
        program.lm = make_lm(provider.url, api_key=KEY)
        program.save(tmp_path / "program", save_program=True)
        program.save(tmp_path / "state.json")
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert not key_in(KEY, written)
        loaded = dspy.load(tmp_path / "program", allow_pickle=True)
        assert loaded(question="q").answer == "answer text"
        assert provider.calls[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_key_is_not_cut_in_two_at_the_end_of_a_redirect_s_page() -> None:
    """The error told the first half of it, which is no known key."""
    redirect = SimpleNamespace(status=302, reason="Found")
    said = str(_elsewhere(redirect, b"for " * 124 + KEY.encode() * 2))
    assert KEY[:4] not in said
    assert said.startswith("HTTP 302 Found: for for")


@pytest.mark.parametrize("ask", [sync, task, stream, astream], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_is_not_cut_in_two_at_the_end_of_a_page(status: int, ask: Ask) -> None:
    """The error told the first half of it: DSPy's client keeps 500 characters of an error, and 200 of no answer."""
    kept = 200 if status == 200 else 500
    page = ("word " * 99 + "more.")[: kept - len(PLAIN_KEY) // 2] + PLAIN_KEY + " and so on"

    class Handler(Silent):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page.encode())

    with closing(Listening(Handler)) as server, pytest.raises(Exception) as caught:
        ask(make_lm(server.url, api_key=PLAIN_KEY, retry=False))
    assert PLAIN_KEY[:8] not in shown(caught.value)
    if status != 200 or ask in (sync, task):  # a stream has no such page in it
        assert "word word" in str(caught.value)


@pytest.mark.parametrize("ask", [sync, task], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("model", [MODEL, "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-flash", "cohere_chat/any"])
def test_a_key_is_not_cut_in_two_where_a_page_is_no_answer(model: str, engine: str, ask: Ask) -> None:
    """What LiteLLM cannot read, the native engine reads: its error told the first thirty characters of the key."""
    page = "<html>" + "word " * 33 + PLAIN_KEY + "</html>"

    class Handler(Silent):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page.encode())

    engine = "auto" if model.startswith("cohere") else engine
    with closing(Listening(Handler)) as server, pytest.raises(Exception) as caught:
        ask(make_lm(server.url, model=model, prices={model: (1, 1)}, api_key=PLAIN_KEY, engine=engine))
    assert "word word" in str(caught.value)
    assert PLAIN_KEY[:8] not in shown(caught.value)
