"""What DSPy does at the end of a public call: its history, and the outputs."""

from __future__ import annotations

import datetime as dt
import os
import time
from typing import Any, Final, Protocol

from dspy.clients import base_lm
from dspy.clients.execution import finalize

from dspy_prod.compat.dspy import configured, thread_local_overrides
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
    if not result.cache_hit:
        overrides = thread_local_overrides.get()
        tracker = (overrides if "usage_tracker" in overrides else configured)["usage_tracker"]
        if tracker:
            tracker.add_usage(lm.model, result.usage)
    if keeps_history():
        entry = entry_of(
            lm, call.prompt, call.messages, call.kwargs, result.responses, result.raw, result.outputs, result.usage,
            result.cost, result.cost_details, result.response_model,
        )  # fmt: skip
        lm.update_history(entry)
    return result.outputs


def keeps_history() -> bool:
    """Whether calls are written into histories here."""
    overrides = thread_local_overrides.get()
    return not (overrides if "disable_history" in overrides else configured)["disable_history"]


def entry_of(
    lm: Recorded,
    prompt: Any,
    messages: Any,
    kwargs: dict[str, Any],
    responses: tuple[Any, ...],
    raw: Any,
    outputs: list[Any],
    usage: dict[str, Any],
    cost: float | None,
    cost_details: dict[str, Any] | None,
    response_model: str | None,
) -> dict[str, Any]:
    """The entry of a call without a typed request, as DSPy writes it."""
    entry = {
        "prompt": prompt, "messages": messages,
        "kwargs": {name: value for name, value in kwargs.items() if not name.startswith("api_")} if kwargs else {},
        "response": responses if raw is None else raw,
        "outputs": outputs, "usage": usage, "cost": cost,
        "timestamp": _timestamp(), "uuid": _uuid(),
        "model": lm.model, "response_model": response_model, "model_type": lm.model_type,
    }  # fmt: skip
    if cost_details:
        entry["cost_details"] = cost_details
    for response in responses:
        adaptations = getattr(response, "adaptations", ())
        if adaptations:
            entry["adaptations"] = (*entry.get("adaptations", ()), *adaptations)
    return entry


_now: Final = time.time_ns
_second: tuple[str, str] = ("", "")  # the latest, and how it reads


def _timestamp() -> str:
    """`datetime.now().isoformat()`, of which only the fraction is written anew within a second."""
    global _second
    digits = f"{_now():010d}"
    second, micros = digits[:-9], digits[-9:-3]
    known, text = _second
    if second != known:
        text = dt.datetime.fromtimestamp(int(second)).isoformat()
        _second = second, text
    return text if micros == "000000" else f"{text}.{micros}"


_DRAWN: Final = 64
_VERSION: Final = bytes([0x40 | byte & 0x0F for byte in range(256)])
_VARIANT: Final = bytes([0x80 | byte & 0x3F for byte in range(256)])
_DIGITS: Final = [place for place in range(36) if place not in (8, 13, 18, 23)]
"""Where a uuid's digits stand between its dashes."""


_drawn: list[str] = []
if hasattr(os, "register_at_fork"):  # a forked child must not have its parent's
    os.register_at_fork(after_in_child=_drawn.clear)


def _uuid() -> str:
    """`str(uuid.uuid4())`, from randomness that is drawn for many at once.

    Whoever asks the system for it lets go of the interpreter for a moment: too short for another thread to get hold of
    it, but each that waits is woken. Where cached answers followed each other, all others starved.
    """
    try:
        return _drawn.pop()
    except IndexError:
        made = _uuids(os.urandom(16 * _DRAWN))
        one = made.pop()
        _drawn.extend(made)
        return one


def _uuids(random: bytes) -> list[str]:
    """The uuids, version 4, of random bytes."""
    drawn = bytearray(random)
    drawn[6::16] = drawn[6::16].translate(_VERSION)
    drawn[8::16] = drawn[8::16].translate(_VARIANT)
    digits = drawn.hex().encode()
    text = bytearray(b"-") * (36 * (len(random) // 16))
    for index, place in enumerate(_DIGITS):  # the same digit of all of them at once
        text[place::36] = digits[index::32]
    written = text.decode()
    return [written[start : start + 36] for start in range(0, len(written), 36)]


def _keep(lm: Recorded, entry: dict[str, Any]) -> None:
    """`_append_to_all`, if a history is kept."""
    if keeps_history():
        _append_to_all(lm, entry)


def _append_to_all(lm: Recorded, entry: dict[str, Any]) -> None:
    """Add an entry to the histories of all calls, of the LM and of the modules that call it."""
    overrides = thread_local_overrides.get()
    _append(base_lm.GLOBAL_HISTORY, entry, base_lm.MAX_HISTORY_SIZE)
    most = (overrides if "max_history_size" in overrides else configured)["max_history_size"]
    if most == 0:
        return
    _append(lm.history, entry, most)
    for module in (overrides if "caller_modules" in overrides else configured)["caller_modules"] or ():
        _append(_attribute(module, "history"), entry, most)


_attribute: Final = object.__getattribute__
"""A module's own way looks for calls of `forward` at each attribute, which takes longer than the rest of `_append`."""


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
append = _append_to_all if SHORT else base_lm.record_history
