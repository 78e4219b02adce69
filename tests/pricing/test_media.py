"""Pictures, recordings and documents take at most what their providers publish for their size."""

from __future__ import annotations

import io
import random
import struct
import time
import wave
import zlib
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from dspy._vendor.lm15.types import AudioPart, DocumentPart, ImagePart, TextPart, VideoPart
from dspy.lm15 import Message, Request
from hypothesis import given, settings
from hypothesis import strategies as st

import dspy_prod
from dspy_prod import Budget, RateLimit
from dspy_prod.pricing.bounds import input_bound
from dspy_prod.pricing.media import image_tokens, media_tokens
from dspy_prod.pricing.sizes import audio_seconds, image_size, pdf_pages, video_seconds
from dspy_prod.testing import Provider


def _text(raw: bytes) -> str:
    return b64encode(raw).decode()


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + b"\x08\x02\x00\x00\x00crc!"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00;"


def jpeg(width: int, height: int) -> bytes:
    """With a long comment and a thumbnail in its EXIF block before the frame header, as cameras write them."""
    thumbnail = b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x01\x00\x01" + bytes(43)
    exif = b"\xff\xe1" + struct.pack(">H", 62) + b"Exif\x00\x00" + thumbnail
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    frame = b"\xff\xff\xc2" + struct.pack(">HBHH", 17, 8, height, width) + bytes(10)
    return b"\xff\xd8" + exif + comment + frame + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x16\x00\x00\x00WEBPVP8X" + struct.pack("<I", 10) + b"\x10\x00\x00\x00" + size


def webp_lossless(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    return b"RIFF\x00\x00\x00\x00WEBPVP8L" + struct.pack("<IBI", 9, 0x2F, bits) + bytes(8)


def webp_lossy(width: int, height: int) -> bytes:
    return b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(7) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(8)


FORMATS: dict[str, Callable[[int, int], bytes]] = {
    made.__name__: made for made in (png, gif, jpeg, webp, webp_lossless, webp_lossy)
}


def sound(seconds: float, rate: int = 16_000) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * int(seconds * rate)))
    return target.getvalue()


def film(seconds: int, wide: bool = False) -> bytes:
    """An MP4 whose index stands behind its pictures."""
    if wide:
        header = b"\x01\x00\x00\x00" + struct.pack(">QQIQ", 0, 0, 1000, seconds * 1000) + bytes(80)
    else:
        header = b"\x00\x00\x00\x00" + struct.pack(">IIII", 0, 0, 1000, seconds * 1000) + bytes(80)
    mvhd = struct.pack(">I4s", len(header) + 8, b"mvhd") + header
    mdat = struct.pack(">I4sQ", 1, b"mdat", 50_016) + bytes(50_000)
    moov = struct.pack(">I4s", len(mvhd) + 8, b"moov") + mvhd
    return struct.pack(">I4s", 16, b"ftyp") + b"isom" + bytes(4) + mdat + moov


