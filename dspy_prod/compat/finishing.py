"""What DSPy does at the end of a public call: its history, and the outputs."""

from __future__ import annotations

import datetime as dt
import os
from typing import Any, Final, Protocol

from dspy.clients import base_lm
from dspy.clients.execution import finalize

from dspy_prod.compat.dspy import settings
from dspy_prod.compat.steps import SHORT, CallResult, PreparedCall


class Recorded(Protocol):
    """An LM, as far as its history tells of it."""

    model: str
    model_type: str
    history: list[dict[str, Any]]

    def update_history(self, entry: dict[str, Any]) -> None: ...


def _finish(lm: Recorded, call: PreparedCall, result: CallResult) -> Any:
    """Write a call into the history, if one is kept, and give its outputs."""
    if call.request is not None:
        return finalize(lm, call, result)
    overrides, configured = settings()
    if not result.cache_hit:
        tracker = (overrides if "usage_tracker" in overrides else configured)["usage_tracker"]
        if tracker:
            tracker.add_usage(lm.model, result.usage)
    if not (overrides if "disable_history" in overrides else configured)["disable_history"]:
        responses, kwargs = result.responses, call.kwargs
        entry = {
            "prompt": call.prompt, "messages": call.messages,
            "kwargs": {name: value for name, value in kwargs.items() if not name.startswith("api_")} if kwargs else {},
            "response": responses if result.raw is None else result.raw,
            "outputs": result.outputs, "usage": result.usage, "cost": result.cost,
            "timestamp": _now().isoformat(), "uuid": _uuid(),
            "model": lm.model, "response_model": result.response_model, "model_type": lm.model_type,
        }  # fmt: skip
        if result.cost_details:
            entry["cost_details"] = result.cost_details
        for response in responses:
            adaptations = getattr(response, "adaptations", ())
            if adaptations:
                entry["adaptations"] = (*entry.get("adaptations", ()), *adaptations)
        lm.update_history(entry)
    return result.outputs


_now: Final = dt.datetime.now
_DRAWN: Final = 64
_drawn: Final[dict[int, list[bytes]]] = {}  # by process: a forked child must not have its parent's


def _uuid() -> str:
    """`str(uuid.uuid4())`, from randomness that is drawn for many at once.

    Whoever asks the system for it lets go of the interpreter for a moment: too short for another thread to get hold of
    it, but each that waits is woken. Where cached answers followed each other, all others starved.
    """
    try:
        random = _drawn[os.getpid()].pop()
    except (KeyError, IndexError):
        random = _draw()
    digits = random.hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89ab'[random[8] >> 4 & 3]}{digits[17:20]}-{digits[20:]}"


def _draw() -> bytes:
    random = os.urandom(16 * _DRAWN)
    drawn = [random[at : at + 16] for at in range(0, len(random), 16)]
    one = drawn.pop()
    _drawn.clear()
    _drawn[os.getpid()] = drawn
    return one


def _keep(lm: Recorded, entry: dict[str, Any]) -> None:
    """Add an entry to the histories of all calls, of the LM and of the modules that call it."""
    overrides, configured = settings()
    if (overrides if "disable_history" in overrides else configured)["disable_history"]:
        return
    _append(base_lm.GLOBAL_HISTORY, entry, base_lm.MAX_HISTORY_SIZE)
    most = (overrides if "max_history_size" in overrides else configured)["max_history_size"]
    if most == 0:
        return
    _append(lm.history, entry, most)
    for module in (overrides if "caller_modules" in overrides else configured)["caller_modules"] or ():
        _append(module.history, entry, most)


_LONG: Final = 1_000
_AT_ONCE: Final = 32


def _append(history: list[dict[str, Any]], entry: dict[str, Any], most: int) -> None:
    """Add an entry to a history that keeps so many.

    A long list is moved as a whole when its first goes, and a call has three of them: there the oldest go a few at a
    time.
    """
    if len(history) >= most:
        del history[: 1 if most < _LONG else _AT_ONCE]
    history.append(entry)


finish = _finish if SHORT else finalize
keep = _keep if SHORT else base_lm.record_history
