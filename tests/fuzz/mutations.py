"""How a provider's answer goes wrong: in its JSON, its bytes, its events."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, Final

from tests.fuzz.draws import Draws
from tests.fuzz.exchange import STREAMS, error_body
from tests.fuzz.secrets import SECRET

_RAW: Final = "\x00raw:"
"""Begins a text that is written into the JSON as it stands, after this."""

STRANGE: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63, 2**64, 10**30, "", "5", "null",
    "error", "stop",
    [], {}, [None], [[]], [{}], {"": None}, "\x00", "\ud800", "\u202e\x1b[31m", "x" * 5_000, SECRET, _RAW + "NaN",
    _RAW + "Infinity", _RAW + "-Infinity", _RAW + "1e400", _RAW + "9" * 5_000, _RAW + "[" * 40 + "]" * 40,
    _RAW + "[" * 3_000 + "]" * 3_000, _RAW + "{\"a\":" * 2_000 + "1" + "}" * 2_000, _RAW + '"\\ud83d"', _RAW + "",
    _RAW + "'single'", _RAW + "00", ["answer"], {"text": "answer"}, {"type": "text", "text": None}, "content_filter",
    "tool_calls", "length", {"message": "busy", "code": 429}, {"code": "insufficient_quota", "message": SECRET},
)  # fmt: skip
"""What stands where something else is expected."""

NAMES: Final = (
    "usage", "choices", "error", "id", "model", "object", "output", "status", "finish_reason", "message", "content",
    "delta", "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens", "type", "index",
    "tool_calls", "refusal", "reasoning_content", "logprobs", "provider_specific_fields", "incomplete_details", "",
    "__class__", "text", "response", "cost", "service_tier", "annotations", "audio", "function_call",
)  # fmt: skip


def mutated(draws: Draws, text: str) -> str:
    """A JSON text with one to three things changed."""
    data = json.loads(text)
    for _ in range(1 + draws.below(3)):
        data = _changed(draws, data)
    return _written(data)


def _strange(draws: Draws) -> Any:
    return copy.deepcopy(draws.pick(STRANGE))  # it may be changed again


def _changed(draws: Draws, data: Any) -> Any:
    places = list(_places(data))
    if not places or draws.one_in(12):
        return _strange(draws)
    holder, key = places[draws.below(len(places))]
    how = draws.below(6)
    if how <= 2:
        holder[key] = _strange(draws)
    elif how == 3:
        del holder[key]
    elif how == 4 and isinstance(holder, dict):
        holder[draws.pick(NAMES)] = _strange(draws)
    elif isinstance(holder, dict):
        holder["\x00twice:" + key] = _strange(draws)
    else:
        holder.append(_strange(draws))
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(data, dict):
        for key in list(data):
            yield data, key
            yield from _places(data[key])
    elif isinstance(data, list):
        for position in range(len(data)):
            yield data, position
            yield from _places(data[position])


def _written(data: Any) -> str:
    if isinstance(data, dict):
        return "{" + ",".join([f"{json.dumps(_name(key))}:{_written(value)}" for key, value in data.items()]) + "}"
    if isinstance(data, list):
        return "[" + ",".join([_written(item) for item in data]) + "]"
    if isinstance(data, str) and data.startswith(_RAW):
        return data[len(_RAW) :]
    return json.dumps(data)


def _name(key: str) -> str:
    return key.rpartition(":")[2] if key.startswith("\x00twice:") else key


# -- bytes -----------------------------------------------------------------------------------------------------------
GARBAGE: Final = (
    b"", b" ", b"null", b"[]", b"{}", b"ok", b"<html>busy</html>", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"{", b'{"a":',
    b"data: [DONE]\n\n", b"data: {}\n\n", b"\x1f\x8b\x08\x00broken", b"[1,2", b'"text"', b"NaN", b"1e999", b"\x00" * 64,
    b"[" * 100_000, b"9" * 20_000, b'{"error":"' + SECRET.encode() + b'"}', b'{"detail":[{"msg":"no"}]}', b"true",
    b'{"choices":null,"usage":null}', b'{"error":{"code":429,"message":"busy"}}', b'{"error":null,"choices":[]}',
)  # fmt: skip


def broken(draws: Draws, body: bytes) -> bytes:
    """Bytes with something cut, doubled, replaced or put in."""
    how = draws.below(5)
    at = draws.below(len(body) + 1)
    if how == 0:
        return body[:at]
    if how == 1:
        return body[:at] + draws.pick(GARBAGE) + body[at:]
    if how == 2:
        return body + draws.pick(GARBAGE)
    if how == 3:
        return body[:at] + bytes([draws.below(256)]) + body[at + 1 :]
    return body[:at] + body[max(0, at - draws.below(40)) :]


# -- events ----------------------------------------------------------------------------------------------------------
def events(draws: Draws, api: str) -> list[bytes]:
    """The events of a stream, with something wrong."""
    found = list(draws.pick(STREAMS[api]))
    for _ in range(1 + draws.below(3)):
        at = draws.below(len(found)) if found else 0
        how = draws.below(10)
        if not found or how == 0:
            found.insert(at, _event(error_body(draws.pick((None, 429, "server_error", "500", SECRET)), SECRET)))
        elif how == 1:
            del found[at]
        elif how == 2:
            found.insert(draws.below(len(found) + 1), found[at])
        elif how == 3:
            found.append(found.pop(at))
        elif how == 4:
            found.insert(at, draws.pick((b": comment\n\n", b"\n\n", b"event: ping\ndata: {}\n\n", b"retry: 5\n\n",
                                         b"data:\n\n", b"id: 1\n\n", b"data: [DONE]\n\n", b"data\n\n", b"x: y\n\n",
                                         b"event: error\ndata: {\"error\":\"busy\"}\n\n")))  # fmt: skip
        elif how == 5:
            found[at] = found[at].replace(b"\n", b"\r\n" if draws.one_in(2) else b"\r")
        elif how == 6:
            found[at] = broken(draws, found[at])
        elif how == 7:
            found = found[:at]
        else:
            found[at] = _mutated_event(draws, found[at])
    return found


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _mutated_event(draws: Draws, event: bytes) -> bytes:
    first, mark, data = event.partition(b"data: ")
    try:
        text = mutated(draws, data.decode())
    except (ValueError, RecursionError):
        return event
    return first + mark + text.encode("utf-8", "surrogatepass") + b"\n\n"
