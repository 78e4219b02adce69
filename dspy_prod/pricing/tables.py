"""An entry of the model metadata as integers: rates by token dimension, service tier and length of the prompt.

Atto-USD (`1e-18` USD) per token, fine enough for every published price. Where an entry leaves a rate open, the plain
one of that tier and band stands in, as in `dspy/clients/costs.py`, but never below the dimension's own: sound at the
flex tier costs as much more than text there as it does elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

ATTO: Final = 10**18

_INPUT, _OUTPUT = "input_cost_per_token", "output_cost_per_token"
DIMENSIONS: Final = (
    # Metadata key of each dimension, and the plain key whose rate stands in when it has none of its own.
    (_INPUT, None),
    (_OUTPUT, None),
    ("output_cost_per_reasoning_token", _OUTPUT),
    ("cache_read_input_token_cost", _INPUT),
    ("cache_creation_input_token_cost", _INPUT),
    ("input_cost_per_audio_token", _INPUT),
    ("output_cost_per_audio_token", _OUTPUT),
)
_LONG_WRITE = "cache_creation_input_token_cost_above_1hr"
_SEEN, _HEARD = "input_cost_per_image_token", ("input_cost_per_audio_token", "input_cost_per_video_token")
_THRESHOLD = re.compile(r"_above_(\d+)(k?)_tokens")
_TIER = re.compile(r"(?:in|out)put_cost_per_token(?:_above_\d+k?_tokens)?(_[a-z]+)")
_UPLIFT = re.compile(r"regional_(?:processing|endpoint)_uplift_multiplier(?:_([a-z]+))?")

Row = tuple[int | None, ...]  # by dimension; None where no rate is known


class Band(NamedTuple):
    """The dearest rates up to some length of the prompt: of text, pictures and any media in the input, and output."""

    text: int
    image: int
    media: int
    output: int


def atto(value: object) -> int | None:
    """A price in atto-USD; None for anything that is not a price."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not math.isfinite(value) or value < 0:
        return None
    return round(Decimal(str(value)) * ATTO)


def limit(info: Mapping[str, Any], *names: str) -> int | None:
    """The first of these limits that is a positive whole number."""
    return next((found for name in names if (found := (atto(info.get(name)) or 0) // ATTO)), None)


def by_length(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry with its `tiered_pricing` written as bands (`..._above_32000_tokens`), unchanged without.

    All tokens of a request cost what the band of its whole input says (Alibaba Model Studio, "Billing").
    """
    steps = info.get("tiered_pricing")
    if not isinstance(steps, list):
        return info
    steps = [step for step in steps if isinstance(step, dict) and len(step.get("range") or ()) == 2]
    steps = sorted((step for step in steps if atto(step.get(_INPUT)) is not None), key=lambda step: step["range"][0])
    found = {key: value for key, value in info.items() if not (_THRESHOLD.search(key) and "cost" in key)}
    for number, step in enumerate(steps):
        suffix = f"_above_{int(step['range'][0])}_tokens" if number else ""
        rates = {_OUTPUT: info.get(_OUTPUT), **step}
        found.update((key + suffix, value) for key, value in rates.items() if "cost" in key and value is not None)
    return found


def thresholds(info: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(tokens, suffix of its keys) of every band above the first, shortest first."""
    found = {(int(n) * (1000 if k else 1), f"_above_{n}{k}_tokens") for key in info for n, k in _THRESHOLD.findall(key)}
    return sorted(found)


def tiers(info: Mapping[str, Any]) -> set[str]:
    """Suffixes of all service tiers that the entry has rates for, the standard one, "", included."""
    return {"", *(match[1] for key in info if (match := _TIER.fullmatch(key)))}


def row(info: Mapping[str, Any], band: str, tier: str, long_write: bool) -> Row:
    """The rates of one tier and band; `long_write`: of cache entries that last an hour."""
    found = [_rate(info, key, stand_in, band, tier) for key, stand_in in DIMENSIONS]
    if long_write:
        found[4] = _rate(info, _LONG_WRITE, _INPUT, band, tier) if atto(info.get(_LONG_WRITE)) is not None else None
    return tuple(found)


def _rate(info: Mapping[str, Any], key: str, stand_in: str | None, band: str, tier: str) -> int | None:
    own = atto(info.get(key + band + tier))
    if own is None and band and _INPUT + band not in info and _OUTPUT + band not in info:
        return _rate(info, key, stand_in, "", tier)  # a band of sound alone changes nothing else
    if own is not None or stand_in is None:
        return own
    plain = atto(info.get(stand_in + band + tier))
    if plain is None:
        return None
    most = plain
    for there in {("", ""), (band, ""), ("", tier)}:
        rate, usual = (atto(info.get(name + "".join(there))) for name in (key, stand_in))
        if rate is not None:
            most = max(most, -(-rate * plain // usual) if usual else rate)
    return most


def dearest(info: Mapping[str, Any], bands: Iterable[str], which: Iterable[str], least_write: int = 0) -> list[Band]:
    """Per band, the dearest rates of that band and those below it, over these tiers and regions.

    Args:
        least_write: a cache write costs at least so many hundredths of the plain rate.
    """
    result, text, image, media, output = [], 0, 0, 0, 0
    more = max([1000, *uplifts(info).values()])
    for band in bands:
        for tier in which:
            for rates in (row(info, band, tier, long) for long in (False, True)):
                plain = rates[0] or 0
                write = max(rates[4] or 0, plain * least_write // 100)
                text = max(text, plain, rates[3] or 0, write, atto(info.get("input_cost_per_character")) or 0)
                output = max(output, rates[1] or 0, rates[2] or 0, rates[6] or 0)
            image = max(image, text, _rate(info, _SEEN, _INPUT, band, tier) or 0)
            media = max(media, image, *(_rate(info, key, _INPUT, band, tier) or 0 for key in _HEARD))
        result.append(Band(*(-(-rate * more // 1000) for rate in (text, image, media, output))))
    return result


def uplifts(info: Mapping[str, Any]) -> dict[str, int]:
    """By how much the regions where it is served are dearer, in thousandths; "regional": any but the global one."""
    found: dict[str, Any] = {}
    for key, value in info.items():
        if match := _UPLIFT.fullmatch(key):
            found[match[1] or "regional"] = value
        elif key == "provider_specific_entry" and isinstance(value, dict):  # Anthropic's `inference_geo`
            found.update((name, factor) for name, factor in value.items() if name != "fast")
    return {name: max(1000, (atto(factor) or 0) * 1000 // ATTO) for name, factor in found.items()}
