"""What a provider's refusal means: one table, the same for both engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from dspy.utils.exceptions import LMError, LMInvalidRequestError

from dspy_prod import Budget, CircuitBreaker, Retry
from dspy_prod.pipeline.outcome import markdown
from dspy_prod.testing import ScriptedEngine, Status, Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, PRICES, ask, make_lm, records
from tests.e2e.test_unusable import DONE, END, START, body, stream
from tests.listening import Listening, Silent

ENGINES = ["lm15", "litellm"]
WAYS = ["sync", "async"]
TWICE = Retry(attempts=2, backoff=0.01)
TENDER = CircuitBreaker(failure_threshold=1)
SECOND = "openai/e2e-second"
THREE = {**PRICES, SECOND: (0.15, 0.6)}


def said(message: str, status: int = 400, code: Any = None) -> Verbatim:
    return Verbatim({"error": {"message": message, "type": "invalid_request_error", "code": code}}, status)


CASES: dict[str, tuple[Verbatim, int, bool, bool]] = {
    # What is said; attempts on the route; whether another one is asked; whether the circuit opens.
    **{str(code): (said("No.", code), 1, True, False) for code in (402, 404, 405, 406, 410, 413, 415, 422, 431, 451)},
    **{str(code): (said("No.", code), 2, True, False) for code in (409, 423, 424, 425, 429, 499)},
    **{str(code): (said("No.", code), 1, True, True) for code in (500, 501, 502, 503, 504, 520, 524, 529)},
    "mistake": (said("'messages' must contain the word 'json'"), 1, False, False),
    "credit": (said("Your credit balance is too low to access the API."), 1, True, False),
    "unverified": (said("Your organization must be verified to use the model `o3`."), 1, True, False),
    "quota": (said("You exceeded your current quota", 429, "insufficient_quota"), 1, True, False),
    "filter": (said("Filtered by the content management policy", 400, "content_filter"), 1, True, False),
    "retired": (said("The model `x` has been decommissioned", 400, "model_decommissioned"), 1, True, False),
    "unknown model": (said("The model does not exist", 404, "model_not_found"), 1, True, False),
    "max_tokens": (said("max_tokens is too large: 100. This model supports at most 50"), 1, True, False),
    "key": (said("API key not valid. Please pass a valid API key.", 400, "INVALID_ARGUMENT"), 1, True, False),
    "context": (said("This model's maximum context length is 8192 tokens"), 1, True, False),
    "parameter": (said("Unsupported parameter: 'temperature'", 400, "unsupported_parameter"), 1, True, False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_a_refusal_means_the_same_on_both_engines(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, name: str
) -> None:
    """One engine fell back and the other did not; a wrong address or an empty account opened the circuit."""
    fault, attempts, falls_back, opens = CASES[name]
    provider = serve(faults=lambda asked: fault if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=TWICE, breaker=TENDER, fallbacks=[CHEAP])
    answer = ask(lm, way)
    if falls_back:
        assert answer == ["ok"]
    else:
        assert isinstance(answer, LMInvalidRequestError)
    assert [asked.model for asked in provider.calls] == ["e2e"] * attempts + ["e2e-cheap"] * falls_back
    assert lm.pipeline.primary.breaker.snapshot().state == ("open" if opens else "closed")
    owed = {"501", "502", "504", "520", "524"}
    first = records(lm)[0]
    assert (first.cost_nano != 0, first.estimated) == (name in owed, name in owed)


@pytest.mark.parametrize("way", ["sync", "async", "sync stream", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fault",
    [
        Verbatim(body(), 300),
        Verbatim(START + END + DONE, 302),
        Verbatim({"error": {"message": "moved"}}, 307),
        Verbatim(b"", 304),
    ],
    ids=lambda fault: str(fault.status),
)
def test_a_redirect_is_no_answer(serve: MakeProvider, connect: MakeLM, engine: str, way: str, fault: Verbatim) -> None:
    """Its page was read as an answer by one engine, or charged as one that broke off and held against the circuit."""
    provider = serve(faults=lambda asked: fault if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=TWICE, breaker=TENDER, fallbacks=[CHEAP])
    if "stream" in way:
        seen, error = stream(lm, way.split()[0])
        assert (seen[-1], error) == ("end", None)
    else:
        assert ask(lm, way) == ["ok"]
    first, second = records(lm)
    assert (first.model, first.outcome, first.cost_nano, first.estimated) == (MODEL, "error", 0, False)
    assert (second.model, second.outcome) == (CHEAP, "ok")
    assert lm.pipeline.primary.breaker.snapshot().state == "closed"
    alone = connect(provider, engine=engine, retry=TWICE, breaker=TENDER)
    error = stream(alone, way.split()[0])[1] if "stream" in way else ask(alone, way)
    assert (type(error).__name__, error.status) == ("LMProviderError", fault.status)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mistake_that_a_fallback_finds_does_not_keep_the_next_from_being_asked(
    serve: MakeProvider, connect: MakeLM, engine: str
) -> None:
    """The first fallback did not take an argument, and the second was never asked."""
    faults = {"e2e": Status(500), "e2e-cheap": said("I do not take that.")}
    provider = serve(faults=lambda asked: faults.get(asked.model), prices=THREE)
    lm = connect(provider, engine=engine, fallbacks=[CHEAP, SECOND], prices=THREE)
    assert ask(lm) == ["ok"]
    assert [asked.model for asked in provider.calls] == ["e2e", "e2e-cheap", "e2e-second"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("status", "header", "attempts"), [(500, "false", 1), (400, "true", 2), (429, "false", 1)])
def test_the_provider_says_whether_to_try_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, status: int, header: str, attempts: int
) -> None:
    """`x-should-retry` was not read."""
    provider = serve(faults=[Status(status, headers={"x-should-retry": header})] * 2)
    lm = connect(provider, engine=engine, retry=TWICE)
    ask(lm, way)
    assert len(provider.calls) == attempts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hint_in_milliseconds_is_read(serve: MakeProvider, connect: MakeLM, engine: str, way: str) -> None:
    """LiteLLM's route did not know `retry-after-ms`."""
    provider = serve(faults=[Status(503, headers={"retry-after-ms": "300"})])
    lm = connect(provider, engine=engine, retry=TWICE)
    assert ask(lm, way) == ["ok"]
    first, second = (asked.received_at for asked in provider.calls)
    assert 0.3 <= second - first < 1.3