def pdf(pages: int, text: bytes = b"BT (hello) Tj ET", picture: int = 0) -> bytes:
    parts = [b"%PDF-1.4\n1 0 obj\n<< /Type /Pages /Count 9 >>\nendobj\n"]
    packed = zlib.compress(text)
    for _ in range(pages):
        parts.append(b"2 0 obj\n<< /Type /Page /Parent 1 0 R >>\nendobj\n")
        parts.append(b"3 0 obj\n<< /Length %d >>\nstream\n" % len(packed) + packed + b"\nendstream\nendobj\n")
    if picture:
        parts.append(b"4 0 obj\n<< /Subtype /Image /Length %d >>\nstream\n" % picture + bytes(picture))
        parts.append(b"\nendstream\nendobj\n")
    return b"".join(parts)


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (640, 480), (1023, 767), (4032, 3024)])
def test_the_size_of_a_picture_is_read_from_its_header(name: str, size: tuple[int, int]) -> None:
    """Without an imaging library, from the few bytes that tell it."""
    assert image_size(_text(FORMATS[name](*size))) == size


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(FORMATS)), st.integers(0, 60))
def test_broken_files_have_no_size_and_raise_nothing(noise: bytes, name: str, cut: int) -> None:
    """What cannot be read takes the most there is."""
    for raw in (noise, FORMATS[name](10, 10)[:cut], FORMATS[name](10, 10)[: cut // 2] + noise):
        text = _text(raw)
        size = image_size(text)
        assert size is None or min(size) > 0
        for read in (audio_seconds, video_seconds, pdf_pages):
            read(text)
    assert image_size("!" * 40) is None


def test_a_picture_without_an_extent_has_no_size() -> None:
    """JPEG may tell its height at the end (DNL); a crafted file may claim none."""
    assert image_size(_text(jpeg(100, 0))) is None
    assert image_size(_text(png(0, 10))) is None


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "low", "published", "bound"),
    [
        # OpenAI's own examples of tiles, and what was measured for one of 128 by 64 (which is not made larger).
        ("openai/gpt-4o", (1024, 1024), False, 765, 765),
        ("openai/gpt-4o", (2048, 4096), False, 1105, 1105),
        ("azure/gpt-4.1", (4096, 8192), True, 85, 85),
        ("openai/gpt-4o", (128, 64), False, 255, 85 + 6 * 170),
        ("openai/gpt-4o-mini", (1024, 1024), False, 25_501, 25_501),
        ("openai/gpt-4o-mini", None, True, 2833, 2833),
        ("openai/gpt-4o", None, False, 85 + 8 * 170, 85 + 8 * 170),
        ("openai/o1", (1024, 1024), False, 675, 675),
        ("openai/o3-2025-04-16", None, False, 1275, 1275),
        ("openai/gpt-5", (1024, 1024), False, 630, 1229),
        # Its examples of patches: 1024 of them times 1.62, 2.46, 1.72; never more than 1536.
        ("openai/gpt-4.1-mini", (1024, 1024), False, 1659, 1659),
        ("openai/gpt-4.1-nano", (1800, 2400), False, 3572, 3779),
        ("openai/o4-mini", (1024, 1024), False, 1762, 1762),
        ("openai/gpt-5-mini", (1024, 1024), False, 1659, 1659),
        # Measured, without the words around it.
        ("openai/gpt-5.5", (3840, 2160), False, 9792, 9792),
        ("openai/gpt-6-astra", (4032, 3024), False, 14_364, 14_364),
        ("anthropic/claude-haiku-4-5", (1092, 1092), False, 1590, 1590),
        ("anthropic/claude-sonnet-5-5", (1920, 1080), False, 2691, 2765),
        ("anthropic/claude-opus-4-8", (8000, 8000), False, 4784, 4784),
        ("bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0", None, False, 1600, 4784),
        ("gemini/gemini-2.5-flash", (384, 384), False, 258, 258),
        ("gemini/gemini-2.5-flash", (960, 540), False, 6 * 258, 6 * 258),  # the example of its crop unit
        ("vertex_ai/gemini-2.0-flash", (3072, 3072), False, 16 * 258, 16 * 258),
        ("gemini/gemini-3-pro", (4032, 3024), False, 1120, 2240),
        ("xai/grok-4", None, False, 1792, 1792),
    ],
)
def test_a_picture_is_bounded_by_its_providers_rule(
    model: str, size: tuple[int, int] | None, low: bool, published: int, bound: int
) -> None:
    """One small picture stood for the model's whole context: 3 to 12 USD held, and the next one refused by tpm."""
    assert published <= image_tokens(model, size, low=low) == bound


def test_the_dearest_rule_stands_for_an_unknown_model() -> None:
    """A deployment's name tells nothing; gpt-4o-mini's eight tiles are the most anybody takes for one picture."""
    assert image_tokens("azure/my-deployment", None) == 2833 + 8 * 5667
    for size in ((1, 1), (500, 500), (4000, 3000)):
        every = (image_tokens(name, size) for name in ("gpt-4o-mini", "claude-x", "gemini-x", "gpt-99", "grok-9"))
        assert image_tokens("acme/eye", size) >= max(every)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["gpt-4o", "gpt-4o-mini", "o4-mini", "gpt-5.2", "claude-opus-5", "grok-4"]), st.data())
