"""A key and a prompt stay at the server they are for, whatever that, or who answered for it, says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import dspy_prod
from dspy_prod import Price
from dspy_prod.compat.httpx import staying
from tests.e2e.support import fresh_memory, outcome, request
from tests.listening import Listening, Silent

MODELS = {
    "openai": "openai/e2e", "anthropic": "anthropic/claude-sonnet-4-5", "gemini": "gemini/gemini-2.5-flash",
    "mistral": "mistral/mistral-small-latest", "address": "hosted_vllm/e2e", "text": "text-completion-openai/e2e",
}  # fmt: skip
SECRET = "sk-of-the-environment"
ASKED = [(way, status) for way in ("sync", "async") for status in (302, 307, 308)]
ASKED += [(way, status) for way in ("sync stream", "async stream") for status in (302, 307)]


class Server(Listening):
    """Answers each request with a redirect, or with nothing of use, and remembers what came."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.location: str | None = None
        self.status = 307
        self.begins_at: str | None = None  # where the first request is sent on to
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.seen.append(f"{self.path}\n{self.headers}\n{sent.decode()}")
                location = outer.location
                if outer.begins_at and len(outer.seen) == 1:
                    location = outer.begins_at
                self.send_response(outer.status if location else 400)
                if location:
                    self.send_header("location", location)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST

        super().__init__(Handler)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """(the provider, a thief)."""
    provider, thief = Server(), Server()
    yield provider, thief
    provider.stop()
    thief.stop()


def lm_at(url: str, model: str, engine: str) -> Any:
    return dspy_prod.LM(
        model, model_type="text" if model.startswith("text") else "chat", api_base=url, api_key=SECRET, engine=engine,
        retry=False, cache=False, store=fresh_memory(), max_tokens=10, prices={model: Price(input=1, output=1)},
    )  # fmt: skip


def call(lm: Any, way: str) -> Any:
    asked = request("a secret question", model=lm.model)
    if way == "sync":
        return outcome(lambda: lm("a secret question"))
    if way == "sync stream":
        return outcome(lambda: list(lm._engine_spec.stream(asked)))

    async def in_task() -> Any:
        try:
            if way == "async":
                return await lm.acall("a secret question")
            return [event async for event in lm._async_engine_spec.stream(asked)]
        finally:
            await lm.pipeline.aclose()

    return outcome(lambda: asyncio.run(in_task()))


@pytest.mark.parametrize(("way", "status"), ASKED)
@pytest.mark.parametrize(("engine", "kind"), [*[("litellm", kind) for kind in MODELS], ("lm15", "openai")])
def test_no_redirect_is_followed_to_another_server(
    servers: tuple[Server, Server], engine: str, kind: str, status: int, way: str
) -> None:
    """The key of Anthropic, Google or Azure, and with 307 the prompt, went to whatever address the answer named.

    Those of Gemini's streams still did: LiteLLM sends them not before their first chunk is asked for.
    """
    provider, thief = servers
    provider.location, provider.status = f"{thief.url}/stolen", status
    lm = lm_at(provider.url, MODELS[kind], engine)
    assert isinstance(call(lm, way), Exception)
    assert thief.seen == []
    assert len(provider.seen) == 1
    (record,) = lm.ledger.records()
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", 0, False)


@pytest.mark.parametrize("way", ["sync", "async", "sync stream", "async stream"])
@pytest.mark.parametrize("kind", ["openai", "anthropic", "gemini", "address"])
def test_no_redirect_is_followed_to_another_server_by_way_of_the_own(
    servers: tuple[Server, Server], kind: str, way: str
) -> None:
    """A 303 within the server makes a GET of it, which went anywhere from there, with the key in its headers."""
    provider, thief = servers
    provider.begins_at, provider.location, provider.status = "/again", f"{thief.url}/stolen", 303
    lm = lm_at(provider.url, MODELS[kind], "litellm")
    assert isinstance(call(lm, way), Exception)
    assert thief.seen == []


def test_other_requests_of_the_process_are_redirected_as_before(servers: tuple[Server, Server]) -> None:
    """What a program fetches beside its calls, and what a call fetches without a prompt, is nobody's business here."""
    provider, thief = servers
    provider.location = f"{thief.url}/page"
    with staying():
        assert httpx.post(provider.url, follow_redirects=True).status_code == 307
        assert httpx.get(provider.url, follow_redirects=True).status_code == 400
    assert httpx.post(provider.url, follow_redirects=True).status_code == 400
    assert len(thief.seen) == 2