@pytest.mark.parametrize("hint", [0, "Wed, 21 Oct 2015 07:28:00 GMT", "nan", "-5"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hint_that_says_nothing_is_none(serve: MakeProvider, connect: MakeLM, engine: str, hint: Any) -> None:
    """Three attempts within four milliseconds."""
    lm = connect(serve(faults=Status(503, retry_after=hint)), engine=engine)
    error = ask(lm)
    assert isinstance(error, LMError)
    assert error.retry_after is None


@pytest.mark.parametrize("engine", ENGINES)
def test_when_all_routes_fail_the_error_names_what_each_said(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """Only the fallback's word was seen, and why it was asked was not."""
    faults = {"e2e": Status(500, "the primary is down"), "e2e-cheap": Status(401, "no such key")}
    lm = connect(serve(faults=lambda asked: faults[asked.model]), engine=engine, fallbacks=[CHEAP])
    error = ask(lm)
    assert error.status == 401
    assert re.search(r"primary: \w+ 500 \(.*the primary is down", str(error))
    assert re.search(rf"{CHEAP}: LMAuthError 401 \(.*no such key", str(error))
    assert getattr(error.__cause__, "status", None) == 500


def test_routes_of_one_model_are_told_apart(serve: MakeProvider, connect: MakeLM) -> None:
    """Two keys of the same model are two routes, and both have said something."""
    provider = serve(faults=Status(401))
    spares = [connect(provider, model=CHEAP, api_key=key) for key in ("one", "two")]
    error = ask(connect(provider, fallbacks=spares))
    assert str(error).count(f"{CHEAP}: LMAuthError 401") == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gemini/gemini-2.0-flash", {}),
        ("vertex_ai/gemini-2.0-flash", {}),
        ("azure/somewhere", {}),
        (MODEL, {"api_key": "k", "extra_body": {"x": object()}}),
    ],
    ids=["no key", "no credentials", "no key at azure", "no json"],
)
def test_litellm_s_route_failing_before_anything_is_sent_costs_nothing(
    serve: MakeProvider, monkeypatch: pytest.MonkeyPatch, way: str, model: str, options: dict[str, Any]
) -> None:
    """It was charged its bound three times, and opened the circuit."""
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "AZURE_API_KEY", "AZURE_OPENAI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    provider = serve()
    url = provider.url
    given = {"api_key": None, "api_base": url if model == MODEL else None, "engine": "litellm", **options}
    lm = make_lm(url, model=model, retry=TWICE, breaker=TENDER, **given)
    error = ask(lm, way)
    assert isinstance(error, Exception)
    assert [(record.cost_nano, record.estimated) for record in records(lm)] == [(0, False)]
    assert lm.pipeline.primary.breaker.snapshot().failures == 0
    assert provider.calls == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("counts", [(0, 0), (10**20, 7), (11, 10**15)], ids=str)
def test_a_usage_that_cannot_be_true_is_not_believed(
    serve: MakeProvider, connect: MakeLM, engine: str, counts: tuple[int, int], sqlite_url: str
) -> None:
    """Zeros beside a text were charged as 0, and a counter beyond 64 bits broke the store's writer."""
    usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "e2e", "choices": [choice], "usage": usage}
    lm = connect(serve(faults=[Verbatim(body)]), engine=engine, store=sqlite_url)
    assert lm("a question") == ["hello"]
    assert lm("another") == ["ok"]
    assert lm.pipeline.store.flush(10)
    first, second = records(lm)
    assert (first.estimated, first.input_tokens) == (True, None)
    assert 0 < (first.cost_nano or 0) < 1_000_000
    assert not second.estimated


