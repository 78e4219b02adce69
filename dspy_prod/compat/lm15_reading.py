"""What lm15 reads of an answer: no more than `bounds` says, for its transports for threads and for tasks alike."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import Any, Final

from dspy.lm15 import ProviderError

from dspy_prod.compat import bounds
from dspy_prod.compat.foreign import names

_Head: Any
_Sized: Any
_Encoded: Any
_Inflater: Any
[_Head, _Sized, _Encoded, _Inflater] = names(
    "dspy._vendor.lm15.transports._http11",
    "ResponseHeadParser", "ContentLengthDecoder", "ContentDecoder", "_Inflater",
)  # fmt: skip


_SIP: Final = 8 * 1024
"""Bytes that are read at once until the head is there. The parser measures all that it has got against the largest head
that it takes, also the part of the body that came with the head's end."""


class Sipped:
    """A connection, for reading a head from it."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def sock(self) -> Sipped:
        return self

    reader = sock

    def settimeout(self, timeout: float) -> None:
        self._connection.sock.settimeout(timeout)

    def recv(self, size: int) -> bytes:
        received: bytes = self._connection.sock.recv(min(size, _SIP))
        return received

    def read(self, size: int) -> Awaitable[bytes]:
        read: Awaitable[bytes] = self._connection.reader.read(min(size, _SIP))
        return read


def bounded_head(head: Any, connection: Any) -> Any:
    """The head of an answer, which bounds its body.

    Args:
        head: as the transport has read it.
        connection: where it came from; closed when it says more than is read.
    """
    head.__class__ = _BoundedHead  # a transport makes its own, and a subclass adds no field
    head.connection = connection
    return head


class _BoundedHead(_Head):
    connection: Any

    def body_decoder(self, request_method: str) -> Any:
        decoder = super().body_decoder(request_method)
        bound = bounds.bound_of(self.status, self.header("content-type") or "")
        if type(decoder) is _Sized and decoder._remaining <= bound:
            return decoder  # told beforehand: nothing to count
        return _Bounded(decoder, self.status, bound, self.connection)


class _Bounded:
    """A decoder that counts what is read and what comes of it."""

    def __init__(self, decoder: Any, status: int, bound: int, connection: Any) -> None:
        if type(decoder) is _Encoded:
            decoder._inflaters = [_BoundedInflater(each._coding, status) for each in decoder._inflaters]
        self._decoder = decoder
        self._status = status
        self._unread = self._left = bound
        self._connection = connection
        self._ended = False

    @property
    def complete(self) -> bool:
        return self._ended or bool(self._decoder.complete)

    @property
    def leftover(self) -> bytes:
        return b"" if self._ended else bytes(self._decoder.leftover)

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._unread -= len(data)
        for part in self._decoder.feed(data):
            self._left -= len(part)
            if self._left < 0:
                self._end()
                yield part[: self._left]
                return
            yield part
        if self._unread < 0 and not self.complete:  # a body may also be large and come to nothing
            self._end()

    def eof(self) -> None:
        self._decoder.eof()

    def drain(self) -> bytes:
        return bytes(self._decoder.drain())

    def _end(self) -> None:
        """Of an error the beginning is enough, and an answer cannot be used."""
        if self._status < 300:
            raise _refusal(self._status)
        self._ended = True
        self._connection.close()


class _BoundedInflater(_Inflater):
    """One that makes of one read no more than is told, little by little."""

    def __init__(self, coding: str, status: int) -> None:
        super().__init__(coding)
        self._status = status

    def decompress(self, data: bytes) -> bytes:
        size = bounds.slice_of(self._coding)
        parts, made = [], 0
        for start in range(0, len(data), size):
            part = super().decompress(data[start : start + size])
            parts.append(part)
            made += len(part)
            if made > bounds.EXPANDED:
                raise _refusal(self._status)
        return b"".join(parts)


def _refusal(status: int) -> ProviderError:
    return ProviderError(bounds.too_long(status), status=status)
