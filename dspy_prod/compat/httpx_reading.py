"""What httpx reads of an answer to a call: no more than `bounds` says. Imported with httpx, which takes its time."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, suppress
from typing import Any, Final

import httpx

from dspy_prod.compat import bounds
from dspy_prod.compat.foreign import names
from dspy_prod.compat.stay import Stay

_Decoder: Any
_Identity: Any
[_Decoder, _Identity, _Multi, *_] = names(
    "httpx._decoders", "ContentDecoder", "IdentityDecoder", "MultiDecoder", "DeflateDecoder", "GZipDecoder"
)
names("httpx", "Response._get_content_decoder")


_PIECE: Final = 2048
"""Bytes: ten events or so."""

_TURN: Final = 0.01
"""Seconds after which other tasks, and timers, have their turn."""


_BARE: Final = ("prompt_eval_count", "eval_count")
"""Ollama's counters, which stand in no object of their own."""

_COUNTERS: Final = (
    "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "cache_read_input_tokens",
    "reasoning_tokens", "cache_creation_input_tokens", "promptTokenCount", "candidatesTokenCount",
    "thoughtsTokenCount", "cachedContentTokenCount", "inputTokens", "outputTokens", "cacheReadInputTokens",
    "cacheWriteInputTokens", *_BARE,
)  # fmt: skip

_ODD: Final = re.compile(
    rb'"(?:' + "|".join(_COUNTERS).encode() + rb')"'
    rb'\s{0,9}:\s{0,9}(?:true|false|"|-|\d+\.0*[1-9]|\d+(?:\.\d+)?[eE])'
)
"""A counter of tokens that is no whole number: LiteLLM takes `true` for one token, and 11.5 for eleven. What a text in
the answer quotes has a backslash before each mark."""

_HOLDERS: Final = re.compile("usage|tokens|meta|metrics|billed", re.IGNORECASE)
"""Names of the objects that counters stand in. Elsewhere in a stream nobody takes them for the usage."""

_LONGEST_LINE: Final = 1 << 20
"""Bytes of a line, as it arrives, that are kept to be looked at."""

_REASON: Final = re.compile(
    rb'"(?:finish_reason|stop_reason|finishReason|stopReason|blockReason)"\s{0,9}:\s{0,9}"([^"\\]{1,64})"'
)
"""Why an answer ended: LiteLLM says "stop" where nobody said why, and for reasons that it does not know. Of a prompt
that Gemini blocks it says nothing else."""

_PARTS: Final = re.compile(rb'"(?:output_tokens|content_block_delta)"')
"""Anthropic tells a first count of the output before any of it: LiteLLM passes it on where no other follows."""

_ERROR: Final = re.compile(rb'"error"\s{0,9}:\s{0,9}\{\s{0,9}"type"\s{0,9}:\s{0,9}"(\w{1,64})"')
"""An error inside an answer, as Anthropic tells it: LiteLLM leaves its code behind, and says 500."""

_OVERLAP: Final = 128
"""Bytes of the last read in which one of these may begin."""


def bound(response: Any, stay: Stay) -> None:
    """Bound what is read of an answer of which nothing was read yet.

    Args:
        response: httpx's.
        stay: the attempt that it is for.
    """
    decoder = response._get_content_decoder()
    if isinstance(decoder, _Bounded) or hasattr(response, "_content"):
        return
    status = response.status_code
    response._decoder = _Bounded(decoder, status, response.headers.get("content-type", ""), stay)
    if isinstance(response.stream, httpx.SyncByteStream) and (wire := _own_socket(response)) is not None:
        response.stream = body = _Shutting(response.stream, wire)
        stay.reads(body)
    if status >= 300:
        response.stream = _Cut(response.stream)
    elif isinstance(response.stream, httpx.AsyncByteStream) and "stream" in response.headers.get("content-type", ""):
        response.stream = _Paced(response.stream)


