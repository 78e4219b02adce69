"""Upper bounds on the tokens of pictures, recordings, films and documents, by the rules their providers publish.

OpenAI: 512-pixel tiles, or 32-pixel patches times a multiplier ("Images and vision, calculating costs"). Anthropic:
width * height / 750, or a token per 28-pixel patch ("Vision", "PDF support"). Gemini: 258 tokens per 768-pixel tile,
32 a second of sound, about 300 a second of film ("Understand and count tokens", "Media resolution"). xAI: 256 tokens
per 448-pixel tile. Where the size is not known, the most that one picture can take; where the model is not, the
dearest of all rules. A rule is an upper bound on what is billed, so it also covers what was measured to differ.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from dspy_prod.pricing.sizes import audio_seconds, byte_size, image_size, pdf_pages, video_seconds
from dspy_prod.runtime.patterns import Pattern

if TYPE_CHECKING:
    from dspy.lm15 import Request

MEDIA = frozenset(("image", "audio", "video", "document", "binary"))

PER_SECOND_OF_SOUND: Final = 32
"""Gemini's rate, the highest: OpenAI counts 10 in an input, 20 in an answer, Qwen 25, Mistral 12.5."""
PER_SECOND_OF_FILM: Final = 300
"""Gemini: 258 a second for a picture, 32 for its sound, some for time stamps."""
PER_PAGE: Final = 3_000
"""Tokens of the text of a PDF's page, at most as a rule (Anthropic: 1,500 to 3,000)."""
_FILMS = Pattern(r"gemini")

_Size = tuple[int, int]


class _Rule(Protocol):
    def tokens(self, size: _Size | None, low: bool) -> int:
        """The most a picture of this size takes; `low` is OpenAI's `detail="low"`."""


class _Tiles(NamedTuple):
    """OpenAI's older rule. The picture is made to fit 2048 pixels square, then its short side 768; 512-pixel tiles.

    Whether a smaller one is made larger depends on whom you read, so both are counted; never more than 2 by 4.
    """

    base: int
    tile: int

    def tokens(self, size: _Size | None, low: bool) -> int:
        if low:
            return self.base
        if size is None:
            return self.base + 8 * self.tile
        least, most = sorted(size)
        short, long = least * min(1.0, 2048 / most), min(most, 2048)
        shown = long * min(1.0, 768 / short)
        enlarged = min(2048.0, long * 768 / short)
        tiles = max(ceil(min(short, 768) / 512) * ceil(shown / 512), 2 * ceil(enlarged / 512))
        return self.base + tiles * self.tile


