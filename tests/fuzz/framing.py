"""How an answer reaches a client: with a status, headers and a framing, in pieces; rightly, or with a lie, or cut."""

from __future__ import annotations

import gzip
import zlib
from typing import Final

from tests.fuzz.draws import Draws
from tests.fuzz.exchange import BODIES, STREAMS, End, Exchange, error_body, usages_in, usages_in_stream
from tests.fuzz.mutations import GARBAGE, broken, events, mutated
from tests.fuzz.secrets import SECRET

STATUSES: Final = (
    200, 400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 415, 418, 422, 423, 424, 425, 429, 431, 451, 499, 500, 501,
    502, 503, 504, 520, 522, 524, 529, 599, 201, 202, 206, 204, 301, 302, 303, 304, 307, 308, 300,
)  # fmt: skip
TYPES: Final = (
    "application/json", "text/event-stream", "text/html", "text/plain; charset=utf-16", "application/json; charset=x",
    "", "application/octet-stream", "text/event-stream; charset=utf-8", "application/x-ndjson", "*/*", "\x7f",
)  # fmt: skip
HEADERS: Final = (
    *[f"retry-after: {value}" for value in (
        "0", "1", "-1", "1e9", "nan", "inf", "", "x", "0.01", "Fri, 31 Dec 9999 23:59:59 GMT", "99999999999999999999",
        "Thu, 01 Jan 1970 00:00:00 GMT", "1, 2", "١", "Wed, 99 Foo 2026 99:99:99 GMT", "1" * 400)],
    *[f"retry-after-ms: {value}" for value in ("0", "10", "nan", "-5", "1e400")],
    *[f"x-ratelimit-remaining-{kind}: {value}" for kind in ("requests", "tokens")
      for value in ("0", "nan", "-1", "1e308")],
    *[f"x-ratelimit-reset-{kind}: {value}" for kind in ("requests", "tokens")
      for value in ("1s", "6m0s", "inf", "9e9h", "1800000001", "2026-13-99T99:99:99Z", "0001-01-01T00:00:00Z", "1ms")],
    "anthropic-ratelimit-requests-remaining: 0", "anthropic-ratelimit-requests-reset: 2999-01-01T00:00:00Z",
    "x-should-retry: true", "x-should-retry: false", "x-should-retry: maybe", "connection: close", "x: " + "y" * 3_000,
    "location: http://elsewhere.invalid/", "location: /v1/chat/completions", "location: \x7f", "location: //[",
    "set-cookie: a=b", "x-request-id: " + SECRET, "date: x", "server: \u00ff", "llm_provider-x: 1",
    "content-language: x",
)  # fmt: skip


LOCATIONS: Final = (
    "http://elsewhere.invalid/", "http://fuzz.invalid:8080/v1", "https://fuzz.invalid/v1", "//elsewhere.invalid/x",
    "/v1/chat/completions", "http://elsewhere.invalid@fuzz.invalid/", "http://fuzz.invalid@elsewhere.invalid/",
)  # fmt: skip
"""Where a redirect may lead."""
BEGINNINGS: Final = ((), (b"HTTP/1.1 ",), (b"HTTP/1.1 200 OK\r\nx: y\r\n",), (b"\x16\x03\x01",))
"""What may come of an answer that is none."""
CODINGS: Final = ("gzip", "deflate", "br", "gzip, gzip", "zstd", "identity", "x")


def exchange(draws: Draws, api: str, streaming: bool, number: int) -> Exchange:
    """What one connection brings. Healthy, if every draw is zero."""
    if draws.one_in(16):
        end: End = draws.pick(("refused", "reset", "hang", "close"))
        parts = (
            ()
            if end == "refused"
            else draws.pick(((), (b"HTTP/1.1 ",), (b"HTTP/1.1 200 OK\r\nx: y\r\n",), (b"\x16\x03\x01",)))
        )
        return Exchange(parts, end, None, False)
    how = draws.below(8)
    status, sse = 200, streaming
    if how <= 1:
        return _framed(draws, _healthy_body(draws, api, streaming, number), 200, sse, whole=True)
    if how <= 4:
        if streaming and draws.one_in(8) is False:
            body = b"".join(events(draws, api))
        else:
            body, sse = mutated(draws, draws.pick(BODIES[api])).encode("utf-8", "surrogatepass"), False
    elif how == 5:
        body = broken(draws, _healthy_body(draws, api, streaming, number))
    elif how == 6:
        body, sse = draws.pick(GARBAGE), draws.one_in(2)
    else:
        status, sse = draws.pick(STATUSES), False
        body = _error(draws, api)
    return _framed(
        draws, body.replace(b"answer 0000 0000", b"answer %04d %04d" % (number, number)), status, sse, whole=False
    )


