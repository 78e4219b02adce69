"""One call at the provider, from the request's arrival to the last byte of its answer, and onto the bill.

The bill row is written and the call leaves `in_flight` *before* the last bytes are sent, so that a client who has
its answer finds both settled.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from dspy_prod.testing.answers import Reply, distort
from dspy_prod.testing.bill import Bill
from dspy_prod.testing.calls import Call
from dspy_prod.testing.dialects import DIALECTS, STREAMED, Piece, dumps, sse
from dspy_prod.testing.embeddings import too_much
from dspy_prod.testing.faults import (
    EmptyChoices,
    ErrorInStream,
    Fault,
    Hang,
    MalformedJson,
    MissingUsage,
    Reset,
    Status,
    Trickle,
    TruncatedStream,
    Verbatim,
    WrongUsage,
)
from dspy_prod.testing.quota import Quota
from dspy_prod.testing.wire import LAST_CHUNK, Connection, chunk, head, response

SETTLE_PAUSE = 0.01
"""Seconds between the last bytes and a RST, so that the client has received them before."""


_GIVEN_IN = {"responses": "output", "embeddings": "data"}
"""The field in which an endpoint gives its answers, where that is not `choices`."""


class Serving(Protocol):
    """The provider, as an exchange needs it."""

    bill: Bill
    bill_abandoned: bool
    chunk_delay: float
    chunks: int
    in_flight: int
    quota: Quota
    ratelimit_headers: bool
    stopping: bool

    async def generate(self, call: Call) -> Reply: ...
    async def released(self) -> None: ...
    def blame(self, call: Call, error: Exception) -> Status: ...
    def draw_latency(self, call: Call) -> float: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...


class Exchange:
    """Serves one call.

    Args:
        provider: whose answers, limits and bill apply.
        connection: where the answer goes.
        call: the record to fill in.
        fault: what the call meets, or None.
    """

    def __init__(self, provider: Serving, connection: Connection, call: Call, fault: Fault | None) -> None:
        self.provider = provider
        self.connection = connection
        self.call = call
        self.fault = fault
        self.reply: Reply | None = None
        self.share = 0.0
        self.billed = False
        self.telling = False
        self.entered = False

    async def run(self) -> None:
        """Answer the call."""
        call = self.call
        call.fault = self.fault.name if self.fault else None
        try:
            await self._run()
        except asyncio.CancelledError:
            if call.finished_at is None or self.telling:
                self._client_left()
            raise
        except Exception as error:  # a callable given by the test failed: say so loudly
            if call.finished_at is None:
                call.accepted = False
                self._refuse(self.provider.blame(call, error))
            else:
                raise
        finally:
            self._finish()

    async def _run(self) -> None:
        call, fault = self.call, self.fault
        if isinstance(fault, Status):
            if fault.delay > 0:
                await asyncio.sleep(fault.delay)
            self._refuse(fault)
            return
        if isinstance(fault, Verbatim) and fault.status >= 300:
            await self._send_verbatim(fault)
            return
        reply = await self.provider.generate(call)
        if isinstance(fault, WrongUsage):
            reply = Reply(call, reply.choices, distort(reply.usage, fault), reply.created)
        call.input_tokens, call.output_tokens = reply.usage.input_tokens, reply.usage.output_tokens
        tokens = call.input_tokens + call.output_tokens
        excess = too_much(call, tokens) if call.api == "embeddings" else None
        if excess is not None:
            self._refuse(excess)
            return
        refusal = self.provider.quota.admit(call.received_at, tokens, self.provider.in_flight)
        if refusal is not None:
            self._refuse(refusal)
            return
        call.accepted = True
        self.reply = reply
        self.entered = True
        self.provider.enter()
        if isinstance(fault, Hang):
            await self._hang(fault)
            return
        latency = self.provider.draw_latency(call)
        if latency > 0:
            await asyncio.sleep(latency)
        await self.provider.released()
        if isinstance(fault, Reset) and fault.when == "before":
            self._settle(1.0, told=False, billed=fault.is_billed)
            self._finish()
            self.connection.reset()
        elif isinstance(fault, Verbatim):
            await self._send_verbatim(fault)
        elif call.stream:
            await self._send_stream(reply)
        else:
            await self._send_body(reply)

    # -- money and records

    def _settle(self, share: float, *, told: bool, billed: bool = True) -> None:
        """Bill the call, once: all input and `share` (0 to 1) of the output."""
        if self.billed or self.reply is None:
            return
        self.billed = True
        if billed:
            usage = self.reply.usage_at(share)
            call = self.call
            self.provider.bill.add(call.call_id, call.model, usage, at=time.monotonic(), told=told, status=call.status)

    def _finish(self) -> None:
        if self.call.finished_at is None:
            self.call.finished_at = time.monotonic()
        if self.entered:
            self.entered = False
            self.provider.leave()

    def _client_left(self) -> None:
        """The connection is gone (or the provider stops): bill what was generated, note the abort."""
        self.call.aborted = not self.provider.stopping
        self.call.finished_at = time.monotonic()
        if self.telling:
            self.provider.bill.mark_untold(self.call.call_id)
        elif isinstance(self.fault, Hang):
            return
        elif self.call.stream:
            self._settle(self.share, told=False, billed=self.share > 0 or self.provider.bill_abandoned)
        else:
            self._settle(1.0, told=False, billed=self.call.status is not None or self.provider.bill_abandoned)

    # -- ways to answer

    def _headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.call.call_id}
        if self.provider.ratelimit_headers:
            headers.update(self.provider.quota.headers(time.monotonic()))
        return headers

    def _started(self, status: int) -> None:
        self.call.status = status
        self.call.sent_at = time.monotonic()

    def _refuse(self, status: Status) -> None:
        self._started(status.code)
        self._finish()
        headers = {**self._headers(), **status.http_headers()}
        self.connection.write(response(status.code, dumps(status.error()), headers))

    async def _hang(self, fault: Hang) -> None:
        self._settle(1.0, told=False, billed=fault.billed)
        if fault.seconds is None:
            await asyncio.get_running_loop().create_future()
        else:
            await asyncio.sleep(fault.seconds)
        self._finish()
        self.connection.close()

    async def _send_body(self, reply: Reply) -> None:
        fault, connection = self.fault, self.connection
        told = not isinstance(fault, (MissingUsage, MalformedJson, TruncatedStream, ErrorInStream, Reset))
        content = DIALECTS[self.call.api].body(reply, None if isinstance(fault, MissingUsage) else reply.usage)
        if isinstance(fault, EmptyChoices):
            content[_GIVEN_IN.get(self.call.api, "choices")] = []
        body = dumps(content)
        if isinstance(fault, MalformedJson):
            body = body[: len(body) * 2 // 3]
        elif isinstance(fault, ErrorInStream):
            body = dumps(fault.error())
        first = head(200, self._headers(), length=len(body))
        self._started(200)
        if isinstance(fault, (Reset, TruncatedStream)):
            self._settle(1.0, told=False, billed=not isinstance(fault, Reset) or fault.is_billed)
            cut = 0 if isinstance(fault, Reset) and fault.when == "after_headers" else len(body) // 2
            connection.write(first + body[:cut])
            await self._break_off(rst=isinstance(fault, Reset))
            return
        if isinstance(fault, Trickle):
            connection.write(first)
            first = b""
            await connection.drip(body[:-1], fault.bytes_per_second)
            body = body[-1:]
        await self._last(first + body, told=told)

    async def _send_verbatim(self, fault: Verbatim) -> None:
        data = fault.data()
        self._started(fault.status)
        first = head(fault.status, {**self._headers(), **fault.http_headers()}, length=len(data))
        await self._last(first + data, told=b"usage" in data)

    async def _send_stream(self, reply: Reply) -> None:
        fault, connection = self.fault, self.connection
        tell = self.call.include_usage and not isinstance(fault, MissingUsage)
        dialect = STREAMED[self.call.api]
        pieces = list(dialect.stream(reply, reply.usage if tell else None, self.provider.chunks))
        cut = isinstance(fault, (Reset, TruncatedStream))
        pieces = _faulted(pieces, fault)
        self._started(200)
        connection.write(head(200, self._headers(), length=None))
        for position, piece in enumerate(pieces):
            if piece.delta and self.provider.chunk_delay > 0:
                await asyncio.sleep(self.provider.chunk_delay)
            last = position == len(pieces) - 1 and not cut
            data = chunk(piece.data)
            if isinstance(fault, Trickle):
                # The last byte waits for the bill.
                await connection.drip(data[:-1], fault.bytes_per_second)
                data = data[-1:]
            if piece.usage and not last:
                self._settle(1.0, told=True)
                self.telling = True
            if last:
                told = self.billed or piece.usage
                share = piece.share if isinstance(fault, ErrorInStream) else 1.0
                self._settle(share, told=told)
                await self._last(data + LAST_CHUNK, told=told)
                return
            connection.write(data)
            self.share = max(self.share, piece.share)
            # Even undelayed, each chunk gives the loop a turn in which to notice that the client has left.
            await asyncio.sleep(0)
            await connection.drain()
            self.telling = False
        self._settle(1.0, told=False, billed=not isinstance(fault, Reset) or fault.is_billed)
        await self._break_off(rst=isinstance(fault, Reset))

    async def _last(self, data: bytes, *, told: bool) -> None:
        """Settle, leave, and send the last bytes."""
        self._settle(1.0, told=told)
        self._finish()
        self.connection.write(data)
        self.telling = told
        await self.connection.drain()
        self.telling = False

    async def _break_off(self, *, rst: bool) -> None:
        await self.connection.drain()
        if rst:
            await asyncio.sleep(SETTLE_PAUSE)
        self._finish()
        if rst:
            self.connection.reset()
        else:
            self.connection.close()


def _faulted(pieces: list[Piece], fault: Fault | None) -> list[Piece]:
    """The events of a stream as `fault` leaves them."""
    deltas = [position for position, piece in enumerate(pieces) if piece.delta]
    if isinstance(fault, Reset):
        return [] if fault.when == "after_headers" else pieces[: len(pieces) // 2]
    if isinstance(fault, EmptyChoices):
        return pieces[-2:] if len(pieces) > 1 and pieces[-2].usage else pieces[-1:]
    if isinstance(fault, (TruncatedStream, ErrorInStream)):
        kept = len(deltas) // 2 if fault.after is None else fault.after
        # All its text sent, a stream is cut just behind the last of it.
        end = deltas[kept] if kept < len(deltas) else deltas[-1] + 1 if deltas else 1
        head = pieces[:end]
        if isinstance(fault, TruncatedStream):
            return head
        return [*head, Piece(sse(fault.error()), head[-1].share if head else 0.0)]
    if isinstance(fault, MalformedJson):
        broken = deltas[len(deltas) // 2] if deltas else 0
        data = pieces[broken].data
        ruined = Piece(data[: len(data) * 2 // 3].rstrip() + b"\n\n", pieces[broken].share, delta=True)
        return [*pieces[:broken], ruined, *(piece for piece in pieces[broken + 1 :] if not piece.usage)]
    return pieces
