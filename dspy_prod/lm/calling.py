"""What happens to a public call before DSPy prepares it: arguments are sorted, and a cached answer is given at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from dspy.clients.execution import prepare
from dspy.lm15 import LM15Error, Request, Response

from dspy_prod.compat.asking import plain, request_of
from dspy_prod.compat.dspy import caches_anything, engines_of, is_streaming
from dspy_prod.compat.executing import arun_call, run_call
from dspy_prod.compat.steps import SHORT, CallResult, PreparedCall
from dspy_prod.context.current import current, stamped
from dspy_prod.lm.advice import warn_messages
from dspy_prod.lm.beneath import Beneath
from dspy_prod.lm.copying import variant
from dspy_prod.lm.history import shown
from dspy_prod.lm.settings import CANONICAL_KEYS, OWN_KEYS, hide, split
from dspy_prod.lm.watching import settled
from dspy_prod.options import Cache
from dspy_prod.pipeline.call import Call, record_hit
from dspy_prod.pipeline.scope import Scope, raw_key
from dspy_prod.pipeline.standing import standing_for
from dspy_prod.pipeline.upstream.destination import places
from dspy_prod.policies.answers import log_of
from dspy_prod.policies.purse import Purse

_PLAIN_CALL_KEYS: Final = frozenset(
    {
        "temperature",
        "max_tokens",
        "max_completion_tokens",
        "top_p",
        "n",
        "rollout_id",
        "response_format",
        "tools",
        "tool_choice",
        "stop",
        "seed",
        "logprobs",
        "reasoning_effort",
    }
)


Known: TypeAlias = tuple[Response, str]
"""A cached answer, and its text."""
Asked: TypeAlias = tuple[PreparedCall, CallResult]
"""What DSPy finishes a call from."""


def begin(
    lm: Beneath, prompt: Any, messages: Any, kwargs: dict[str, Any]
) -> tuple[Beneath, dict[str, Any], Scope, Known | None]:
    """(the LM to use, its canonical arguments, what the engine must know, a cached answer) of a public call."""
    given = kwargs
    if not lm.watched.holds(lm.model, lm.kwargs):
        settled(lm)
    asked, kwargs, extras = per_call(lm, given) if given else (lm, given, None)
    scope = scope_of(asked, prompt, messages, kwargs, extras)
    if kwargs is not given and not isinstance(prompt, Request) and "request" not in given:
        scope.shown = shown(given)
    known = hit(asked, scope, prompt, messages, kwargs)
    if known is None and messages is not None:
        warn_messages(lm, messages)
    return asked, kwargs, scope, known


def ask(lm: Beneath, scope: Scope, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Asked:
    """An answer from the engine beneath, within the scope of `begin`."""
    call, request = plain(lm, prompt, messages, kwargs) or (prepare(lm, prompt, messages, kwargs, direct=True), None)
    result = run_call(lm, call, _told(lm, scope, call, request))
    if scope.shown is not None:
        call.kwargs = scope.shown
    return call, result


async def aask(lm: Beneath, scope: Scope, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Asked:
    """Asynchronous `ask`."""
    call, request = plain(lm, prompt, messages, kwargs) or (await _aprepare(lm, prompt, messages, kwargs), None)
    result = await arun_call(lm, call, _told(lm, scope, call, request))
    if scope.shown is not None:
        call.kwargs = scope.shown
    return call, result


async def _aprepare(lm: Beneath, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> PreparedCall:
    if isinstance(prompt, Request) or "request" in kwargs:  # may read the files of its media
        return await asyncio.to_thread(prepare, lm, prompt, messages, kwargs, asynchronous=True, direct=True)
    return prepare(lm, prompt, messages, kwargs, asynchronous=True, direct=True)


def _told(lm: Beneath, scope: Scope, call: PreparedCall, request: Request | None) -> Request:
    """The canonical request of a prepared call; the scope learns what the engine must know beside it."""
    if request is None:
        return asked(lm, scope, call)
    scope.body = call.legacy
    return request


def per_call(lm: Beneath, kwargs: dict[str, Any]) -> tuple[Beneath, dict[str, Any], dict[str, Any] | None]:
    """(the LM to use, its canonical arguments, extras beside them) for one call's arguments."""
    if _PLAIN_CALL_KEYS.issuperset(kwargs):
        return lm, kwargs, None
    kwargs = dict(hide(kwargs))
    cache = kwargs.pop("cache", None)
    policies = {name: value for name in ("retry", "num_retries") if (value := kwargs.pop(name, None)) is not None}
    request = {"request": kwargs.pop("request")} if "request" in kwargs else {}
    if isinstance(cache, (Cache, Mapping)):
        policies["cache"], cache = cache, True
    canonical, clients, extras = split(kwargs)
    if cache is not None:
        canonical["cache"] = cache
    canonical.update(request)
    policies.update(clients)
    elsewhere = places(extras)
    if elsewhere:
        policies["elsewhere"] = elsewhere
        extras = {name: value for name, value in extras.items() if name not in elsewhere}
    return variant(lm, policies) if policies else lm, canonical, extras or None


