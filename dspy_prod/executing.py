"""One public call of one answer, without the detours of DSPy's general executor.

`dspy.clients.execution.execute` serves legacy plugins, compatibility engines, `n > 1`, retries and streams. What it
does for one canonical request on an engine object is written here again, in the same order and with the same errors;
every other call still goes through it. The asynchronous form also spares two hops to worker threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspy.clients.call_result import CallResult
from dspy.clients.errors import wrap_error
from dspy.clients.execution import PreparedCall, _canonical, _hint_responses_api, _result, aexecute, execute
from dspy.dsp.utils.settings import settings
from dspy.lm15 import LM15Error, Request
from dspy.utils.exceptions import LMError

if TYPE_CHECKING:
    from dspy_prod.lm import LM


def run_call(lm: LM, call: PreparedCall) -> CallResult:
    """Answer a prepared call on this thread."""
    if call.n != 1 or settings.send_stream is not None:
        return execute(lm, call)
    request = _request(lm, call)
    try:
        return _result(lm, lm._engine_spec.complete(request), call, None, request, estimate=False)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


async def arun_call(lm: LM, call: PreparedCall) -> CallResult:
    """Answer a prepared call in this task."""
    if call.n != 1 or settings.send_stream is not None:
        return await aexecute(lm, call)
    request = _request(lm, call)
    try:
        return _result(lm, await lm._async_engine_spec.complete(request), call, None, request, estimate=False)
    except Exception as error:
        raise _shown(lm, error) from _cause(error)


def _request(lm: LM, call: PreparedCall) -> Request:
    if call.request is not None:
        return call.request
    try:
        return _canonical(call)
    except LM15Error as error:
        raise wrap_error(error, model=lm.model) from error


def _shown(lm: LM, error: Exception) -> Exception:
    if not isinstance(error, LMError):
        error = wrap_error(error, model=lm.model)
    _hint_responses_api(lm, error)
    return error


def _cause(error: Exception) -> Any:
    return error.__cause__ if isinstance(error, LMError) else error