class _Bounded(_Decoder):
    """A decoder that counts: every way of reading, in threads and in tasks, passes what it reads through one."""

    def __init__(self, decoder: Any, status: int, content_type: str, stay: Stay) -> None:
        self._layers: list[Any] = []
        if not isinstance(decoder, _Identity):
            self._layers = decoder.children if isinstance(decoder, _Multi) else [decoder]
        self._status = status
        self._left = bounds.bound_of(status, content_type)
        self._until = stay.until + bounds.LATE
        self._stay = stay
        self._last = b""
        self._line: list[bytes] | None = [] if "text/event-stream" in content_type.lower() else None
        self._length = 0  # of that line, which comes in pieces

    def decode(self, data: bytes) -> bytes:
        if time.monotonic() > self._until:
            raise httpx.ReadTimeout("Nobody waits for this answer any more")
        read = len(data)
        data = self._plain(data)
        self._left -= max(read, len(data))  # a body may also be large and decompress to nothing
        if self._left < 0:
            raise bounds.BodyTooLongError(self._status)
        if self._status < 300:
            self._hear(data)
        return data

    def flush(self) -> bytes:
        data = self._plain(b"", at_end=True)
        if self._status < 300 and self._line is not None:
            self._count(data + b"\n")
        return data

    def _count(self, data: bytes) -> None:
        """Look for odd counters: in the lines of a stream only where they count."""
        if self._stay.odd:
            return
        if self._line is None:
            self._stay.odd = _ODD.search(self._last + data) is not None
            return
        for piece in data.splitlines(keepends=True):
            self._line.append(piece)
            self._length += len(piece)
            ends = piece.endswith((b"\n", b"\r"))
            if ends or self._length > _LONGEST_LINE:
                line = b"".join(self._line)
                self._line = [] if ends else [line[-_OVERLAP:]]
                self._length = 0 if ends else _OVERLAP
                if _ODD.search(line) and _counts_oddly(line):
                    self._stay.odd = True
                    return

    def _hear(self, data: bytes) -> None:
        heard = self._last + data
        self._count(data)
        for found in _PARTS.finditer(heard):
            self._stay.uncounted = found[0] == b'"content_block_delta"'
        for found in _REASON.finditer(heard):
            self._stay.reason = found[1].decode(errors="replace")
        if (error := _ERROR.search(heard)) is not None:
            self._stay.code = error[1].decode()
        self._last = heard[-_OVERLAP:]

    def _plain(self, data: bytes, at_end: bool = False) -> bytes:
        try:
            for layer in self._layers:
                data = self._expanded(layer, data) + (layer.flush() if at_end else b"")
        except httpx.DecodingError:
            if self._status < 300:
                raise
            return b""  # of an error the status says what counts
        return data

    def _expanded(self, layer: Any, data: bytes) -> bytes:
        size = bounds.slice_of(_CODINGS.get(type(layer).__name__, ""))
        parts, made = [], 0
        for start in range(0, len(data), size):
            part = layer.decode(data[start : start + size])
            parts.append(part)
            made += len(part)
            if made > bounds.EXPANDED:
                raise bounds.BodyTooLongError(self._status)
        return b"".join(parts)


def _counts_oddly(line: bytes) -> bool:
    """Whether a counter in a line of a stream is no whole number; also where nobody can tell."""
    try:
        return _is_odd(json.loads(line.partition(b":")[2], parse_float=_whole), False)
    except (ValueError, RecursionError):
        return True


def _whole(number: str) -> int | str:
    """11.0 is eleven; 11.5 and 1e3 are no whole numbers to whoever counts tokens."""
    whole, _, rest = number.partition(".")
    return number if rest.strip("0") or "e" in number.lower() else int(whole)


def _is_odd(said: Any, counts: bool) -> bool:
    if isinstance(said, list):
        return any(_is_odd(each, counts) for each in said)
    if not isinstance(said, dict):
        return False
    for name, value in said.items():
        if isinstance(value, (dict, list)):
            if _is_odd(value, counts or _HOLDERS.search(name) is not None):
                return True
        elif value is not None and name in (_COUNTERS if counts else _BARE) and (type(value) is not int or value < 0):
            return True
    return False


_CODINGS = {"GZipDecoder": "gzip", "DeflateDecoder": "deflate"}


def _own_socket(response: Any) -> socket.socket | None:
    """The socket by which nothing but this answer comes; None where others share it (HTTP/2), or it is not known."""
    extensions = response.extensions
    if not bytes(extensions.get("http_version", b"")).startswith(b"HTTP/1"):
        return None
    told = getattr(extensions.get("network_stream"), "get_extra_info", None)
    found = None if told is None else told("socket")
    return found if isinstance(found, socket.socket) else None


class _Shutting(httpx.SyncByteStream):
    """A body that one thread reads, and another may end: closing it there would wait, or break what is being read.

    Once it is closed its connection may be another request's. The lock keeps the two apart; the garbage collector may
    come to `shut` in the very thread that holds it.
    """

    def __init__(self, stream: Any, wire: socket.socket) -> None:
        self._stream = stream
        self._wire: socket.socket | None = wire
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        with self._lock:
            self._wire = None
        self._stream.close()

    def shut(self) -> None:
        with self._lock:
            if self._wire is not None:
                with suppress(OSError):
                    # Not the method of `ssl.SSLSocket`, which takes the encryption from under the reader.
                    socket.socket.shutdown(self._wire, socket.SHUT_RDWR)


class _Paced(httpx.AsyncByteStream):
    """A stream in pieces, between which its task lets the loop look at the clock: at a deadline, above all.

    A read may bring hundreds of events. LiteLLM takes a millisecond for each, and waits for nothing meanwhile, least of
    all where none of them has a word in it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        turn = time.monotonic()
        async with aclosing(aiter(self._stream)) as chunks:
            async for chunk in chunks:
                for start in range(0, len(chunk), _PIECE):
                    yield chunk[start : start + _PIECE]
                    if time.monotonic() - turn > _TURN:
                        await asyncio.sleep(0)
                        turn = time.monotonic()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The beginning of the body of an error, which may break off: its status says what counts.

    Its connection is not used again if that is not all.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = bounds.ERROR

    def __iter__(self) -> Iterator[bytes]:
        with closing(iter(self._stream)) as chunks, suppress(httpx.TransportError):
            for chunk in chunks:
                yield self._part(chunk)
                if self._left <= 0:
                    return

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(aiter(self._stream)) as chunks:
            with suppress(httpx.TransportError):
                async for chunk in chunks:
                    yield self._part(chunk)
                    if self._left <= 0:
                        return

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _part(self, chunk: bytes) -> bytes:
        part = chunk[: self._left]
        self._left -= len(chunk)
        return part