class _Patches(NamedTuple):
    """OpenAI's newer rule: 32-pixel patches, scaled down to `most`, each worth `percent` hundredths of a token."""

    most: int
    percent: int
    unbounded: bool = False  # pictures beyond `most` are not scaled down: it is the largest size accepted

    def tokens(self, size: _Size | None, low: bool) -> int:
        patches = self.most
        if size is not None:
            shown = ceil(size[0] / 32) * ceil(size[1] / 32)
            patches = shown if self.unbounded else min(shown, self.most)
        return -(-patches * self.percent // 100)


class _Claude:
    """Anthropic: scaled down to 1,568 pixels or 1,600 tokens, since Opus 4.7 to 2,576 pixels or 4,784 tokens."""

    def tokens(self, size: _Size | None, low: bool) -> int:
        if size is None:
            return 4_784
        width, height = size
        return min(4_784, max(ceil(width * height / 750), ceil(width / 28) * ceil(height / 28)))


class _Gemini:
    """Gemini to 2.5: 258 tokens up to 384 pixels, else per tile of 768 pixels or of the crop unit, short side / 1.5."""

    def tokens(self, size: _Size | None, low: bool) -> int:
        if size is None:
            return 48 * 258  # 16 times as long as high
        short, long = sorted(size)
        unit = min(768, max(1, short * 2 // 3))
        return 258 * max(1, ceil(short / unit) * ceil(long / unit) if long > 384 else 1)


class _Fixed(NamedTuple):
    """The same for every picture: the most that any takes."""

    most: int

    def tokens(self, size: _Size | None, low: bool) -> int:
        return self.most


_4O_MINI = _Tiles(2833, 5667)
_LATEST = _Patches(35_344, 120, unbounded=True)  # the largest side is 6,000 pixels
_RULES: tuple[tuple[str, tuple[_Rule, ...]], ...] = (
    # The first that is found in the model's name.
    (r"4o-mini", (_4O_MINI,)),
    (r"gpt-4\.1-mini", (_Patches(1536, 162),)),
    (r"gpt-4\.1-nano", (_Patches(1536, 246),)),
    (r"o4-mini|codex-mini", (_Patches(1536, 172),)),
    (r"gpt-5(\.\d+)?(-\w+)?-mini", (_Patches(2500, 162),)),
    (r"gpt-5(\.\d+)?(-\w+)?-nano", (_Patches(2500, 246),)),
    (r"gpt-5(\.[0-3])?(?![.\d])", (_Tiles(70, 140), _Patches(1536, 120))),
    (r"gpt-5\.\d", (_Patches(10_000, 120),)),
    (r"gpt-4", (_Tiles(85, 170),)),
    (r"\bo[13](?![.\d])", (_Tiles(75, 150),)),
    (r"computer-use", (_Tiles(65, 129),)),
    (r"gpt-.*(mini|nano)", (_Patches(10_000, 246),)),
    (r"gpt-", (_LATEST,)),
    (r"claude", (_Claude(),)),
    (r"gemini-[12]\b", (_Gemini(),)),
    (r"gemini-[3-9]", (_Fixed(2_240),)),
    (r"gemini", (_Gemini(), _Fixed(2_240))),
    (r"grok", (_Fixed(7 * 256),)),
)
_COMPILED = tuple((Pattern(pattern), rules) for pattern, rules in _RULES)
_EVERY = (*(rule for _, rules in _RULES for rule in rules), _Fixed(16_384))  # Qwen's largest


def _rules(model: str) -> tuple[_Rule, ...]:
    name = model.lower()
    return next((rules for pattern, rules in _COMPILED if pattern.search(name)), _EVERY)


def image_tokens(model: str, size: _Size | None, *, low: bool = False) -> int:
    """The most tokens that a model bills for one picture.

    Args:
        model: as given to the LM; a name that tells no family takes the dearest rule there is.
        size: (width, height) in pixels, None when unknown.
        low: whether the request asks for OpenAI's low detail.
    """
    return max(rule.tokens(size, low) for rule in _rules(model))


def _inline(part: Any) -> str | None:
    """The base64 text of a part that carries its content."""
    data: str | None = part.data if part.data is not None else part.url
    if data is not None and data[:5].lower() == "data:":
        head, _, data = data.partition(",")
        if not head.lower().endswith(";base64"):
            return None
    elif part.data is None:
        return None
    if data is None or not data.isascii():
        return None
    return "".join(data.split()) if any(blank in data for blank in " \n\r\t\v\f") else data


def media_tokens(part: Any, model: str) -> int | None:
    """The most tokens that one part with media takes; None when only the model's input limit bounds it."""
    kind, data = part.type, _inline(part)
    if kind == "image":
        return image_tokens(model, None if data is None else image_size(data), low=part.detail == "low")
    if data is None:
        return None
    if kind == "audio":
        seconds = audio_seconds(data)
        # Of no format that is known does a byte hold more than a token's worth of sound.
        return byte_size(data) if seconds is None else ceil(seconds + 1) * PER_SECOND_OF_SOUND
    if kind == "video":
        seconds = video_seconds(data) if _FILMS.search(model.lower()) else None
        return None if seconds is None else ceil(seconds + 1) * PER_SECOND_OF_FILM
    if kind == "document":
        return _document(data, part.media_type, model)
    return None


def _document(data: str, media_type: str, model: str) -> int | None:
    if media_type.startswith("text/"):
        return byte_size(data)
    found = pdf_pages(data) if media_type == "application/pdf" else None
    if found is None:
        return None
    pages, text = found
    return pages * image_tokens(model, None) + max(pages * PER_PAGE, 2 * text)  # the text is packed, mostly


class Census(NamedTuple):
    """What a request holds besides text.

    Attributes:
        images: pictures, a PDF included.
        others: whether there is sound, film, or what nobody knows.
    """

    images: int
    others: bool


NOTHING: Final = Census(0, False)


def census(request: Request) -> Census:
    """Count the media of a request: in messages, tool results and the system prompt."""
    images, others = 0, False
    groups: list[Any] = [message.parts for message in request.messages]
    if request.system is not None and type(request.system) is not str:
        groups.append(request.system)
    for parts in groups:
        for part in parts:
            kind = part.type
            if kind == "text":
                continue
            if kind == "image" or kind == "document":
                images += 1
            elif kind in MEDIA:
                others = True
            elif kind == "tool_result":
                groups.append(part.content)
    return Census(images, others) if images or others else NOTHING
