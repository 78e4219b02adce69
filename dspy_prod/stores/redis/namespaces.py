"""Which namespaces a server has, found out without making one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from dspy_prod.stores.redis.connection import ANSWER, CONNECT, UNTOLD, Connection

if TYPE_CHECKING:
    import redis

PATIENCE: Final = 1.0
"""Seconds for which a node's names are looked for: it may hold millions of other keys."""
_BEGIN, _END = "{dspy_prod:", "}:meta"


def has_namespace(url: str, namespace: str) -> bool:
    """Whether a store of that namespace has been opened there before.

    Raises:
        StoreUnavailableError: the server cannot be reached, or its user may not look at this namespace.
    """
    with closing(Connection(url, namespace, most=1)) as connection:
        return bool(connection.read([("EXISTS", connection.key("meta"))])[0])


def namespaces(url: str) -> list[str]:
    """The names on a server, or on all primaries of its cluster, sorted.

    Those that are found soon: none where the user may not look for them, and of a node that fails.
    """
    import redis

    found: set[str] = set()
    for node in _nodes(url):
        try:
            with _client(url, node) as client:
                found.update(_names(client))
        except (redis.RedisError, OSError):
            continue
    return sorted(found)


@contextmanager
def _client(url: str, node: tuple[str, int] | None = None) -> Iterator[redis.Redis]:
    """Of the URL's place, or of another node that is reached in the same way."""
    import redis

    pool = redis.ConnectionPool.from_url(url, socket_connect_timeout=CONNECT, socket_timeout=ANSWER)
    if node is not None:
        if node[0] not in UNTOLD:
            pool.connection_kwargs["host"] = node[0]
        pool.connection_kwargs["port"] = node[1]
    try:
        yield redis.Redis(connection_pool=pool)
    finally:
        pool.disconnect()


def _nodes(url: str) -> list[tuple[str, int] | None]:
    """Where the primaries of a cluster are; None is the place that the URL names."""
    import redis

    try:
        with _client(url) as client:
            client.set_response_callback("CLUSTER SLOTS", lambda told, **_: told)  # as every version of redis-py has it
            slots: Any = client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
    except (redis.RedisError, OSError):  # it is none, or the user may not ask
        return [None]
    return list({((primary[0] or b"").decode(), primary[1]): None for _, _, primary, *_ in slots})


def _names(client: redis.Redis) -> Iterator[str]:
    cursor, until = 0, time.monotonic() + PATIENCE
    while True:
        told: Any = client.scan(cursor, match=f"{_BEGIN}*{_END}", count=5_000)
        cursor, keys = told
        for key in keys:
            with suppress(UnicodeDecodeError):  # else it is no key of ours
                yield unquote(key.decode()[len(_BEGIN) : -len(_END)], errors="surrogatepass")
        if not cursor or time.monotonic() > until:
            return
