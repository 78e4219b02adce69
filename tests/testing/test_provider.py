"""The provider is the truth other tests rely on, so it is tested over real HTTP and with the clients that matter."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.testing import (
    Bill,
    Call,
    EmptyChoices,
    ErrorInStream,
    Fault,
    FaultPlan,
    Hang,
    MalformedJson,
    MissingUsage,
    Provider,
    Reset,
    Status,
    Trickle,
    TruncatedStream,
    Usage,
    Verbatim,
    WrongUsage,
)
from dspy_prod.testing.__main__ import main
from dspy_prod.testing.calls import busiest_window
from dspy_prod.testing.quota import Quota, go_duration
from dspy_prod.testing.schema import sample

LONG = "one two three four five six seven eight nine ten " * 4
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello there, world"}]}


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=5.0) as client:
        yield client


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


def post(client: httpx.Client, provider: Provider, path: str = "/chat/completions", **fields: Any) -> httpx.Response:
    return client.post(provider.url + path, json={**HELLO, **fields})


def events(text: str) -> list[Any]:
    """The data of a stream's events, [DONE] as the string."""
    data = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def stream(client: httpx.Client, provider: Provider, path: str = "/chat/completions", **fields: Any) -> str:
    return post(client, provider, path, stream=True, **fields).text


USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


# -- answers


def test_a_chat_answer_has_the_fields_of_openai_and_its_bill_row(client: httpx.Client) -> None:
    with Provider(answer="four char", prices={"m": (1.0, 2.0)}) as p:
        got = client.post(p.url + "/chat/completions", json=HELLO, headers={"authorization": "Bearer sk-test"})
        body = got.json()
        assert got.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["model"] == "m"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "four char", "refusal": None}
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["prompt_tokens"] == 18 // 4
        assert body["usage"]["completion_tokens"] == 9 // 4
        assert body["usage"]["total_tokens"] == 6
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
        (row,) = p.bill.rows
        assert (row.call_id, row.model, row.told, row.status) == (body["id"], "m", True, 200)
        assert row.nano == p.bill.nano == 4 * 1000 + 2 * 2000
        assert p.bill.usd == row.usd == pytest.approx(8e-6)
        assert p.bill.by_model() == {"m": p.bill.usd}
        (call,) = p.calls
        assert call.headers["authorization"] == "Bearer sk-test"
        assert call.body == HELLO
        assert (call.status, call.fault, call.aborted, call.stream, call.in_flight) == (200, None, False, False, 1)
        assert call.sent_at is not None
        assert call.finished_at is not None
        assert call.received_at <= call.sent_at <= call.finished_at
        assert p.in_flight == 0
        assert p.max_in_flight == 1
        assert "sk-test" not in repr(call)


def test_a_stream_tells_usage_only_when_asked(client: httpx.Client) -> None:
    with Provider(answer=LONG, chunks=7) as p:
        got = events(stream(client, p, **USAGE))
        assert got[-1] == "[DONE]"
        assert got[-2]["choices"] == []
        assert got[-2]["usage"]["completion_tokens"] == len(LONG) // 4
        texts = [c["delta"].get("content", "") for e in got[:-2] for c in e["choices"]]
        assert "".join(texts) == LONG
        assert len([text for text in texts if text]) == 7
        assert got[-3]["choices"][0]["finish_reason"] == "stop"
        silent = events(stream(client, p))
        assert not any(e.get("usage") for e in silent[:-1])
        told, untold = p.bill.rows
        assert (told.told, untold.told) == (True, False)
        assert told.nano == untold.nano


