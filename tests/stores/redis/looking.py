"""What the tests see at the server itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from dspy_prod.stores.redis.connection import Connection


def keys_of(connection: Connection) -> dict[str, int]:
    """The keys of a namespace, and how many seconds each has to live; -1: it has no end."""
    client = connection.client()
    begin = connection.key("").removesuffix(":")
    keys = [key.decode() for key in client.scan_iter(match=f"{begin}:*", count=10_000)]
    return {key.removeprefix(f"{begin}:"): client.ttl(key) for key in keys}


def commands(connection: Connection, work: Callable[[], Any]) -> Counter[str]:
    """How often the server did each command meanwhile, those of scripts among them."""
    before = _done(connection)
    work()
    return _done(connection) - before


def _done(connection: Connection) -> Counter[str]:
    stats = connection.client().info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()})
