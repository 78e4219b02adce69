"""A provider whose answers come from another one: it adds faults, limits and a bill to a real model."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dspy_prod.testing.answers import Choice, Reply, as_choice
from dspy_prod.testing.bill import Usage
from dspy_prod.testing.calls import Call
from dspy_prod.testing.provider import Provider


class Relay(Provider):
    """Passes each call on to an OpenAI-compatible server and answers with what that generated.

    Args:
        upstream: base URL of the server, ending in `/v1`.
        workers: calls passed on at the same time; further ones wait.
        timeout: seconds the server may take.
        options: arguments of `Provider`: faults, prices, limits, ...

    Example:
        ```python
        with testing.Provider() as model, testing.Relay(model.url, faults=[testing.Status(503)]) as relay:
            dspy_prod.LM("openai/gpt-4o-mini", api_base=relay.url, api_key="test", store="memory://")("hello")
            assert len(relay.calls) == 2 and len(model.calls) == 1
        ```
    """

    def __init__(self, upstream: str, *, workers: int = 4, timeout: float = 120.0, **options: Any) -> None:
        super().__init__(**options)
        self.upstream = upstream.rstrip("/")
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="relay")

    async def generate(self, call: Call) -> Reply:
        """The upstream's answer to a call, with the usage it counted."""
        answer = await asyncio.get_running_loop().run_in_executor(self._pool, self._pass_on, call)
        choices = tuple(_choice(choice, call) for choice in answer["choices"])
        counted = answer["usage"]
        usage = Usage(counted["prompt_tokens"], counted["completion_tokens"])
        return Reply(call, choices, usage, int(time.time()))

    def stop(self) -> None:
        """End the relay; the upstream server is not its own and stays."""
        super().stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pass_on(self, call: Call) -> dict[str, Any]:
        body = {key: value for key, value in call.body.items() if key not in ("stream", "stream_options")}
        request = urllib.request.Request(
            f"{self.upstream}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def _choice(choice: dict[str, Any], call: Call) -> Choice:
    message = dict(choice.get("message") or {})
    message["finish_reason"] = choice.get("finish_reason") or "stop"
    return as_choice(message, call, int(choice.get("index", 0)))
