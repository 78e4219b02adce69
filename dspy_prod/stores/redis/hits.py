"""The records of cached answers: many in one value, for a row of its own would cost more than the answer.

A page is `[[what some have in common, [[what is its own], ...]], ...]`. Those of a small commit stay loose until there
are enough for a page, which the server then makes of their texts as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson

from dspy_prod.records import CallRecord
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.redis.bodies import SELECTIVE, body_of, fitting, matches, record_of

PAGE: Final = 256
"""Hits of a page at most."""
LEAST: Final = 64
"""Hits that are worth a page; fewer are loose, for every question has to read those."""
SPREAD: Final = 3_600.0
"""Seconds that lie between the first and the last hit of a page at most, as in `ledger.lua`."""

_OWN: Final = ("id", "call_id", "started_at", "saved_nano", "latency", "waited")
_USUAL: Final = (None, None, None, None, 0.0, 0.0)


class Found(NamedTuple):
    """A record that was found, as it is sorted; it is made once it is known to be wanted.

    Attributes:
        each: what a hit has of its own, in the order of `_OWN`.
    """

    started_at: float
    id: str
    fields: Mapping[str, Any]
    each: Sequence[Any] = ()

    def record(self) -> CallRecord | None:
        """The record; None where it is damaged."""
        return record_of({**self.fields, **dict(zip(_OWN, self.each, strict=False))} if self.each else self.fields)


class Loose(NamedTuple):
    """A hit by itself: what is its own, and what it has in common with others, as JSON."""

    at: float
    id: str
    each: bytes
    template: bytes

    @classmethod
    def of(cls, record: CallRecord) -> Loose:
        """That of a record."""
        each = [getattr(record, name) for name in _OWN]
        while len(each) > 3 and each[-1] == _USUAL[len(each) - 1]:
            each.pop()
        return cls(record.started_at, record.id, orjson.dumps(each), template_of(record))


def template_of(like: CallRecord) -> bytes:
    """What hits have in common."""
    fields = orjson.loads(body_of(like))
    return orjson.dumps({name: value for name, value in fields.items() if name not in _OWN})


def page_of(hits: Iterable[Loose]) -> bytes:
    """A page of some hits."""
    groups: dict[bytes, list[bytes]] = {}
    for hit in hits:
        groups.setdefault(hit.template, []).append(hit.each)
    return b"[%s]" % b",".join([b"[%s,[%s]]" % (template, b",".join(own)) for template, own in groups.items()])


def pages_of(hits: Sequence[Loose]) -> list[bytes]:
    """Hits as pages."""
    ordered = sorted(hits, key=lambda hit: hit.at)
    return [page_of(ordered[start:stop]) for start, stop in cuts([hit.at for hit in ordered])]


def pages_of_served(served: Served) -> list[bytes]:
    """Cached answers that were taken together, as pages."""
    template = orjson.Fragment(template_of(fitting(served.like)))
    rows = sorted(zip(served.times, served.ids, served.call_ids, served.saved, strict=True))
    own = [(id, call_id, at, saved) for at, id, call_id, saved in rows]
    return [orjson.dumps([[template, own[start:stop]]]) for start, stop in cuts([row[0] for row in rows])]


def cuts(times: Sequence[float]) -> list[tuple[int, int]]:
    """Where ordered times are cut so that no page is too long or too large."""
    found, start = [], 0
    for index, at in enumerate(times):
        if index - start >= PAGE or at - times[start] > SPREAD:
            found.append((start, index))
            start = index
    return [*found, (start, len(times))] if times else []


def found_loose(
    values: Iterable[bytes], wanted: Sequence[tuple[str, str]], since: float | None, until: float | None
) -> list[Found]:
    """The loose hits that match."""
    found: list[Found] = []
    for value in values:
        each, _, template = value.partition(b"\n")
        found += found_in(b"|[[%s,[%s]]]" % (template, each), None, wanted, since, until)
    return found


def found_in(
    body: bytes | None,
    gone: bytes | None,
    wanted: Sequence[tuple[str, str]],
    since: float | None,
    until: float | None,
) -> list[Found]:
    """The hits of a page that match; none of one that is gone or damaged."""
    try:
        groups = orjson.loads((body or b"").partition(b"|")[2] or b"[]")
        hidden = set(orjson.loads(b"[%s]" % gone)) if gone else ()
        own = [(_OWN.index(name), name, value) for name, value in wanted if name in _OWN]
        common = [(name, value) for name, value in wanted if name not in _OWN]
        texts = [(name, value) for name, value in common if name in SELECTIVE]
        others = [(name, value) for name, value in common if name not in SELECTIVE]
        name, text = texts[0] if texts else ("", None)
        found: list[Found] = []
        for template, rows in groups:
            if template.get(name) != text or not matches(template, texts[1:]) or not matches(template, others):
                continue
            for each in rows:
                at = each[2]
                if (since is not None and at < since) or (until is not None and at >= until) or each[0] in hidden:
                    continue
                if own and not all(
                    matches({name: each[place] if place < len(each) else _USUAL[place]}, [(name, value)])
                    for place, name, value in own
                ):
                    continue
                found.append(Found(at, each[0], template, each))
        return found
    except (ValueError, TypeError, LookupError, AttributeError):
        return []