def test_no_size_takes_more_than_the_most(model: str, data: st.DataObject) -> None:
    """The bound of a picture of unknown size covers all of them."""
    size = data.draw(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)))
    assert 1 <= image_tokens(model, size) <= image_tokens(model, None)


@pytest.mark.parametrize("model", ["openai/gpt-4o", "anthropic/claude-opus-4-8", "acme/eye"])
def test_a_pictures_size_counts_wherever_its_bytes_are(model: str) -> None:
    """In base64, as a data URL, with line breaks; a URL or a file's id tells nothing, and takes the most there is."""
    data = _text(png(640, 480))
    known, most = image_tokens(model, (640, 480)), image_tokens(model, None)
    assert media_tokens(ImagePart(data=data), model) == known
    assert media_tokens(ImagePart(url=f"data:image/png;base64,{data}"), model) == known
    assert media_tokens(ImagePart(data=data[:20] + "\n" + data[20:]), model) == known
    for part in (ImagePart(url="https://x/y.png"), ImagePart(file_id="f"), ImagePart(url="data:image/png,%89PNG")):
        assert media_tokens(part, model) == most


def test_a_second_picture_fits_into_a_minute() -> None:
    """With tpm=400,000 the second call with a small picture was refused: each held the whole context."""
    part = ImagePart(url="https://example.com/cat.png")
    for model, context in (("openai/gpt-4.1", 1_047_576), ("gemini/gemini-2.5-flash", 1_048_576), ("acme/eye", 10**6)):
        request = Request(model=model, messages=(Message.user([TextPart("what is it?"), part]),))
        bound = input_bound(request, max_input_tokens=context)
        assert bound is not None
        assert 2 * bound < (RateLimit(tpm=400_000).tpm or 0)
        inner = Request(model=model, messages=(Message.user("go"), Message.tool({"id": [part]})))
        assert 2 * (input_bound(inner, max_input_tokens=context) or context) < 400_000


@pytest.mark.parametrize("model", ["openai/gpt-4.1", "openai/gpt-4o-mini"])
def test_calls_with_pictures_pass_a_limit_and_a_budget_as_plain_ones_do(model: str) -> None:
    """Two in a row over HTTP, each with a picture by address and one inside; held is what two pictures take."""
    content = [
        {"type": "text", "text": "which is larger?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_text(png(64, 64))}"}},
    ]
    messages = [{"role": "user", "content": content}]
    with Provider() as provider:
        settings: dict[str, Any] = {"api_base": provider.url, "api_key": "k", "max_tokens": 50, "cache": False}
        plain = dspy.LM(model, **settings)
        lm = dspy_prod.LM(
            model, **settings, store="memory://pictures", namespace=model[7:], limit=RateLimit(tpm=400_000),
            budget=Budget(usd=0.05, name="pictures"),
        )  # fmt: skip
        for _ in range(2):
            assert lm(messages=messages) == plain(messages=messages)
        most = lm.preview(messages=messages).bound_usd
    assert most is not None
    assert 0 < most < 0.025


# -- sound and film ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 10, 61.5])
def test_a_recording_is_bounded_by_its_length(seconds: float) -> None:
    """Gemini counts 32 tokens a second, nobody more; the header tells how many bytes a second has."""
    raw = sound(seconds)
    found = audio_seconds(_text(raw))
    assert found is not None
    assert seconds <= found < seconds + 0.1
    bound = media_tokens(AudioPart(data=_text(raw)), "gemini/gemini-2.5-flash")
    assert bound is not None
    assert seconds * 32 <= bound <= seconds * 32 + 64


