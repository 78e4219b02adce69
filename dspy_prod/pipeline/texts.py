"""What a call for vectors asks about: its texts, a key for each, and what was found so far."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from dspy_prod.context.current import CallContext
from dspy_prod.context.scoring import is_raising
from dspy_prod.pipeline.call import Call, record_hit
from dspy_prod.pipeline.outlasting import flight_of
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.scope import Scope
from dspy_prod.pipeline.upstream.vectors import texts_asked
from dspy_prod.policies.entries import LOCAL
from dspy_prod.policies.purse import Purse
from dspy_prod.policies.vectors import VectorCache
from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import moment_on


@dataclass(slots=True, eq=False)
class Asked:
    """One call for the vectors of some texts.

    Attributes:
        keys: of each text; where nothing is cached, its place.
        size: texts of a batch at most.
        cache: where vectors are kept; None: nowhere.
        joins: texts that others ask about just now are waited for.
        rows: what was found so far, by key.
        latest: its latest batch, for what is told of a refusal.
        scored: it is part of an evaluation, or of a compile.
    """

    pipeline: Pipeline
    texts: list[str]
    keys: list[Hashable]
    size: int
    context: CallContext
    cache: VectorCache | None
    joins: bool
    purse: Purse = field(default_factory=Purse)
    records: list[CallRecord] = field(default_factory=list)
    rows: dict[Hashable, bytes] = field(default_factory=dict)
    latest: Call | None = None
    scored: bool = field(default_factory=is_raising)

    @property
    def deadline(self) -> float:
        """Time of the pipeline's monotonic clock by which it must end, `inf` without one."""
        return moment_on(self.pipeline.clock, self.context.deadline)

    def flight(self, key: Hashable) -> Hashable:
        """What those share that ask about a text at the same time."""
        return flight_of(key, self.context.guards, self.scored)

    def look(self) -> None:
        """Take what is cached. It reads the store, a text at a time."""
        cache = self.cache
        if cache is None or self.context.cache != "use":
            return
        costs: list[int | None] = []
        for key in dict.fromkeys(self.keys):
            assert isinstance(key, bytes)
            entry = cache.vector(key)
            if entry is not None:
                self.rows[key] = entry.row
                costs.append(entry.list_nano)
        if costs:
            record_hit(self.pipeline, self.context, self.records, sum_known(costs))

    def answer(self) -> list[bytes]:
        """The vector of each text, in order."""
        return [self.rows[key] for key in self.keys]

    def call(self, texts: list[str]) -> Call:
        """The call for one batch."""
        request = texts_asked(self.pipeline.primary.model, texts)
        scope = Scope(self.context, None, None, None, False)
        scope.asked = request
        call = self.latest = Call(self.pipeline, request, self.context, None, scope, False, self.records)
        if self.pipeline.capped:
            call.purse = self.purse
        return call


def keys_of(identity: bytes, tenant: str | None, texts: list[str]) -> list[Hashable]:
    """The cache keys of texts: model, address and settings, tenant and text, as a digest.

    Args:
        identity: see `scope.identity_of`; one that holds in this process alone is marked so.
    """
    begin = LOCAL if identity.startswith(LOCAL) else b""
    whose = b"\x00" if tenant is None else b"\x01" + tenant.encode("utf-8", "surrogatepass")
    common = hashlib.sha256(_KEY + hashlib.sha256(identity).digest() + hashlib.sha256(whose).digest())
    keys: list[Hashable] = []
    for text in texts:
        digest = common.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(begin + digest.digest())
    return keys


_KEY: Final = b"dspy_prod:vectors:1:"
"""Part of every key; raised when the meaning of a key or value changes."""


def sum_known(costs: list[int | None]) -> int | None:
    """The sum of some costs; None where one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None