def test_n_choices_differ_and_are_all_billed(client: httpx.Client, provider: Provider) -> None:
    choices = post(client, provider, n=3).json()["choices"]
    assert [c["message"]["content"] for c in choices] == ["ok", "ok 2", "ok 3"]
    assert provider.bill.rows[0].output_tokens == 3
    provider.answer = ["a", "b"]
    text = stream(client, provider, n=2)
    deltas = [c for e in events(text)[:-1] for c in e["choices"]]
    assert {c["index"]: c["delta"]["content"] for c in deltas if c["delta"].get("content")} == {0: "a", 1: "b"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


def test_tool_calls_in_a_message_and_in_a_stream(client: httpx.Client, provider: Provider) -> None:
    assert post(client, provider, tools=TOOLS).json()["choices"][0]["message"]["content"] == "ok"
    choice = post(client, provider, tools=TOOLS, tool_choice="required").json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (called,) = choice["message"]["tool_calls"]
    assert called["function"]["name"] == "weather"
    assert json.loads(called["function"]["arguments"]) == {"city": "city text", "days": 1}
    provider.call_tools = True
    assert post(client, provider, tools=TOOLS).json()["choices"][0]["finish_reason"] == "tool_calls"
    provider.answer = {"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
    deltas = [c["delta"] for e in events(stream(client, provider, tools=TOOLS))[:-1] for c in e["choices"]]
    parts = [part for d in deltas for part in d.get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "weather"
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"city": "Rome"}


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["billing", "tech"]},
        "score": {"type": "number", "minimum": 2, "exclusiveMaximum": 3},
        "count": {"type": "integer", "minimum": 5, "multipleOf": 4},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 12}, "minItems": 2, "uniqueItems": True},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        "kind": {"const": "x"},
        "maybe": {"type": ["null", "boolean"]},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "minItems": 2},
        "both": {"allOf": [{"$ref": "#/$defs/Named"}, {"properties": {"age": {"type": "integer"}}}]},
        "when": {"type": "string", "format": "date"},
    },
    "required": ["label", "score", "count", "tags", "next", "kind", "maybe", "pair", "both", "when"],
    "additionalProperties": False,
    "$defs": {
        "Named": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}, "required": ["name"]},
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        },
    },
}


def test_a_schema_is_answered_with_json_that_satisfies_it(client: httpx.Client, provider: Provider) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    content = post(client, provider, response_format=wanted).json()["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(content), SCHEMA)
    assert json.loads(content)["label"] == "billing"
    content = post(client, provider, response_format={"type": "json_object"}).json()["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content), dict)


_LEAVES = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "maxLength": 4},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": [3, "x"]},
        {"type": "integer", "maximum": -2},
        {"type": "number", "exclusiveMinimum": 1, "maximum": 2},
    ]
)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner).map(
            lambda p: {"type": "object", "properties": p, "required": list(p), "additionalProperties": False}
        )
        | st.builds(lambda i, n: {"type": "array", "items": i, "minItems": n}, inner, st.integers(0, 3))
        | st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    ),
    max_leaves=8,
)


@given(_SCHEMAS)
def test_a_sample_satisfies_its_schema(schema: dict[str, Any]) -> None:
    jsonschema.validate(sample(schema), schema)