def test_an_mp3_is_as_long_as_its_lowest_bit_rate_makes_it() -> None:
    """8 kbit/s, which no encoder goes below; other formats by their bytes."""
    assert audio_seconds(_text(b"ID3\x04" + bytes(79_996))) == 80
    assert audio_seconds(_text(b"\xff\xfb\x90\x00" + bytes(996))) == 1
    assert media_tokens(AudioPart(data=_text(b"OggS" + bytes(996)), media_type="audio/ogg"), "openai/gpt-audio") == 1000
    packed = bytearray(sound(1))
    packed[20] = 2  # ADPCM: its bytes do not tell its length
    assert audio_seconds(_text(bytes(packed))) is None


@pytest.mark.parametrize("wide", [False, True])
def test_a_film_is_bounded_by_its_length(wide: bool) -> None:
    """About 300 tokens a second at Gemini; elsewhere nothing is published, and the context bounds it."""
    part = VideoPart(data=_text(film(20, wide)))
    assert video_seconds(_text(film(20, wide))) == 20
    assert media_tokens(part, "gemini/gemini-2.5-flash") == 21 * 300
    assert media_tokens(part, "acme/eye") is None
    assert media_tokens(VideoPart(data=_text(film(0))), "gemini/gemini-2.5-flash") is None


# -- documents --------------------------------------------------------------------------------------------------------


def test_a_pdf_is_bounded_by_its_pages_and_its_text() -> None:
    """A page is a picture and up to 3,000 tokens of text; a page denser than that is bounded by its bytes."""
    assert pdf_pages(_text(pdf(7))) is not None
    part, model = DocumentPart(data=_text(pdf(7, picture=500_000))), "anthropic/claude-haiku-4-5"
    assert media_tokens(part, model) == 7 * (4784 + 3000)
    dense = random.Random(1).randbytes(40_000)
    bound = media_tokens(DocumentPart(data=_text(pdf(1, dense))), model)
    assert bound is not None
    assert bound > 4784 + 3000


@pytest.mark.parametrize("raw", [b"%PDF-1.7 /ObjStm /Type /Page", b"%PDF-1.7 /Encrypt /Type /Page", b"%PDF-1.4", b"PK"])
def test_a_document_whose_pages_are_hidden_has_no_bound(raw: bytes) -> None:
    """Packed objects may hold any number of them."""
    assert media_tokens(DocumentPart(data=_text(raw)), "anthropic/claude-haiku-4-5") is None


def test_a_text_file_has_no_more_tokens_than_bytes() -> None:
    """As any other text."""
    assert media_tokens(DocumentPart(data=_text(b"x" * 999), media_type="text/plain"), "openai/gpt-4o") == 999


def test_what_a_crafted_pdf_says_of_its_streams_hides_no_text() -> None:
    """A picture's length that reached to the end of the file took all the text behind it out of the bound."""
    head = b"%PDF-1.4\n1 0 obj\n<< /Type /Page >>\nendobj\n2 0 obj\n<< /Subtype /Image /Length "
    text = b"3 0 obj\n<< /Length 90000 >>\nstream\n" + b"x" * 90_000 + b"\nendstream\nendobj\n"
    picture = b" >>\nstream\n" + bytes(1_000) + b"\nendstream\nendobj\n"
    honest = head + b"1000" + picture + text
    assert pdf_pages(_text(honest)) == (1, len(honest) - 1_000)
    for lie in (b"999999999", b"90000", b"9" * 5_000):
        crafted = head + lie + picture + text
        assert pdf_pages(_text(crafted)) == (1, len(crafted))


@pytest.mark.parametrize(
    "piece", [b"obj ", b"stream\n", b"obj stream\n", b"obj /Image /Length 5 stream\n", b"/Length 1 "]
)
def test_a_crafted_pdf_is_looked_through_once(piece: bytes) -> None:
    """Two megabytes of "obj" held the whole process for a quarter of a minute: two thousand bytes after each."""
    data = _text(b"%PDF-1.4 /Type /Page " + piece * (2_000_000 // len(piece)) + b" stream\n")
    began = time.process_time()
    assert pdf_pages(data) is not None
    assert time.process_time() - began < 5
