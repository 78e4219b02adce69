"""One Redis or Valkey as a store uses it: a bounded pool, bounded waits, keys of one namespace in one slot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.names import without_password

if TYPE_CHECKING:
    import redis

CONNECT: Final = 1.0
"""Seconds for which a connection is waited for."""
ANSWER: Final = 1.0
"""Seconds for which an answer is waited for."""
POOL: Final = 8
"""Connections at most."""
HOPS: Final = 3
"""How often a command is sent on to another node of a cluster."""
UNTOLD: Final = ("", "?")
"""What a node of a cluster gives as a host where it tells none: that by which it is reached holds for all of them."""


_OBJECTS: Final = frozenset({
    "retry", "retry_on_error", "connection_class", "connection_pool", "parser_class", "encoder_class", "queue_class",
    "credential_provider", "redis_connect_func", "class_",
})  # fmt: skip
"""What redis-py takes as objects: a text in their place fails later, or does away with what the store says."""


def check(url: str) -> None:
    """See to it that redis-py is there and can use a URL. Nothing is connected to.

    Raises:
        ImportError: it is not installed.
        ValueError: it cannot.
    """
    import redis
    from redis.connection import parse_url

    try:
        parse_url(url)  # type: ignore[no-untyped-call]
        objects = _OBJECTS & parse_qs(urlsplit(url).query).keys()
        if objects:
            raise TypeError(f"argument {min(objects)!r}")
        redis.BlockingConnectionPool.from_url(url, max_connections=1).make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, redis.RedisError) as error:  # its message may show what is secret
        option = re.search(r"argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
        what = "" if option is None else f"{option[1]!r} is no option that it can have; "
        raise ValueError(f"{what}see redis-py's redis.from_url for what it may hold") from None


_REACH: Final = "check that the server runs and can be reached from here, and what it logs"
_REMEDIES: Final = {
    "OOM": "its memory is full; give it more (maxmemory), or fewer records (?max_records=)",
    "READONLY": "it is a replica; give the address of the primary",
    "MISCONF": "it cannot write its data to disk; see what it logs",
    "WRONGPASS": "user or password is wrong",
    "NOAUTH": "it wants a password: redis://:password@host",
    "Authentication": "user or password is wrong, or missing",
    "NOPERM": "its user may not do this; see the rights in the guide on fleets",
    "NoPermission": "its user may not do this; see the rights in the guide on fleets",
    "CROSSSLOT": "it is a cluster, reached through a proxy that does not know of hash tags",
    "Moved": "it is one of a Redis Cluster, whose nodes do not agree which has this namespace; ask CLUSTER NODES",
    "ClusterDown": "it is one of a Redis Cluster that does not work at present; ask CLUSTER INFO",
    "Ask": "it is one of a Redis Cluster that is handing this namespace to another one; that passes",
    "TryAgain": "it is one of a Redis Cluster that is handing this namespace to another one; that passes",
}
"""By how an error is called, or the word it begins with."""
_SAID: Final = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted, or of another host: ?ssl_ca_certs=/path/of/ca.pem",
    "SELECT is not allowed in cluster mode": "it is one of a Redis Cluster, which has no database but 0",
    "DB index is out of range": "it has no database of that number; see its setting 'databases'",
    "ACL failure in script": "its user may not do this; see the rights in the guide on fleets",
}
"""By what it says somewhere, which is not shown: it may hold names and keys."""


class Connection:
    """Commands to one server, for one namespace. Thread-safe.

    A node of a cluster says which other one has the namespace; its commands go there until that one fails, and then to
    the URL's again, which may be a name that stands for several nodes.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        namespace: whose keys they are.
        most: connections at most.
        retries: how often commands are sent again when a connection breaks: none where they may not be done twice.
    """

    def __init__(self, url: str, namespace: str, *, most: int = POOL, retries: int = 1) -> None:
        self.shown = without_password(url)
        self.namespace = namespace
        self._url = url
        self._most = most
        self._retries = retries
        self._tag = "{dspy_prod:" + quote(namespace, safe="", errors="surrogatepass") + "}"
        self._client: redis.Redis | None = None
        self._node: tuple[str, int] | None = None  # of a cluster, which has this namespace
        self._gone: redis.Redis | None = None  # used before, perhaps still by other threads

    def key(self, *parts: str) -> str:
        """A key of this namespace: all of them are in one slot of a cluster.

        The parts are quoted, so that no two lots of parts make the same key.
        """
        return ":".join([self._tag, *(quote(part, safe="", errors="surrogatepass") for part in parts)])

    def read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies of some commands, in one round trip.

        Raises:
            StoreUnavailableError: the server cannot be reached, or does not answer in time.
        """
        hops = 0
        while True:
            try:
                pipeline = self.client().pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                return list(pipeline.execute())
            except self.failures() as error:
                hops += 1
                if hops > HOPS or not self.follows(error):
                    raise self.unavailable(error) from error

    def follows(self, error: BaseException) -> bool:
        """Whether a node has sent us to another one, to which what was refused can be sent now.

        Where the other one fails, the next use begins at the URL.
        """
        import redis

        if isinstance(error, redis.exceptions.MovedError) and not self._url.startswith("unix:"):
            client = self._client
            known = {} if client is None else client.connection_pool.connection_kwargs
            self._go(client, (known.get("host", "") if error.host in UNTOLD else error.host, error.port))
            return True
        if self._node is not None and isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
            self._go(self._client, None)
        return False

    def _go(self, client: redis.Redis | None, node: tuple[str, int] | None) -> None:
        """Use another client from now on. Other threads may be using this one: it is closed when the next one goes."""
        self._client, self._node = None, node
        if client is not None:
            gone, self._gone = self._gone, client
            _closed(gone)

    def client(self) -> redis.Redis:
        """The client of redis-py, made when first needed."""
        client, node = self._client, self._node
        if client is None:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            retry = Retry(NoBackoff(), self._retries, supported_errors=(redis.ConnectionError,))
            pool = redis.BlockingConnectionPool.from_url(
                self._url, max_connections=self._most, timeout=ANSWER, socket_connect_timeout=CONNECT,
                socket_timeout=ANSWER, health_check_interval=30, retry=retry,
            )  # fmt: skip
            if node is not None:
                pool.connection_kwargs["host"], pool.connection_kwargs["port"] = node
            client = self._client = redis.Redis(connection_pool=pool)
        return client

    @staticmethod
    def failures() -> tuple[type[BaseException], ...]:
        """What redis-py raises where the server cannot be used."""
        import redis

        return redis.RedisError, OSError

    def unavailable(self, error: BaseException) -> StoreUnavailableError:
        """The error that says so, without a password."""
        told = str(error).partition(" ")[0]
        why = f"{type(error).__name__} {told}" if told.isupper() and told.isalpha() else type(error).__name__
        signs = [text for sign, text in _REMEDIES.items() if sign in why]
        signs += [text for sign, text in _SAID.items() if sign in str(error)]
        remedy = next(iter(signs), _REACH)
        return StoreUnavailableError(f"The store {self.shown} cannot be used ({why}): {remedy}")

    def leave(self) -> None:
        """`close`: nothing of it hinders a fork."""
        self.close()

    def close(self) -> None:
        """Close the connections; the next use opens new ones."""
        self._go(self._client, None)
        gone, self._gone = self._gone, None
        _closed(gone)


def _closed(client: redis.Redis | None) -> None:
    if client is not None:
        client.close()
        client.connection_pool.disconnect()