def _healthy_body(draws: Draws, api: str, streaming: bool, number: int) -> bytes:
    body = b"".join(draws.pick(STREAMS[api])) if streaming else draws.pick(BODIES[api]).encode()
    return _marked(body, number)


def _marked(body: bytes, number: int) -> bytes:
    return body.replace(b"answer 0000 0000", b"answer %04d %04d" % (number, number))


def _error(draws: Draws, api: str) -> bytes:
    texts = ("busy", SECRET, "context length", "credit balance is too low", "model not found", "x" * 100_000, "")
    body = error_body(draws.pick((None, 429, "insufficient_quota", "context_length_exceeded", "x", 1.5, [])),
                      draws.pick(texts))  # fmt: skip
    how = draws.below(5)
    if how == 0:
        return body
    if how == 1:
        return mutated(draws, body.decode()).encode("utf-8", "surrogatepass")
    if how == 2:
        return draws.pick(GARBAGE)
    if how == 3:
        return broken(draws, body)
    return draws.pick(BODIES[api]).encode()


def _framed(draws: Draws, body: bytes, status: int, sse: bool, *, whole: bool) -> Exchange:
    """The body as HTTP brings it: mostly as it should, in pieces, sometimes with a lie, sometimes cut."""
    told = usages_in_stream(body) if sse else usages_in(body)
    lines = [f"HTTP/1.1 {status} Status".encode()]
    kind = "text/event-stream" if sse else "application/json"
    clean = True
    if not whole and draws.one_in(10):
        kind = draws.pick(TYPES)
        clean = False
    lines.append(f"content-type: {kind}".encode("latin-1"))
    for _ in range(draws.below(3) if draws.one_in(3) else 0):
        lines.append(draws.pick(HEADERS).encode("utf-8"))
    if 300 <= status < 400 and draws.below(3):
        lines.append(f"location: {draws.pick(LOCATIONS)}".encode())
    coding = draws.below(24)
    if coding >= 20:
        clean = False
        lines.append(f"content-encoding: {draws.pick(CODINGS)}".encode())
        if coding == 21:
            body = gzip.compress(body, 1)
        elif coding == 22:
            body = zlib.compress(body, 1)
    framing = draws.below(6)
    if status in (204, 304) or status < 200:
        clean = False
    if framing <= 2:
        lines.append(b"content-length: %d" % len(body))
        data = body
    elif framing == 3:
        lines.append(b"transfer-encoding: chunked")
        data = _chunked(draws, body)
    elif framing == 4:
        lines.append(b"connection: close")
        data = body
    else:
        clean = False
        lie = draws.pick((b"content-length: %d" % max(0, len(body) - 3), b"content-length: %d" % (len(body) + 3),
                          b"content-length: -1", b"content-length: x", b"content-length: 99999999999999999999",
                          b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"no colon", b": empty",
                          b"content-length: 0", b"\x00: \x00", b"content-length: 5\r\ncontent-length: 6"))  # fmt: skip
        lines.append(lie)
        data = body
    raw = b"\r\n".join(lines) + b"\r\n\r\n" + data
    end: End = "close"
    if draws.one_in(12):
        clean = False
        raw = raw[: draws.below(len(raw)) + 1]
        end = draws.pick(("close", "reset", "hang"))
        if raw.find(b"\r\n\r\n") < 0:
            return Exchange(_pieces(draws, raw), end, None, False)
    return Exchange(_pieces(draws, raw), end, status, clean, told if clean and 200 <= status < 300 else ())


def _chunked(draws: Draws, body: bytes) -> bytes:
    size = draws.pick((1 << 20, 100, 17))
    parts = [body[start : start + size] for start in range(0, len(body), size)] if len(body) < 4_000 else [body]
    return b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part]) + b"0\r\n\r\n"


def _pieces(draws: Draws, raw: bytes) -> tuple[bytes, ...]:
    """Cut anywhere, as a network does."""
    if draws.below(3) < 2:
        return (raw,)
    if len(raw) < 600 and draws.one_in(8):
        return tuple(raw[position : position + 1] for position in range(len(raw)))
    cuts = sorted({draws.below(len(raw) + 1) for _ in range(1 + draws.below(4))})
    return tuple(part for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True) if (part := raw[start:stop]))
