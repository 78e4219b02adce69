"""One MLflow store, reached within bounded time.

MLflow's own client waits up to two minutes a request and retries seven times, so a dead server would hold its caller
for many minutes. Those settings are environment variables of the whole process and not ours to change. Here every
question is asked on a worker thread for which the caller waits a few seconds; the number of such threads is bounded,
and a server that does not even accept a connection is noticed before one is started.
"""

from __future__ import annotations

import contextvars
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import lru_cache, partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.names import bare_url
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.errors import RegistryError, RegistryUnavailableError, UnknownVersionError
from dspy_prod.registry.names import Reference
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin

READ_TIMEOUT: Final = 5.0
"""Seconds to wait for an answer of a server; a database of this machine, which may first make its tables, gets more."""

WRITE_TIMEOUT: Final = 30.0
CONNECT_TIMEOUT: Final = 2.0
MOST_WAITING: Final = 8
"""Questions under way at once, those that nobody waits for any more included."""

TRIES: Final = 8
COLLISION_PAUSE: Final = 0.02
"""Seconds of the longest first pause after a collision; it doubles."""

PAGE: Final = 200

_COLLISIONS: Final = ("Model Version creation error", "Prompt creation error", "IntegrityError", "database is locked")

_log = logging.getLogger("dspy_prod")
T = TypeVar("T")


class AlreadyExistsError(RegistryError):
    """The prompt was made by somebody else meanwhile."""


class _CollisionError(RegistryUnavailableError):
    """Two wrote at once and the database let one of them win."""


