"""What one public LM call tells the engine beneath it: arguments outside the canonical request, and the cache key.

A `ContextVar` is right here: between `LM.__call__` and the engine everything happens in one thread or task.
"""

from __future__ import annotations

import contextvars
from typing import Any

import orjson
from dspy._vendor.lm15.serde import request_to_dict
from dspy.lm15 import Request

from dspy_prod.context import CallContext
from dspy_prod.records import CallRecord


class Scope:
    """One public call; `n > 1` makes several engine calls within it.

    Attributes:
        base: exact JSON of prompt, messages and arguments as the caller gave them, or None when they are not JSON.
        index: candidates already asked for.
        missed: the memory tier of the cache was asked for `base` already, in vain.
        records: everything the call did.
    """

    __slots__ = ("base", "context", "extras", "index", "missed", "records", "rollout_id", "use_cache")

    def __init__(
        self, context: CallContext, base: bytes | None, extras: dict[str, Any] | None, rollout_id: Any, use_cache: bool
    ) -> None:
        self.context = context
        self.base = base
        self.extras = extras
        self.rollout_id = rollout_id
        self.use_cache = use_cache
        self.index = 0
        self.missed = False
        self.records: list[CallRecord] = []


SCOPE: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("dspy_prod_scope", default=None)


def raw_key(identity: bytes, prompt: Any, messages: Any, kwargs: dict[str, Any], tenant: str | None) -> bytes | None:
    """A key that is exact for what the caller passed, or None when that is not plain JSON."""
    try:
        return identity + orjson.dumps([tenant, prompt, messages, kwargs], option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return None


def request_key(
    identity: bytes, request: Request, extras: dict[str, Any] | None, rollout_id: Any, tenant: str | None
) -> bytes | None:
    """The key of a canonical request and everything beside it, or None when it cannot be written as JSON."""
    try:
        return identity + orjson.dumps(
            ["request", tenant, request_to_dict(request), extras, rollout_id],
            option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
        )
    except TypeError:
        return None


def candidate_key(key: bytes, index: int) -> bytes:
    """The key of one of `n` candidates."""
    return key if index == 0 else key + b"#%d" % index
