"""One public call of one answer, without the detours of DSPy's general executor.

`dspy.clients.execution.execute` serves legacy plugins, compatibility engines, `n > 1`, retries and streams. What it
does for one canonical request on an engine object is written here again, in the same order and with the same errors;
every other call still goes through it, and all do if a version of DSPy has other steps than the known ones. The
asynchronous form also spares two hops to worker threads.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dspy.clients import execution
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.clients.call_result import usage_dict
from dspy.clients.errors import wrap_error
from dspy.clients.execution import aexecute, execute
from dspy.lm15 import Config, Message, Request, Response, TextPart
from dspy.utils.exceptions import LMError

from dspy_prod.compat.dspy import Engined, is_streaming
from dspy_prod.compat.foreign import names, version_of
from dspy_prod.compat.lm15 import CANONICAL

STEPS: Final = {
    "PreparedCall": "prompt messages kwargs legacy request cache n managed",
    "CallResult": "responses outputs usage cost raw response_model cache_hit cost_details",
    "_canonical": "call compat",
    "_result": "lm response call provider request estimate",
    "_hint_responses_api": "lm exc",
}
"""What the short way is made of: names in DSPy's executor, and their parameters."""


def _known() -> bool:
    """Whether this DSPy has exactly these steps."""
    try:
        return all(
            " ".join(signature(getattr(execution, name)).parameters) == parameters for name, parameters in STEPS.items()
        )
    except (AttributeError, TypeError, ValueError):
        return False


SHORT: Final = _known()
"""Whether calls go the short way. Only then the names below are there."""

if TYPE_CHECKING:
    PreparedCall: TypeAlias = Any
    CallResult: TypeAlias = Any
    _canonical: Any
    _result: Any
    _hint: Any
elif SHORT:
    PreparedCall, CallResult, _canonical, _result, _hint = names("dspy.clients.execution", *STEPS)
else:
    PreparedCall = CallResult = None
    logging.getLogger("dspy_prod").warning(
        "DSPy %s executes calls in other steps than dspy_prod knows; its own, slower executor is used",
        version_of("dspy"),
    )


def _run(lm: Engined, call: PreparedCall, request: Request) -> CallResult:
    """Answer a prepared call on this thread."""
    if call.n != 1 or is_streaming():
        return _general(lm, call, request)
    try:
        return result_of(lm, lm._engine_spec.complete(request), call, request)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


async def _arun(lm: Engined, call: PreparedCall, request: Request) -> CallResult:
    """Answer a prepared call in this task."""
    if call.n != 1 or is_streaming():
        return await _ageneral(lm, call, request)
    try:
        return result_of(lm, await lm._async_engine_spec.complete(request), call, request)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


def result_of(lm: Engined, response: Response, call: PreparedCall, request: Request) -> CallResult:
    """What DSPy finishes a call from: its own conversion, or the same of one plain text in a third of the time."""
    parts = response.message.parts
    if (
        len(parts) != 1
        or type(parts[0]) is not TextPart
        or response.finish_reason != "stop"
        or lm.model_type == "responses"
        or call.request is not None
        or call.legacy.get("logprobs")
    ):
        return _result(lm, response, call, None, request, estimate=False)
    return CallResult((response,), [parts[0].text], _usage(response), None, response, response.model)


def _usage(response: Response) -> dict[str, Any]:
    usage = response.usage
    inputs, outputs, total = usage.input_tokens, usage.output_tokens, usage.total_tokens
    details = (
        usage.cache_read_tokens, usage.cache_write_tokens, usage.reasoning_tokens, usage.input_audio_tokens,
        usage.output_audio_tokens,
    )  # fmt: skip
    if details != _NO_DETAILS or inputs is None or outputs is None or total is None:
        told: dict[str, Any] = usage_dict(response)
        return told
    return {
        "prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": total,
        "prompt_tokens_details": None, "completion_tokens_details": None,
    }  # fmt: skip


_NO_DETAILS: Final = (None,) * 5


def _general(lm: Engined, call: PreparedCall, request: Request) -> CallResult:
    return execute(lm, replace(call, request=request, cache=False))  # ours is beneath


async def _ageneral(lm: Engined, call: PreparedCall, request: Request) -> CallResult:
    return await aexecute(lm, replace(call, request=request, cache=False))


run_call = _run if SHORT else _general
arun_call = _arun if SHORT else _ageneral


@lru_cache(maxsize=512)
def _config(shape: tuple[Any, ...]) -> list[Config]:
    """Where the settings are kept that were converted from these arguments; empty until they were, and for good where
    the arguments add more than settings to a request. `lru_cache` alone is safe between threads and quick."""
    return []


def request_of(lm: Engined, call: PreparedCall) -> Request:
    """The canonical request of a call; DSPy's conversion, remembered where only texts change from call to call.

    Client settings and arguments that only LiteLLM understands are not in it.

    Raises:
        LM15Error, TypeError, ValueError: no canonical request can say it.
    """
    if call.request is not None:
        request: Request = call.request
        return request
    legacy = call.legacy
    try:
        kept = _config(
            tuple([(name, type(value), value) for name, value in legacy.items() if name not in _NOT_SETTINGS])
        )
    except TypeError:  # tools, schemas, ...: not hashable
        return _convert(call)
    texts = _texts(legacy["messages"])
    if texts is None:
        return _convert(call)
    system, messages = texts
    if not kept:
        request = _convert(call)
        plain = Request(model=request.model, messages=messages, system=system, config=request.config)
        if plain == request:
            kept.append(request.config)
        return request
    return Request(model=lm.model, messages=messages, system=system, config=kept[0])


_NOT_SETTINGS: Final = frozenset({"messages", "rollout_id"}) | CLIENT_KEYS
_SAID: Final = CANONICAL | {"n", "rollout_id", "num_generations", "prompt_cache"}


def _texts(rows: list[Any]) -> tuple[str | None, tuple[Message, ...]] | None:
    """(system, messages) when every message is plain text from user or assistant after at most one system text."""
    system: str | None = None
    messages = []
    for row in rows:
        if len(row) != 2:
            return None
        role, text = row.get("role"), row.get("content")
        if type(text) is not str or not text:
            return None
        if role == "user" or role == "assistant":
            messages.append(Message(role=role, parts=(TextPart(text),)))
        elif role == "system" and row is rows[0]:
            system = text
        else:
            return None
    return (system, tuple(messages)) if messages else None


def _convert(call: PreparedCall) -> Request:
    [canonical] = (_canonical,) if SHORT else names("dspy.clients.execution", "_canonical")
    said = {name: value for name, value in call.legacy.items() if name in _SAID}
    request: Request = canonical(call if len(said) == len(call.legacy) else replace(call, legacy=said))
    return request


def _shown(lm: Engined, error: Exception) -> Exception:
    if not isinstance(error, LMError):
        error = wrap_error(error, model=lm.model)
    _hint(lm, error)
    return error


def _cause(error: Exception) -> Any:
    return error.__cause__ if isinstance(error, LMError) else error