@pytest.mark.parametrize("way", WAYS)
def test_a_package_that_is_missing_costs_nothing(serve: MakeProvider, way: str) -> None:
    """And another route may do without it."""
    provider = serve()
    engine = ScriptedEngine(ImportError("No module named 'boto3'"))
    spare = make_lm(provider.url, model=CHEAP)
    lm = make_lm(
        "http://unused", engine=engine, async_engine=engine.asynchronous, retry=TWICE, breaker=TENDER,
        api_key=None, api_base=None, fallbacks=[spare],
    )  # fmt: skip
    assert ask(lm, way) == ["ok"]
    assert engine.calls == 1
    assert next((record.route, record.cost_nano) for record in records(lm)) == ("primary", 0)
    assert lm.pipeline.primary.breaker.snapshot().failures == 0


def test_a_fallback_without_a_key_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was noticed during the outage it was there for."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.warns(UserWarning, match="fallback anthropic/claude-haiku-4-5 cannot be used.*ANTHROPIC_API_KEY"):
        make_lm("http://unused", fallbacks=["anthropic/claude-haiku-4-5"])


def test_a_fallback_without_a_price_is_warned_of_under_a_budget() -> None:
    """Under a budget each of its calls would be refused."""
    with pytest.warns(UserWarning, match="fallback openai/nobody-knows cannot be used under a budget"):
        make_lm("http://unused", fallbacks=["openai/nobody-knows"], budget=Budget(usd=1))


def test_fallbacks_that_can_help_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """Nor are those without a price, where no budget needs one."""
    make_lm("http://unused", fallbacks=[CHEAP], budget=Budget(usd=1))
    make_lm("http://unused", fallbacks=["openai/nobody-knows"])
    assert [warning for warning in recwarn if "fallback" in str(warning.message)] == []


def test_the_guide_shows_the_table() -> None:
    """What decides is what is written."""
    assert markdown() in (Path(__file__).parents[2] / "docs" / "guide" / "flow.md").read_text("utf-8")


CUT: dict[str, tuple[dict[str, str], bytes]] = {
    "shorter than it said": ({"content-length": "500"}, b'{"error": {"mess'),
    "nothing of it": ({"content-length": "500"}, b""),
    "no chunks": ({"transfer-encoding": "chunked"}, b"no number\r\nof bytes"),
    "no gzip": ({"content-encoding": "gzip", "content-length": "9"}, b"plain text"[:9]),
}


@pytest.mark.parametrize("status", [400, 503])
@pytest.mark.parametrize(
    ("engine", "way", "cut"),
    [
        (engine, way, cut)
        for engine in ENGINES
        for way in ["sync", "async", "sync stream", "async stream"]
        for cut in CUT
        # aiohttp, by which LiteLLM asks in tasks, refuses such an answer whole: nobody hears its status.
        if (engine, way.split()[0], cut) != ("litellm", "async", "no chunks")
    ],
)
def test_a_refusal_whose_page_breaks_off_is_a_refusal(
    connect: MakeLM, engine: str, way: str, status: int, cut: str
) -> None:
    """It was a connection that broke after sending: asked again, and charged at its bound as unconfirmed."""
    headers, page = CUT[cut]

    class Handler(Silent):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)
            self.close_connection = True

    server = Listening(Handler)
    try:
        lm = connect(server, engine=engine, retry=TWICE, budget=Budget(usd=1, name="all"))
        error = stream(lm, way.split()[0])[1] if "stream" in way else ask(lm, way)
    finally:
        server.stop()
    assert isinstance(error, LMError)
    assert error.status == status
    assert [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)] == [("error", 0, False)] * (
        2 if status == 503 else 1
    )
    assert lm.costs().held_usd == 0.0
