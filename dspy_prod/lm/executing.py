"""One public call of one answer, without the detours of DSPy's general executor.

`dspy.clients.execution.execute` serves legacy plugins, compatibility engines, `n > 1`, retries and streams. What it
does for one canonical request on an engine object is written here again, in the same order and with the same errors;
every other call still goes through it. The asynchronous form also spares two hops to worker threads.
"""

from __future__ import annotations

from typing import Any, Final

from dspy.clients.call_result import CallResult
from dspy.clients.errors import wrap_error
from dspy.clients.execution import PreparedCall, _canonical, _hint_responses_api, _result, aexecute, execute
from dspy.dsp.utils.settings import settings
from dspy.lm15 import Config, LM15Error, Message, Request, TextPart
from dspy.utils.exceptions import LMError

from dspy_prod.lm.beneath import Beneath

_MAX_CONFIGS: Final = 512
_CONFIGS: dict[tuple[Any, ...], Config] = {}
"""Generation settings by the arguments they were converted from, where nothing but the texts adds to the request."""


def run_call(lm: Beneath, call: PreparedCall) -> CallResult:
    """Answer a prepared call on this thread."""
    if call.n != 1 or settings.send_stream is not None:
        return execute(lm, call)
    request = _request(lm, call)
    try:
        return _result(lm, lm._engine_spec.complete(request), call, None, request, estimate=False)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


async def arun_call(lm: Beneath, call: PreparedCall) -> CallResult:
    """Answer a prepared call in this task."""
    if call.n != 1 or settings.send_stream is not None:
        return await aexecute(lm, call)
    request = _request(lm, call)
    try:
        return _result(lm, await lm._async_engine_spec.complete(request), call, None, request, estimate=False)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


def _request(lm: Beneath, call: PreparedCall) -> Request:
    """The canonical request of a call; DSPy's conversion, remembered where only texts change from call to call."""
    if call.request is not None:
        return call.request
    legacy = call.legacy
    try:
        shape = tuple([(name, type(value), value) for name, value in legacy.items() if name != "messages"])
        config = _CONFIGS.get(shape)
    except TypeError:  # tools, schemas, ...: not hashable
        return _convert(lm, call)
    texts = _texts(legacy["messages"])
    if texts is None:
        return _convert(lm, call)
    system, messages = texts
    if config is None:
        request = _convert(lm, call)
        plain = Request(model=request.model, messages=messages, system=system, config=request.config)
        if plain == request and len(_CONFIGS) < _MAX_CONFIGS:
            _CONFIGS[shape] = request.config
        return request
    return Request(model=lm.model, messages=messages, system=system, config=config)


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


def _convert(lm: Beneath, call: PreparedCall) -> Request:
    try:
        return _canonical(call)
    except LM15Error as error:
        raise wrap_error(error, model=lm.model) from error


def _shown(lm: Beneath, error: Exception) -> Exception:
    if not isinstance(error, LMError):
        error = wrap_error(error, model=lm.model)
    _hint_responses_api(lm, error)
    return error


def _cause(error: Exception) -> Any:
    return error.__cause__ if isinstance(error, LMError) else error
