"""How large a picture, a recording or a PDF is, read from its first bytes without decoding it.

Everything is read out of base64 in place: only the few bytes a header needs are decoded, wherever they stand. None
means that the size cannot be told; nothing here raises.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable
from typing import TypeVar

_Found = TypeVar("_Found")

_MOST_STEPS = 10_000  # segments or boxes followed, so that a crafted file cannot keep us busy
_NO_FRAME = frozenset((0xC4, 0xC8, 0xCC))  # markers among JPEG's frame headers that are none
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_STREAM = re.compile(rb"\bstream\r?\n")
_LENGTH = re.compile(rb"/Length\s+(\d+)(?!\s+\d+\s+R)")
_NO_TEXT = (b"/Image", b"/Length1", b"/FontFile", b"/Type1C", b"/CIDFontType0C", b"/ICCBased", b"/XRef")


class _Bytes:
    """The bytes behind a base64 text, decoded where they are looked at."""

    def __init__(self, data: str) -> None:
        self._data = data
        self.size = len(data) // 4 * 3 - (data.endswith("=") + data.endswith("=="))

    def at(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; IndexError when the file ends before."""
        if start < 0 or start + count > self.size:
            raise IndexError(start)
        first = start // 3
        decoded = b64decode(self._data[first * 4 : -(-(start + count) // 3) * 4], validate=True)
        return decoded[start - first * 3 :][:count]

    def number(self, start: int, count: int, order: str = "big") -> int:
        """An unsigned integer."""
        return int.from_bytes(self.at(start, count), "big" if order == "big" else "little")


def _read(data: str, reader: Callable[[_Bytes], _Found | None]) -> _Found | None:
    try:
        return reader(_Bytes(data))
    except (IndexError, ValueError, binascii.Error):
        return None


def byte_size(data: str) -> int:
    """Bytes behind a base64 text."""
    return _Bytes(data).size


def image_size(data: str) -> tuple[int, int] | None:
    """(width, height) in pixels of a PNG, JPEG, GIF or WebP in base64."""
    size = _read(data, _image)
    return size if size is not None and min(size) > 0 else None


def _image(raw: _Bytes) -> tuple[int, int] | None:
    start = raw.at(0, min(16, raw.size))
    if start.startswith(b"\x89PNG\r\n\x1a\n") and start[12:16] == b"IHDR":
        return raw.number(16, 4), raw.number(20, 4)
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return raw.number(6, 2, "little"), raw.number(8, 2, "little")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp(raw, start[12:16])
    return _jpeg(raw) if start[:2] == b"\xff\xd8" else None


def _webp(raw: _Bytes, form: bytes) -> tuple[int, int] | None:
    if form == b"VP8X":
        return raw.number(24, 3, "little") + 1, raw.number(27, 3, "little") + 1
    if form == b"VP8L":
        bits = raw.number(21, 4, "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if form == b"VP8 ":
        return raw.number(26, 2, "little") & 0x3FFF, raw.number(28, 2, "little") & 0x3FFF
    return None


def _jpeg(raw: _Bytes) -> tuple[int, int] | None:
    place = 2
    for _ in range(_MOST_STEPS):
        mark, kind = raw.at(place, 2)
        if mark != 0xFF:
            return None
        if kind == 0xFF:  # padding
            place += 1
        elif 0xC0 <= kind <= 0xCF and kind not in _NO_FRAME:
            return raw.number(place + 7, 2), raw.number(place + 5, 2)
        else:
            place += 2 + raw.number(place + 2, 2)
    return None


def audio_seconds(data: str) -> float | None:
    """At most so long is a recording in base64: a WAV by its sample rate, an MP3 by the lowest bit rate there is."""
    return _read(data, _audio)


def _audio(raw: _Bytes) -> float | None:
    start = raw.at(0, 12)
    if start[:4] == b"RIFF" and start[8:12] == b"WAVE":
        return _wav(raw)
    if start[:3] == b"ID3" or (start[0] == 0xFF and start[1] & 0xE6 == 0xE2):  # MPEG audio, layer III
        return raw.size / 1000  # 8 kbit/s
    return None


def _wav(raw: _Bytes) -> float | None:
    place = 12
    for _ in range(_MOST_STEPS):
        if raw.at(place, 4) == b"fmt ":
            break
        length = raw.number(place + 4, 4, "little")
        place += 8 + length + length % 2
    else:
        return None
    body = place + 8
    form, channels = raw.number(body, 2, "little"), raw.number(body + 2, 2, "little")
    rate, bits = raw.number(body + 4, 4, "little"), raw.number(body + 14, 2, "little")
    if form not in (1, 3, 6, 7, 0xFFFE):  # PCM, float, A-law and mu-law: as many bytes a second as the header says
        return None
    a_second = rate * channels * bits // 8
    return raw.size / a_second if a_second else None


def video_seconds(data: str) -> float | None:
    """The length of an MP4 or QuickTime file in base64."""
    return _read(data, _video)


def _video(raw: _Bytes) -> float | None:
    place, end = 0, raw.size
    for _ in range(_MOST_STEPS):
        if place + 8 > end:
            return None
        length, kind, head = raw.number(place, 4), raw.at(place + 4, 4), 8
        if length == 1:
            length, head = raw.number(place + 8, 8), 16
        if kind == b"moov":  # go in
            place, head = place + head, 0
            continue
        if kind == b"mvhd":
            body = place + head
            wide = raw.number(body, 1) == 1
            scale = raw.number(body + (20 if wide else 12), 4)
            ticks = raw.number(body + (24 if wide else 16), 8 if wide else 4)
            return ticks / scale if scale and ticks else None  # a fragmented file tells no length
        if length < 8:
            return None
        place += length
    return None


def pdf_pages(data: str) -> tuple[int, int] | None:
    """(pages, bytes that may hold text) of a PDF in base64; None when its pages are packed, encrypted or hidden."""
    return _read(data, lambda raw: _pdf(raw.at(0, raw.size)))


def _pdf(raw: bytes) -> tuple[int, int] | None:
    if b"%PDF-" not in raw[:1024] or b"/ObjStm" in raw or b"/Encrypt" in raw:
        return None
    pages, text, place = len(_PAGE.findall(raw)), len(raw), 0
    while (stream := _STREAM.search(raw, place)) is not None:
        head = raw[max(raw.rfind(b"obj", place, stream.start()), place) : stream.start()]
        place = stream.end()
        length = _LENGTH.search(head)
        if length is not None and any(mark in head for mark in _NO_TEXT):
            end = place + int(length[1][:12])
            if b"endstream" in raw[end : end + 12]:  # else its length is not to be believed
                text, place = text - (end - place), end
    return (pages, text) if pages else None