def scope_of(lm: Beneath, prompt: Any, messages: Any, kwargs: dict[str, Any], extras: dict[str, Any] | None) -> Scope:
    """What the engine beneath must know of this call, and its exact cache key if the arguments are plain JSON."""
    context = stamped(current())
    merged = lm.kwargs
    if lm.watched.elsewhere:
        merged = {name: value for name, value in merged.items() if name in CANONICAL_KEYS}
    uses_cache = lm.cache
    if kwargs:
        merged = {**merged, **kwargs}
        uses_cache = merged.pop("cache", uses_cache)
    base = None
    log = log_of(context.guards) if context.guards else None
    use_cache = bool(uses_cache) and caches_anything() and context.cache != "bypass" and lm.pipeline.cache is not None
    if (use_cache or log is not None) and not isinstance(prompt, Request) and "request" not in kwargs:
        tenant = None if lm.settings.cache.shared else context.tenant
        base = raw_key(lm.identity, prompt, messages, {**merged, **extras} if extras else merged, tenant)
    scope = Scope(context, base, extras, merged.get("rollout_id"), use_cache)
    if log is not None:
        scope.log = log
    if lm.pipeline.capped:
        answers = merged.get("n")
        scope.purse = Purse(answers if isinstance(answers, int) else 1)
    return scope


def hit(lm: Beneath, scope: Scope, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Known | None:
    """A fresh answer from memory or the store, before any of DSPy's work; None when the engine has to look."""
    base = scope.base
    if base is None or scope.log is not None or scope.context.cache != "use" or not SHORT:
        return None
    if lm.model_type == "responses":
        return None
    cache = lm.pipeline.cache
    assert cache is not None
    entry = cache.peek(base) or cache.stored(base)
    if entry is None:
        scope.missed = True
        cache.misses += 1
        return None
    text = entry.text
    if text is None or kwargs.get("n", 1) not in (1, None) or lm.kwargs.get("n", 1) not in (1, None):
        return None
    if is_streaming():
        return None  # a listener wants events: the engine replays the answer for it
    cache.used(base)
    response = entry.response
    record_hit(lm.pipeline, scope.context, scope.records, entry.list_nano)
    return response, text


def result_of(known: Known) -> CallResult:
    """What DSPy's engines would make of a cached answer."""
    response, text = known
    # By position, which takes half the time: `SHORT` says that the fields stand in this order.
    return CallResult((response,), [text], {}, 0.0, response, response.model, True)


def asked(lm: Beneath, scope: Scope, prepared: PreparedCall) -> Request:
    """The canonical request of a prepared call, or one that stands for it; the scope learns what it cannot say."""
    if prepared.request is None:
        scope.body = prepared.legacy
    try:
        return request_of(lm, prepared)
    except (LM15Error, TypeError, ValueError) as refusal:
        scope.refusal = refusal
        said = CANONICAL_KEYS - OWN_KEYS
        return standing_for(lm.model, {name: value for name, value in prepared.legacy.items() if name in said})


def calls_of(lm: Beneath, prepared: PreparedCall, extras: dict[str, Any] | None) -> list[Call]:
    """The engine calls behind one LM call (one for each of `n` answers), with the cache keys they would have."""
    prompt = prepared.prompt if prepared.request is None else prepared.request
    engine, _ = engines_of(lm)
    scope = scope_of(lm, prompt, prepared.messages, prepared.kwargs, extras)
    request = asked(lm, scope, prepared)
    with scope:
        return [engine.call(request, False) for _ in range(prepared.n)]
