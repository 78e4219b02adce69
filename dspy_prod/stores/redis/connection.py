"""One Redis or Valkey as a store uses it: a bounded pool, bounded waits, keys of one namespace in one slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

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


class Connection:
    """Commands to one server, for one namespace. Thread-safe.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        namespace: whose keys they are.
        most: connections at most.
        retries: how often commands are sent again when a connection breaks: none where they may not be done twice.
    """

    def __init__(self, url: str, namespace: str, *, most: int = POOL, retries: int = 1) -> None:
        self.shown = without_password(url)
        self._url = url
        self._most = most
        self._retries = retries
        self._tag = "{dspy_prod:" + quote(namespace, safe="") + "}"
        self._client: redis.Redis | None = None

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
        client = self.client()
        try:
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute())
        except self.failures() as error:
            raise self.unavailable(error) from error

    def client(self) -> redis.Redis:
        """The client of redis-py, made when first needed."""
        if self._client is None:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            retry = Retry(NoBackoff(), self._retries, supported_errors=(redis.ConnectionError,))
            pool = redis.BlockingConnectionPool.from_url(
                self._url, max_connections=self._most, timeout=ANSWER, socket_connect_timeout=CONNECT,
                socket_timeout=ANSWER, health_check_interval=30, retry=retry,
            )  # fmt: skip
            self._client = redis.Redis(connection_pool=pool)
        return self._client

    @staticmethod
    def failures() -> tuple[type[BaseException], ...]:
        """What redis-py raises where the server cannot be used."""
        import redis

        return redis.RedisError, OSError

    def unavailable(self, error: BaseException) -> StoreUnavailableError:
        """The error that says so, without a password."""
        return StoreUnavailableError(f"The store {self.shown} cannot be used: {type(error).__name__}")

    def leave(self) -> None:
        """`close`: nothing of it hinders a fork."""
        self.close()

    def close(self) -> None:
        """Close the connections; the next use opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
            client.connection_pool.disconnect()