def test_answers_by_callable_mapping_and_list(client: httpx.Client, provider: Provider) -> None:
    def say(**fields: Any) -> Any:
        return post(client, provider, **fields).json()["choices"][0]["message"]["content"]

    provider.answer = lambda call: f"{call.index}: {call.last_message} / {call.n}"
    assert say(n=2) == "0: hello there, world / 2"
    provider.answer = {"a": 1}
    assert say() == '{"a": 1}'
    provider.answer = {"content": "x", "finish_reason": "content_filter"}
    assert say() == "x"
    parts = [{"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "image_url", "image_url": {}}]}]
    provider.answer = lambda call: call.prompt
    assert say(messages=parts) == "part"


def test_max_tokens_cuts_the_answer(client: httpx.Client, provider: Provider) -> None:
    provider.answer = LONG
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        body = post(client, provider, **limit).json()  # type: ignore[arg-type]
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 5
        assert body["choices"][0]["message"]["content"] == LONG[:20]
    provider.usage = (10, 1000, 4, 900)
    body = post(client, provider, max_tokens=50, n=2).json()
    assert body["usage"]["completion_tokens"] == 100
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 100
    assert {c["finish_reason"] for c in body["choices"]} == {"length"}
    done = events(stream(client, provider, "/responses", input="hi", max_output_tokens=3))[-1]
    assert done["type"] == "response.incomplete"
    assert done["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_the_responses_api_plain_and_streamed(client: httpx.Client, provider: Provider) -> None:
    ask = {"model": "m", "instructions": "Be kind.", "input": [{"role": "user", "content": "hi"}]}
    body = client.post(provider.url + "/responses", json=ask).json()
    assert body["object"] == "response"
    assert body["status"] == "completed"
    assert body["output"][0]["content"][0] == {"type": "output_text", "text": "ok", "annotations": [], "logprobs": []}
    assert body["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 3,
    }
    got = events(client.post(provider.url + "/responses", json={**ask, "stream": True}).text)
    kinds = [e["type"] for e in got]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "".join(e["delta"] for e in got if e["type"] == "response.output_text.delta") == "ok"
    assert got[-1]["response"]["usage"]["output_tokens"] == 1
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    assert [row.told for row in provider.bill.rows] == [True, True]
    tool = {"type": "function", **TOOLS[0]["function"]}  # type: ignore[dict-item]
    body = client.post(provider.url + "/responses", json={**ask, "tools": [tool], "tool_choice": "required"}).json()
    assert body["output"][0]["type"] == "function_call"
    assert body["output"][0]["name"] == "weather"


def test_completions_models_health_and_unknown_paths(client: httpx.Client) -> None:
    with Provider(prices={"m": (1, 1)}) as p:
        body = client.post(p.url + "/completions", json={"model": "m", "prompt": "hello"}).json()
        assert body["object"] == "text_completion"
        assert body["choices"][0]["text"] == "ok"
        got = events(client.post(p.url + "/completions", json={"model": "m", "prompt": "x", "stream": True}).text)
        assert "".join(e["choices"][0]["text"] for e in got[:-1]) == "ok"
        assert [m["id"] for m in client.get(p.url + "/models").json()["data"]] == ["m"]
        assert client.get(p.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}
        assert client.get(p.url + "/nothing").status_code == 404
        assert client.post(p.url + "/chat/completions", content=b"{").status_code == 400
        assert len(p.calls) == 2


# -- money


@given(
    st.tuples(*[st.decimals(0, 200, places=3)] * 3).map(lambda t: tuple(map(float, t))),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_a_bill_is_exact_and_rounded_up_once_per_call(
    price: tuple[float, float, float], fresh: int, cached: int, output: int
) -> None:
    bill = Bill({"m": price}, (0, 0))
    row = bill.add("id", "m", Usage(fresh + cached, output, cached), at=0.0, told=True, status=200)
    parts = zip((fresh, output, cached), price, strict=True)
    assert row.nano == ceil(sum(tokens * Fraction(str(p)) * 1000 for tokens, p in parts)) == bill.nano


def test_usage_given_by_the_test_prices_cached_tokens_and_unknown_models(client: httpx.Client) -> None:
    usage = lambda call: (1000, 500, 400, 100)  # noqa: E731
    with Provider(usage=usage, prices={"m": (2.0, 8.0, 0.5)}, price=(0.0005, 0)) as p:
        told = post(client, p).json()["usage"]
        assert told["prompt_tokens_details"]["cached_tokens"] == 400
        assert told["completion_tokens_details"]["reasoning_tokens"] == 100
        assert p.bill.nano == 600 * 2000 + 400 * 500 + 500 * 8000
        p.reset()
        p.usage = (3, 1)
        post(client, p, model="other")
        assert p.bill.nano == 2  # 1.5 nano-USD, rounded up
    assert Bill({"openai/m": (3, 1)}, (0, 0)).cost("m", Usage(1, 1)) == 4000
    with pytest.raises(ValueError, match="negative"):
        Provider(price=(-1, 1))


# -- limits


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=60),
    st.integers(1, 6),
    st.integers(10, 100),
    st.integers(1, 3),
)
def test_no_sliding_window_holds_more_than_the_quota(
    steps: list[tuple[float, int]], rpm: int, tpm: int, per_second: int
) -> None:
    quota = Quota(rpm, tpm, per_second, None)
    now, taken = 0.0, []
    for step, tokens in steps:
        now += step
        if quota.admit(now, tokens, 0) is None:
            taken.append((now, tokens))
    assert busiest_window([(at, 1) for at, _ in taken], 60) <= rpm
    assert busiest_window([(at, 1) for at, _ in taken], 1) <= per_second
    assert busiest_window(taken, 60) <= tpm


def test_a_quota_admits_again_after_the_time_it_names() -> None:
    quota = Quota(rpm=2, tpm=None, per_second=None, concurrency=None)
    assert quota.admit(10.0, 1, 0) is None
    assert quota.admit(30.0, 1, 0) is None
    refusal = quota.admit(31.5, 1, 0)
    assert refusal is not None
    assert refusal.retry_after == 39
    assert refusal.headers is not None
    assert refusal.headers["retry-after-ms"] == "38500"
    assert quota.admit(69.9, 1, 0) is not None
    assert quota.admit(70.0, 1, 0) is None
    assert [go_duration(s) for s in (0, 0.25, 59.5, 60, 361.2)] == ["0s", "250ms", "59.5s", "1m0s", "6m1.2s"]


def test_a_window_is_half_open() -> None:
    assert busiest_window([(0.0, 1), (60.0, 1)], 60) == 1
    assert busiest_window([(0.0, 1), (59.999, 1), (60.0, 1)], 60) == 2


@pytest.mark.parametrize("limit", [{"rpm": 3}, {"per_second": 3}, {"tpm": 15}])
def test_a_rate_limit_answers_429_with_retry_after_and_bills_nothing(
    client: httpx.Client, limit: dict[str, int]
) -> None:
    with Provider(**limit, ratelimit_headers=True) as p:  # type: ignore[arg-type]
        answers = [post(client, p) for _ in range(5)]
        assert [a.status_code for a in answers] == [200] * 3 + [429] * 2
        assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert len(p.bill.rows) == p.requests_in_window(60) == p.requests_in_window(1) == 3
        assert p.tokens_in_window(60) == 15
        if "rpm" in limit:
            assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
            assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
            reset = float(answers[0].headers["x-ratelimit-reset-requests"].replace("1m0s", "60s").removesuffix("s"))
            assert p.calls[0].sent_at is not None
            assert 60 - (p.calls[0].sent_at - p.calls[0].received_at) - 0.001 <= reset <= 60
        if "tpm" in limit:
            assert answers[1].headers["x-ratelimit-remaining-tokens"] == "5"
        assert p.calls[-1].status == 429
        assert not p.calls[-1].accepted


def test_tokens_in_a_window_by_bound(client: httpx.Client, provider: Provider) -> None:
    post(client, provider, max_tokens=100, n=2)
    assert provider.tokens_in_window(60) == 4 + 2
    assert provider.tokens_in_window(60, weights="bound") == 4 + 200


# -- many at once


async def _post_all(p: Provider, count: int, after: Callable[[], None] | None = None) -> list[int]:
    limits = httpx.Limits(max_connections=None)
    transport = httpx.AsyncHTTPTransport(limits=limits)
    async with httpx.AsyncClient(transport=transport, timeout=20.0) as client:
        tasks = [asyncio.create_task(client.post(p.url + "/chat/completions", json=HELLO)) for _ in range(count)]
        if after is not None:
            await asyncio.to_thread(after)
        return [answer.status_code for answer in await asyncio.gather(*tasks)]


def test_a_concurrency_limit_and_held_answers(provider: Provider) -> None:
    provider.quota.concurrency = 8
    provider.hold()

    def release() -> None:
        provider.wait_until(lambda p: len(p.calls) == 20, timeout=30)
        assert provider.in_flight == 8
        provider.release()

    statuses = asyncio.run(_post_all(provider, 20, release))
    assert sorted(statuses) == [200] * 8 + [429] * 12
    assert provider.max_in_flight == 8
    assert provider.in_flight == 0


def test_a_thousand_connections_at_once(provider: Provider) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    port = int(provider.url.split(":")[2].split("/")[0])
    body = json.dumps(HELLO).encode()
    ask = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    provider.hold()
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(1000)]
    try:
        for sock in sockets:
            sock.sendall(ask)
        provider.wait_until(lambda p: p.in_flight == 1000, timeout=30)
        provider.release()
        assert all(sock.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n") for sock in sockets)
    finally:
        for sock in sockets:
            sock.close()
    assert provider.max_in_flight == 1000
    assert provider.in_flight == 0
    assert len({row.call_id for row in provider.bill.rows}) == 1000
    assert sorted(call.in_flight for call in provider.calls) == list(range(1, 1001))


def test_latency_by_number_range_and_callable(client: httpx.Client, provider: Provider) -> None:
    def took() -> float:
        post(client, provider)
        call = provider.calls[-1]
        assert call.finished_at is not None
        return call.finished_at - call.received_at

    provider.latency = 0.05
    assert took() >= 0.05
    provider.latency = (0.02, 0.03)
    assert took() >= 0.02
    provider.latency = lambda call: 0.04
    assert took() >= 0.04


# -- clients that leave


def leave_early(p: Provider, *, stream: bool = False, wait: Callable[[Provider], object]) -> Call:
    """Send a request, close the connection once ``wait`` holds, and return the call when the provider has noticed."""
    port = int(p.url.split(":")[2].split("/")[0])
    body = json.dumps({**HELLO, "stream": stream, **USAGE}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        p.wait_until(wait, timeout=30)
        received = b""
        while stream and received.count(b'"content":"one') < 1:
            received += sock.recv(65536)
    p.wait_until(lambda p: p.calls[-1].finished_at is not None, timeout=30)
    return p.calls[-1]


@pytest.mark.parametrize("billed", [True, False])
def test_a_client_that_leaves_a_plain_call_is_noticed(billed: bool) -> None:
    with Provider(latency=60, answer=LONG, bill_abandoned=billed) as p:
        call = leave_early(p, wait=lambda p: p.in_flight == 1)
        assert call.aborted
        assert call.status is None
        assert call.accepted
        assert p.in_flight == 0
        rows = [(row.output_tokens, row.told) for row in p.bill.rows]
        assert rows == ([(len(LONG) // 4, False)] if billed else [])


def test_an_abandoned_stream_is_billed_for_what_was_generated() -> None:
    with Provider(answer=LONG, chunks=50, chunk_delay=0.02) as p:
        call = leave_early(p, stream=True, wait=lambda p: p.in_flight == 1)
        assert call.aborted
        assert call.status == 200
        assert p.in_flight == 0
        (row,) = p.bill.rows
        assert row.input_tokens == 4
        assert not row.told
        assert 1 <= row.output_tokens < len(LONG) // 4


def test_a_large_answer_that_nobody_reads_is_not_told() -> None:
    with Provider(answer="x" * 30_000_000) as p:
        call = leave_early(p, wait=lambda p: p.calls and p.calls[-1].sent_at)
        p.wait_until(lambda p: call.aborted, timeout=30)
        assert [row.told for row in p.bill.rows] == [False]


# -- faults


@pytest.mark.parametrize("code", [400, 401, 404, 408, 429, 500, 502, 503, 504, 529])
def test_a_status_fault_refuses_and_is_free(client: httpx.Client, code: int) -> None:
    with Provider(faults=Status(code, retry_after=2.5 if code == 429 else None, headers={"x-a": "b"})) as p:
        answer = post(client, p)
        assert answer.status_code == code
        assert answer.headers["x-a"] == "b"
        assert answer.headers.get("retry-after") == ("2.5" if code == 429 else None)
        assert answer.json()["error"]["message"]
        assert p.bill.nano == 0
        assert p.calls[0].fault == f"Status({code})"
        assert p.requests_in_window() == 0


def test_a_context_length_error_carries_its_code(client: httpx.Client, provider: Provider) -> None:
    provider.faults = Status(400, error_code="context_length_exceeded")
    error = post(client, provider).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length" in error["message"]


@pytest.mark.parametrize("billed", [True, False])
def test_a_hang_lasts_until_the_client_leaves(client: httpx.Client, billed: bool) -> None:
    with Provider(faults=[Hang(billed=billed)]) as p:
        with pytest.raises(httpx.ReadTimeout):
            client.post(p.url + "/chat/completions", json=HELLO, timeout=0.05)
        p.wait_until(lambda p: p.in_flight == 0, timeout=30)
        assert p.calls[0].aborted
        assert p.calls[0].status is None
        assert [row.told for row in p.bill.rows] == ([False] if billed else [])
        assert post(client, p).status_code == 200


def test_a_hang_with_an_end_closes_the_connection(client: httpx.Client) -> None:
    with Provider(faults=Hang(seconds=0.02)) as p, pytest.raises(httpx.RemoteProtocolError):
        post(client, p)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_trickle_is_slow_valid_and_billed(client: httpx.Client, streamed: bool) -> None:
    with Provider(faults=Trickle(bytes_per_second=10_000)) as p:
        answer = post(client, p, stream=streamed, **USAGE)
        assert ("[DONE]" in answer.text) if streamed else answer.json()["choices"]
        (row,), (call,) = p.bill.rows, p.calls
        assert row.told
        assert call.finished_at is not None
        assert call.sent_at is not None
        assert call.finished_at - call.sent_at >= len(answer.content) / 10_000 * 0.8
        p.faults = Trickle(bytes_per_second=1)
        with client.stream("POST", p.url + "/chat/completions", json={**HELLO, "stream": streamed}) as begun:
            assert begun.status_code == 200
        p.wait_until(lambda p: p.in_flight == 0, timeout=30)
        assert p.calls[-1].aborted
        assert not p.bill.rows[-1].told


def read_until_broken(client: httpx.Client, p: Provider, **fields: Any) -> tuple[bytes, Exception]:
    """What arrives of an answer that breaks off, and the error that it breaks off with."""
    received = b""
    try:
        with client.stream("POST", p.url + "/chat/completions", json={**HELLO, **fields}) as answer:
            for part in answer.iter_raw():
                received += part
    except httpx.TransportError as error:
        return received, error
    raise AssertionError(f"the answer was whole: {received!r}")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("when", ["before", "after_headers", "during"])
@pytest.mark.parametrize("billed", [None, True, False])
def test_a_reset_breaks_the_connection(
    client: httpx.Client, when: Literal["before", "after_headers", "during"], streamed: bool, billed: bool | None
) -> None:
    with Provider(answer=LONG, faults=Reset(when, billed=billed)) as p:
        received, error = read_until_broken(client, p, stream=streamed)
        assert isinstance(error, httpx.ReadError)  # a RST; an orderly close is a RemoteProtocolError
        assert bool(received) == (when == "during")
        expected = billed if billed is not None else when != "before"
        assert [(row.told, row.output_tokens) for row in p.bill.rows] == ([(False, len(LONG) // 4)] if expected else [])
        assert p.calls[0].status == (None if when == "before" else 200)
        assert not p.calls[0].aborted


def test_a_truncated_stream_ends_without_usage(client: httpx.Client) -> None:
    with Provider(answer=LONG, faults=TruncatedStream()) as p:
        received, error = read_until_broken(client, p, stream=True, **USAGE)
        assert isinstance(error, httpx.RemoteProtocolError)
        assert b'"content":"one' in received
        assert b"[DONE]" not in received
        assert b"prompt_tokens" not in received
        received, error = read_until_broken(client, p)
        assert received
        assert isinstance(error, httpx.RemoteProtocolError)
        assert [(row.told, row.output_tokens) for row in p.bill.rows] == [(False, len(LONG) // 4)] * 2


def test_an_error_in_a_stream_is_billed_up_to_it(client: httpx.Client) -> None:
    with Provider(answer=LONG, chunks=4, faults=ErrorInStream(after=2)) as p:
        got = events(stream(client, p, **USAGE))
        assert got[-1]["error"]["code"] == "server_error"
        (row,) = p.bill.rows
        assert row.output_tokens == ceil(len(LONG) // 4 / 2)
        assert not row.told
        assert post(client, p).json()["error"]["message"]


def test_malformed_json_is_billed(client: httpx.Client) -> None:
    with Provider(answer=LONG, faults=MalformedJson()) as p:
        answer = post(client, p)
        assert answer.status_code == 200
        with pytest.raises(json.JSONDecodeError):
            answer.json()
        with pytest.raises(json.JSONDecodeError):
            events(stream(client, p, **USAGE))
        assert [row.told for row in p.bill.rows] == [False, False]
        assert p.bill.nano > 0


def test_wrong_usage_is_what_is_billed(client: httpx.Client) -> None:
    with Provider(answer="abcdefgh", faults=WrongUsage(factor=10), price=(1, 1)) as p:
        assert post(client, p, max_tokens=2).json()["usage"]["completion_tokens"] == 20
        assert p.bill.rows[0].output_tokens == 20
        assert p.bill.rows[0].told
        p.faults = WrongUsage(input_tokens=7, output_tokens=0)
        assert post(client, p).json()["usage"]["total_tokens"] == 7
        assert p.bill.nano == (40 + 20 + 7) * 1000


def test_missing_usage_is_billed_and_not_told(client: httpx.Client) -> None:
    with Provider(faults=MissingUsage()) as p:
        assert "usage" not in post(client, p).json()
        assert "prompt_tokens" not in stream(client, p, **USAGE)
        assert [row.told for row in p.bill.rows] == [False, False]


def test_empty_choices_are_billed_and_told(client: httpx.Client) -> None:
    with Provider(faults=EmptyChoices()) as p:
        body = post(client, p).json()
        assert body["choices"] == []
        assert body["usage"]["total_tokens"]
        got = events(stream(client, p, **USAGE))
        assert [e if e == "[DONE]" else e["choices"] for e in got] == [[], "[DONE]"]
        assert [row.told for row in p.bill.rows] == [True, True]


def test_any_body_can_be_sent_as_it_is(client: httpx.Client) -> None:
    """What is not an HTTP error is billed, and told when its text tells a usage."""
    bodies = [Verbatim({"usage": 1}), Verbatim("data: x\n\n"), Verbatim(b"<html>", 413, "text/html", {"x-a": "b"})]
    with Provider(faults=bodies) as p:
        plain, streamed, refused = post(client, p), post(client, p), post(client, p)
        assert (plain.json(), plain.headers["content-type"]) == ({"usage": 1}, "application/json")
        assert (streamed.text, streamed.headers["content-type"]) == ("data: x\n\n", "text/event-stream")
        assert (refused.status_code, refused.text, refused.headers["content-type"]) == (413, "<html>", "text/html")
        assert refused.headers["x-a"] == "b"
        assert [row.told for row in p.bill.rows] == [True, False]


def test_plans_pick_by_script_window_and_mix(client: httpx.Client, provider: Provider) -> None:
    def statuses(count: int) -> list[int]:
        return [post(client, provider).status_code for _ in range(count)]

    provider.faults = FaultPlan.script([None, Status(503), None])
    assert statuses(4) == [200, 503, 200, 200]
    provider.faults = [Status(500)]
    assert statuses(2) == [500, 200]
    provider.faults = FaultPlan.window(Status(502), 1, 2)
    assert statuses(4) == [200, 502, 502, 200]
    provider.reset()
    assert statuses(2) == [200, 502]
    provider.faults = lambda call: Status(404) if call.model == "m" else None
    assert statuses(1) == [404]
    mix = FaultPlan.mix({Status(500): 0.25, Hang(): 0.25}, seed=3)
    call = provider.calls[0]
    picks = [mix.pick(position, call) for position in range(2000)]
    assert picks == [FaultPlan.mix({Status(500): 0.25, Hang(): 0.25}, seed=3).pick(n, call) for n in range(2000)]
    for fault, share in ((Status(500), 0.25), (Hang(), 0.25), (None, 0.5)):
        assert abs(picks.count(fault) / 2000 - share) < 0.05
    with pytest.raises(ValueError, match="more than 1"):
        FaultPlan.mix({Status(500): 0.6, Hang(): 0.6})
    headered: Fault = Status(429, headers={"a": "b"})
    assert FaultPlan.mix({headered: 1.0}).pick(0, call) is headered


def test_down_and_up(client: httpx.Client, provider: Provider) -> None:
    provider.down()
    assert post(client, provider).status_code == 500
    assert client.get(provider.url + "/models").status_code == 500
    provider.down(Status(503, retry_after=3))
    assert post(client, provider).headers["retry-after"] == "3"
    provider.down("hang")
    with pytest.raises(httpx.ReadTimeout):
        client.post(provider.url + "/chat/completions", json=HELLO, timeout=0.05)
    provider.down("reset")
    with pytest.raises(httpx.ReadError):
        post(client, provider)
    provider.down("refuse")
    for _ in range(3):
        with pytest.raises(httpx.ConnectError):
            httpx.post(provider.url + "/chat/completions", json=HELLO)
    url = provider.url
    provider.up()
    assert provider.url == url
    assert post(client, provider).status_code == 200
    assert len(provider.bill.rows) == 1
    with pytest.raises(ValueError, match="down is"):
        provider.down("gone")  # type: ignore[arg-type]


def test_a_callable_that_raises_is_seen_by_client_and_test(client: httpx.Client, provider: Provider) -> None:
    def broken(call: object) -> Any:
        raise KeyError("oops")

    for name in ("answer", "usage", "latency", "faults"):
        setattr(provider, name, broken)
        answer = post(client, provider)
        assert answer.status_code == 500
        assert "oops" in answer.json()["error"]["message"]
        assert provider.calls[-1].error
        assert isinstance(provider.errors[-1], KeyError)
        setattr(provider, name, 0.0 if name == "latency" else None)
        assert provider.in_flight == 0
    assert provider.bill.nano == 0


# -- the wire


def test_requests_in_every_framing_are_read(provider: Provider) -> None:
    port = int(provider.url.split(":")[2].split("/")[0])
    body = json.dumps(HELLO).encode()
    line = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: x\r\n"
    whole = line + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    half = len(body) // 2
    chunked = line + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\nt: x\r\n\r\n" % (
        half,
        body[:half],
        len(body) - half,
        body[half:],
    )
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        for byte in chunked:
            sock.sendall(bytes([byte]))
        sock.sendall(whole + whole)
        sock.sendall(line + b"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        received = b""
        while b"100 Continue" not in received:
            received += sock.recv(65536)
        sock.sendall(body)
        while part := sock.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200 OK") == 4
    assert len(provider.calls) == 4


@pytest.mark.parametrize(
    "junk",
    [
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_refused(provider: Provider, junk: bytes) -> None:
    port = int(provider.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(junk)
        assert sock.recv(65536).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
        assert sock.recv(1) == b""


# -- its own life


def test_stop_ends_hanging_calls_threads_and_sockets() -> None:
    threads = set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    p = Provider(faults=Hang(billed=True))
    with pytest.raises(RuntimeError, match="not started"):
        p.url  # noqa: B018
    p.start()
    failed: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(p.url + "/chat/completions", json=HELLO)
        except httpx.TransportError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    p.wait_until(lambda p: p.in_flight == 1, timeout=30)
    p.stop()
    p.stop()
    asking.join(5)
    assert len(failed) == 1
    assert set(threading.enumerate()) <= threads
    assert not files or len(os.listdir("/proc/self/fd")) <= files
    assert p.in_flight == 0
    assert not p.calls[0].aborted
    assert len(p.bill.rows) == 1
    with pytest.raises(RuntimeError, match="not running"):
        p.hold()


def test_reset_forgets(client: httpx.Client, provider: Provider) -> None:
    provider.quota.rpm = 1
    post(client, provider)
    provider.reset()
    assert (provider.calls, provider.bill.rows, provider.bill.nano) == ([], [], 0)
    assert post(client, provider).status_code == 200
    with pytest.raises(TimeoutError):
        provider.wait_until(lambda p: False, timeout=0.01)


def test_in_a_process_of_its_own_the_bill_is_read_over_http(client: httpx.Client) -> None:
    command = [sys.executable, "-m", "dspy_prod.testing", "--answer", "hi", "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            client.post(url + "/chat/completions", json=HELLO, headers={"authorization": "Bearer sk-secret"})
            bill = client.get(url.removesuffix("/v1") + "/_bill").json()
            assert bill["nano"] == sum(row["nano"] for row in bill["rows"]) > 0
            (call,) = client.get(url + "/_calls").json()
            assert call["status"] == 200
            assert call["body"] == HELLO
            assert call["headers"]["authorization"] == "***"
        finally:
            process.terminate()


# -- the real clients


@pytest.fixture(scope="module")
def dspy() -> Iterator[Any]:
    dspy = pytest.importorskip("dspy")
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    yield dspy
    dspy.cache = before


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_dspy_understands_every_kind_of_answer(dspy: Any, provider: Provider, engine: str) -> None:
    lm = dspy.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="sk-test", engine=engine, num_retries=0)
    assert lm("hello") == ["ok"]
    assert lm.history[-1]["usage"]["prompt_tokens"] == provider.bill.rows[-1].input_tokens
    assert provider.calls[-1].headers["authorization"] == "Bearer sk-test"
    assert len(lm("hello", n=2)) == 2
    assert sum(row.output_tokens for row in provider.bill.rows) == 3

    class Triage(dspy.Signature):  # type: ignore[misc]
        """Sort a ticket."""

        ticket: str = dspy.InputField()
        label: Literal["billing", "tech"] = dspy.OutputField()
        score: float = dspy.OutputField()
        tags: list[str] = dspy.OutputField()
        urgent: bool = dspy.OutputField()

    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        before = len(provider.calls)
        with dspy.context(lm=lm, adapter=adapter):
            answer = dspy.Predict(Triage)(ticket="help")
        assert (answer.label, answer.score, answer.tags, answer.urgent) == ("billing", 1.0, ["tags text"], True)
        assert len(provider.calls) == before + 1
    assert provider.calls[-1].response_format["type"] == "json_schema"

    async def streamed() -> list[Any]:
        program = dspy.Predict("question -> answer")
        listener = dspy.streaming.StreamListener("answer")
        with dspy.context(lm=lm):
            return [part async for part in dspy.streamify(program, stream_listeners=[listener])(question="why?")]

    parts = asyncio.run(streamed())
    assert "".join(part.chunk for part in parts[:-1]) == parts[-1].answer == "answer text"
    assert provider.calls[-1].stream


def test_dspy_reads_the_responses_api_and_tool_calls(dspy: Any, provider: Provider) -> None:
    def lm(kind: str) -> Any:
        settings = {"api_base": provider.url, "api_key": "sk-test", "engine": "lm15", "num_retries": 0}
        return dspy.LM("openai/gpt-4o-mini", model_type=kind, **settings)

    assert lm("responses")("hello")[0] in ("ok", {"text": "ok"})
    assert provider.calls[-1].api == "responses"
    (answer,) = lm("chat")("hello", tools=TOOLS, tool_choice="required")
    assert answer["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("port", ["taken", "99999", "-1"])
def test_a_port_that_cannot_be_had_is_told(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in a traceback."""
    with Provider() as other:
        taken = other.url.rpartition(":")[2].removesuffix("/v1") if port == "taken" else port
        with pytest.raises(SystemExit) as ended:
            main(["--port", taken, "--seconds", "0"])
    assert ended.value.code == 2
    assert f"argument --port: {taken} cannot be listened on" in capsys.readouterr().err