class Server:
    """An MLflow store.

    Attributes:
        uri: where it is; may hold a password, see `place`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = unshown(uri)
        self._remote = uri.startswith(("http://", "https://"))

    @property
    def place(self) -> str:
        """The URI as it may be shown."""
        return bare_url(self.uri)

    def read(self, question: Callable[[Any], T]) -> T:
        """The answer of `question(client)`, an `MlflowClient`.

        Raises:
            UnknownVersionError: what was asked for does not exist.
            RegistryUnavailableError: no answer within a few seconds, or an error of the server.
        """
        return self._ask(question, READ_TIMEOUT if self._remote else WRITE_TIMEOUT)

    def write(self, question: Callable[[Any], T]) -> T:
        """As `read`, with more time; asked again when MLflow collided with another writer and wrote nothing."""
        for attempt in range(TRIES):
            try:
                return self._ask(question, WRITE_TIMEOUT)
            except _CollisionError:
                if attempt == TRIES - 1:
                    raise
                time.sleep(random.uniform(0, COLLISION_PAUSE * 2**attempt))
        raise AssertionError("unreachable")

    def prompt(self, reference: Reference) -> Any:
        """The MLflow prompt version that a reference means; raises as `read`."""
        name, alias, version = reference.name, reference.alias, reference.version
        if alias is not None:
            found = self.read(lambda client: client.get_prompt_version_by_alias(name, alias))
        else:
            found = self.read(lambda client: client.get_prompt_version(name, version))
        if found is None:
            raise UnknownVersionError(f"There is no {reference} (in MLflow at {self.place})")
        return found

    def versions(self, prompt: str) -> Iterator[Any]:
        """The versions of a prompt, newest first; none when there is no such prompt."""
        try:
            for page in self.pages(lambda token, client: client.search_prompt_versions(prompt, PAGE, token)):
                yield from sorted(page, key=lambda version: -int(version.version))
        except UnknownVersionError:
            return

    def pages(self, question: Callable[[str | None, Any], T]) -> Iterator[T]:
        """The answers of `question(token, client)` until one has no token for the next; raises as `read`."""
        token: str | None = None
        while True:
            page: Any = self.read(partial(question, token))
            yield page
            token = page.token
            if not token:
                return

    def _ask(self, question: Callable[[Any], T], seconds: float) -> T:
        if self._remote:
            self._knock()
            _client(self.uri, os.getpid())  # imports much at first, which is not the server's time
        return _bounded(lambda: self._translated(question), seconds, self.place)

    def _translated(self, question: Callable[[Any], T]) -> T:
        from mlflow.exceptions import MlflowException

        try:
            return question(_client(self.uri, os.getpid()))
        except MlflowException as error:
            raise self._meaning(error) from error
        except RegistryError:
            raise
        except Exception as error:  # drivers raise their own errors: OperationalError, ConnectionError, ...
            text = self._said(str(error))
            raise RegistryUnavailableError(f"MLflow at {self.place}: {type(error).__name__}: {text}") from error

    def _said(self, text: str) -> str:
        """A text of MLflow or its driver, without the password in the URI and what else is known to be secret."""
        return outward(text)

    def _meaning(self, error: Any) -> RegistryError:
        code, text = error.error_code, self._said(str(error.message if hasattr(error, "message") else error))
        if any(word in text for word in _COLLISIONS):
            return _CollisionError(f"MLflow at {self.place} is written to by too many at once: {text}")
        if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND") or (
            code == "INVALID_PARAMETER_VALUE" and "alias" in text and "not found" in text
        ):
            return UnknownVersionError(f"{text.rstrip('.')} (in MLflow at {self.place})")
        if code in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            return AlreadyExistsError(text)
        if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            return RegistryError(f"MLflow at {self.place} refused: {text}")
        return RegistryUnavailableError(f"MLflow at {self.place}: {text}")

    def _knock(self) -> None:
        """Notice a server that accepts no connection; not when a proxy stands in between."""
        from requests.utils import get_environ_proxies

        if get_environ_proxies(self.uri):
            return
        parts = urlsplit(self.place)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT).close()
        except OSError as error:
            text = self._said(str(error))
            raise RegistryUnavailableError(f"MLflow at {self.place} cannot be reached: {text}") from error


def server_at(tracking_uri: str | None = None) -> Server:
    """The store at a URI; without one, the one that MLflow itself uses.

    Raises:
        ConfigError: MLflow is not installed, or the URI names a directory of files.
    """
    try:
        import mlflow
    except ImportError:
        raise ConfigError("the registry needs MLflow: pip install 'dspy-prod[mlflow]'") from None
    tracking_uri = unshown(tracking_uri)
    uri = unshown(str(mlflow.get_registry_uri()) if tracking_uri is None else tracking_uri)
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file") or len(scheme) == 1:  # a path, or a drive's letter
        raise ConfigError(
            f"{bare_url(uri)!r} is a directory of files, which MLflow no longer supports for prompts; use a database: "
            "mlflow.set_tracking_uri('sqlite:///mlflow.db'), or the address of an MLflow server"
        )
    return Server(uri)


@lru_cache(maxsize=16)
def _client(uri: str, _pid: int) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class _Workers:
    """Counts the worker threads; a forked child has none."""

    def __init__(self) -> None:
        self.free = threading.BoundedSemaphore(MOST_WAITING)
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self.free = threading.BoundedSemaphore(MOST_WAITING)


_WORKERS: Final = _Workers()


def _bounded(work: Callable[[], T], seconds: float, place: str) -> T:
    free = _WORKERS.free
    if not free.acquire(timeout=seconds):
        raise RegistryUnavailableError(f"MLflow at {place}: {MOST_WAITING} earlier requests still wait for an answer")
    answer: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            answer.set_result(context.run(work))
        except BaseException as error:
            answer.set_exception(error)
        finally:
            free.release()

    if begin("dspy_prod-registry", run) is None:
        free.release()
        raise RegistryUnavailableError(f"MLflow at {place} cannot be asked: this process has as many threads as it may")
    try:
        return answer.result(seconds)
    except FutureTimeoutError:
        if answer.done():  # the work itself raised a TimeoutError
            raise
        raise RegistryUnavailableError(f"MLflow at {place} gave no answer within {seconds:g} s") from None
