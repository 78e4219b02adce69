"""What one connection to a provider brings, and what of it is certain: the truth that a charge is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dspy_prod.testing import Usage
from dspy_prod.testing.answers import Choice, Reply
from dspy_prod.testing.calls import Api, CallView
from dspy_prod.testing.dialects import DIALECTS, dumps
from dspy_prod.testing.wire import LAST_CHUNK, chunk, head
from tests.fuzz import foreign

End = Literal["close", "reset", "hang", "refused"]

MOST: Final = 2**31 - 1
"""Tokens beyond which a counter is nonsense."""


@dataclass(frozen=True)
class Exchange:
    """See the module's docstring.

    Attributes:
        parts: what arrives, read by read.
        end: what comes after it; `refused`: there was no connection.
        status: of the answer; None where none can be read.
        clean: head and framing are as HTTP asks, and the whole body arrives.
        told: the usages that the body tells, if it is clear beyond doubt: (input, output) tokens.
    """

    parts: tuple[bytes, ...]
    end: End = "close"
    status: int | None = 200
    clean: bool = True
    told: tuple[tuple[int, int], ...] = ()


# -- what a healthy provider says ------------------------------------------------------------------------------------
CHOICES: Final = (
    (Choice("answer 0000 0000"),),
    (Choice("answer 0000 0000", finish_reason="length"),),
    (Choice("answer 0000 0000", reasoning="because of 0000"),),
    (Choice(None, (), "tool_calls"),),
    (Choice("answer 0000 0000"), Choice("answer 0000 0000, too")),
    (Choice(""),),
    (Choice("answer 0000 0000", finish_reason="content_filter"),),
)
"""Beginning with the plainest. The number is replaced by that of the example, to tell answers apart."""

_USAGES: Final = (Usage(7, 5), Usage(7, 5, 3, 2), Usage(1, 1), Usage(9, 100), Usage(90_000, 90_000), Usage(0, 0))


def _call(api: Api, stream: bool) -> CallView:
    return CallView(0, "chatcmpl-fuzz", api, "/v1", "fuzz", {}, {}, stream, 0.0, 1)


def _bodies(api: Api) -> tuple[str, ...]:
    call = _call(api, False)
    replies = [Reply(call, choices, usage, 1_800_000_000) for choices in CHOICES for usage in _USAGES[:2]]
    replies += [Reply(call, CHOICES[0], usage, 1_800_000_000) for usage in _USAGES[2:]]
    told = [json.dumps(DIALECTS[api].body(reply, reply.usage)) for reply in replies]
    return (*told, json.dumps(DIALECTS[api].body(replies[0], None)))


def _streams(api: Api) -> tuple[tuple[bytes, ...], ...]:
    call = _call(api, True)
    replies = [Reply(call, choices, usage, 1_800_000_000) for choices in CHOICES for usage in _USAGES[:2]]
    replies += [Reply(call, CHOICES[0], usage, 1_800_000_000) for usage in _USAGES[2:]]
    told = [tuple(piece.data for piece in DIALECTS[api].stream(reply, reply.usage, 3)) for reply in replies]
    return (*told, tuple(piece.data for piece in DIALECTS[api].stream(replies[0], None, 3)))


APIS: Final[tuple[Api, ...]] = ("chat", "responses", "completions")
BODIES: Final[Mapping[str, tuple[str, ...]]] = {**{api: _bodies(api) for api in APIS}, **foreign.BODIES}
"""Whole answers as JSON, the plainest first."""
STREAMS: Final[Mapping[str, tuple[tuple[bytes, ...], ...]]] = {
    **{api: _streams(api) for api in APIS},
    **foreign.STREAMS,
}
"""Streams, event by event."""


def healthy(api: str, streaming: bool, number: int) -> Exchange:
    """The plainest answer."""
    mark = b"answer %04d %04d" % (number, number)
    if streaming:
        body = b"".join(STREAMS[api][0]).replace(b"answer 0000 0000", mark)
        first = head(200, {}, length=None)
        return Exchange((first, chunk(body) + LAST_CHUNK), told=usages_in_stream(body))
    body = BODIES[api][0].encode().replace(b"answer 0000 0000", mark)
    return Exchange((head(200, {}, length=len(body)) + body,), told=usages_in(body))


def error_body(code: Any, text: str) -> bytes:
    """An error as OpenAI writes it."""
    return dumps({"error": {"message": text, "type": "error", "param": None, "code": code}})


# -- what is certain of a usage --------------------------------------------------------------------------------------
def usages_in(body: bytes) -> tuple[tuple[int, int], ...]:
    """The usage of a whole answer, where nobody can read it otherwise."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    found = _usage(_told(data)) if isinstance(data, dict) else None
    return () if found is None else (found,)


def usages_in_stream(body: bytes) -> tuple[tuple[int, int], ...]:
    """The usages that the events of a stream tell; none where one of them cannot be read, or is not to be believed.

    What stands behind the end is read by nobody, and what more comes behind a usage may have cost more.
    """
    found, last = [], True
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if data == b"[DONE]":
            break
        if not data:
            continue
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            return ()
        if not isinstance(told, dict):
            return ()
        inner = told.get("response")
        usage = _told(told) or (inner.get("usage") if isinstance(inner, dict) else None)
        last = usage is not None
        if usage is not None:
            each = _usage(usage)
            if each is None:
                return ()
            found.append(each)
    return tuple(found) if last else ()


def _told(data: dict[str, Any]) -> Any:
    """What a body or an event says of its usage, which in Google's language has names of its own."""
    counts = data.get("usageMetadata")
    if counts is None or "usage" in data:
        return data.get("usage")
    if not isinstance(counts, dict) or not set(counts) <= set(_GOOGLE):
        return counts or {"": None}  # nothing that is certain
    return {_GOOGLE[name]: count for name, count in counts.items()}


_GOOGLE: Final = {
    "promptTokenCount": "prompt_tokens",
    "candidatesTokenCount": "completion_tokens",
    "totalTokenCount": "total_tokens",
}


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counts = []
    for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        given = [usage[name] for name in names if name in usage]
        if len(given) != 1 or type(given[0]) is not int or not 0 < given[0] <= MOST // 4:
            return None
        counts.append(given[0])
    for names, most in ((("prompt_tokens_details", "input_tokens_details"), counts[0]),
                        (("completion_tokens_details", "output_tokens_details"), counts[1])):  # fmt: skip
        for name in names:
            details = usage.get(name, {})
            if not isinstance(details, dict):
                return None
            if any(type(count) is not int or not 0 <= count <= most for count in details.values()):
                return None
    if usage.get("total_tokens", sum(counts)) != sum(counts):
        return None
    if any(usage.get(name) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")):
        return None  # counted beside the input
    return counts[0], counts[1]
