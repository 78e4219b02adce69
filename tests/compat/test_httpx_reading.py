"""What is looked at of an answer while httpx reads it, in whatever pieces it comes."""

from __future__ import annotations

import time
from typing import Final

import httpx
import pytest

from dspy_prod.compat.httpx_reading import _LONGEST_LINE, _PIECE, bound
from dspy_prod.compat.stay import Stay

STREAM: Final = "text/event-stream"
WORD: Final = b'data: {"x": "a word"}'
ODD: Final = b'data: {"usage": {"prompt_tokens": true}}'
EVEN: Final = b'data: {"usage": {"prompt_tokens": 11}}'
QUOTED: Final = b'data: {"said": {"prompt_tokens": true}}'
LONG: Final = b'data: {"x": "' + b"A" * _LONGEST_LINE + b'"}'


def read(body: bytes, piece: int, content_type: str = STREAM) -> Stay:
    """What was noticed in a body that comes in such pieces."""
    stay, response = Stay(), httpx.Response(200, headers={"content-type": content_type}, stream=_Nothing())
    bound(response, stay)
    decoder = response._get_content_decoder()
    for start in range(0, len(body), piece):
        decoder.decode(body[start : start + piece])
    decoder.flush()
    return stay


class _Nothing(httpx.SyncByteStream):
    """The body is read beside it."""


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 40, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    ("lines", "odd"),
    [
        ([WORD, ODD], True),
        ([ODD, WORD], True),
        ([WORD, b"", EVEN, b"", b"data: [DONE]"], False),
        ([QUOTED, WORD], False),
        ([b"", b"", WORD], False),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_counter_that_is_no_number_is_seen_in_whatever_pieces_it_comes(
    lines: list[bytes], odd: bool, end: bytes, piece: int, ended: bool
) -> None:
    """Also in a last line without an end."""
    assert read(end.join(lines) + (end if ended else b""), piece).odd is odd


@pytest.mark.parametrize("piece", [_PIECE, 1 << 16, 1 << 22])
@pytest.mark.parametrize(("lines", "odd"), [([LONG, EVEN], False), ([LONG, ODD], True), ([ODD, LONG], True)])
def test_a_line_longer_than_is_kept_hides_no_other(lines: list[bytes], odd: bool, piece: int) -> None:
    """It is looked at in parts."""
    assert read(b"\n".join(lines), piece).odd is odd


def test_a_counter_where_a_long_line_is_cut_is_seen() -> None:
    """The last bytes of one part are the first of the next one."""
    cut = b'data: {"x": "' + b"A" * (_LONGEST_LINE - 18) + b'", "usage": {"prompt_tokens": true}}\n'
    assert read(cut, _PIECE).odd


def test_a_long_line_costs_what_its_length_does() -> None:
    """All that had come of a line was copied for each two kilobytes more: 55 times what is read without lines."""
    body = LONG[:-2] * 3 + b'"}\n'

    def seconds(content_type: str) -> float:
        began = time.thread_time()
        read(body, _PIECE, content_type)
        return time.thread_time() - began

    took = min(seconds(STREAM) / seconds("application/json") for _ in range(5))
    assert took < 8, f"{took:.1f} times"
