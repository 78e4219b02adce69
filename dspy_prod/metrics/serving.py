"""`/metrics` for Prometheus: a server of its own, or an application to mount."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Iterable
from importlib import import_module
from typing import Any, Final, Literal, overload

from dspy_prod.errors import ConfigError
from dspy_prod.metrics.exposition import Collected
from dspy_prod.metrics.setup import MOST_VALUES, REMEDY, checked
from dspy_prod.runtime.forking import RegistryLock, Stage, reset_after_fork

PORT: Final = 9464
"""Where OpenTelemetry's own exporters for Prometheus listen."""

MOST_WORKERS: Final = 1024

_LOCK: Final = RegistryLock()
_SERVING: Final[set[Endpoint]] = set()
"""Those of this process that run."""

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


def prometheus(
    port: int = PORT,
    host: str = "127.0.0.1",
    *,
    workers: int = 1,
    attributes: Iterable[str] = (),
    most_values: int = MOST_VALUES,
) -> Endpoint:
    """Serve the metrics to Prometheus, from a thread of this process.

        with dspy_prod.metrics.prometheus(port=9464) as endpoint:
            print(endpoint.url)  # http://127.0.0.1:9464/metrics

    It needs no setup of OpenTelemetry: the metrics are those of `enable`, with a provider of their own. Anybody who
    reaches the port can read them; there is no password, so it listens on loopback alone unless told otherwise.

    Each process has numbers of its own and needs a port of its own: call it in each worker, after it was forked, and
    say how many there are. Prometheus is told all of the ports.

    Args:
        port: 0 takes a free one, see `Endpoint.port`.
        workers: how many processes run this line: each takes the first of so many ports, from `port` on, that is free,
            and one that is started anew that of the one that ended. Name twice as many where new ones begin before
            the old ones have ended.
        host: address to listen on; `"0.0.0.0"` for all.
        attributes, most_values: see `enable`.

    Raises:
        ConfigError: `opentelemetry-sdk` or `prometheus-client` is missing; the ports are taken; this process has one of
            them already; see `enable`.

    Example:
        ```python
        endpoint = metrics.prometheus(port=0)  # any free port; the default is 9464
        endpoint.close()
        ```
    """
    ports = checked_ports(port, workers)
    collected = _collected(attributes, most_values)
    try:
        with _LOCK:
            _refuse_twice(ports, host)
            return _first(collected, ports, host)
    except ConfigError:
        collected.close()
        raise
    except OSError as error:
        collected.close()
        raise ConfigError(
            f"prometheus(port={port}, host={host!r}, workers={workers}): cannot listen there "
            f"({error.strerror or error}); use another port, or port=0 for a free one, or workers= with the number of "
            "processes that run this line"
        ) from error


def checked_ports(port: int, workers: int) -> range:
    """The ports that one of so many processes may take, or the `ConfigError` of `prometheus`."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65_535:
        raise ConfigError(f"prometheus(port={port!r}): use a port from 0 (any free one) to 65535")
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"prometheus(workers={workers!r}): use a number of processes from 1 to {MOST_WORKERS}")
    if port + workers - 1 > 65_535:
        raise ConfigError(
            f"prometheus(port={port}, workers={workers}): there are no ports above 65535; use a lower one"
        )
    return range(port, port + (workers if port else 1))


def _refuse_twice(ports: range, host: str) -> None:
    """A second port of one process would tell all its numbers twice, and be another worker's."""
    for endpoint in _SERVING:
        if endpoint.host == host and endpoint.port in ports:
            raise ConfigError(
                f"prometheus(port={ports.start}, host={host!r}, workers={len(ports)}): this process listens at "
                f"{endpoint.url} already; call it once in each process, or close() that endpoint first, or use another "
                "port"
            )


def _first(collected: Collected, ports: range, host: str) -> Endpoint:
    """A server on the first of these ports that is free."""
    for port in ports[:-1]:
        try:
            return Endpoint(collected, port, host)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return Endpoint(collected, ports[-1], host)


@overload
def prometheus_app(
    interface: Literal["asgi"] = "asgi", *, attributes: Iterable[str] = (), most_values: int = MOST_VALUES
) -> AsgiApp: ...
@overload
def prometheus_app(
    interface: Literal["wsgi"], *, attributes: Iterable[str] = (), most_values: int = MOST_VALUES
) -> WsgiApp: ...
def prometheus_app(
    interface: Literal["asgi", "wsgi"] = "asgi", *, attributes: Iterable[str] = (), most_values: int = MOST_VALUES
) -> AsgiApp | WsgiApp:
    """The same as an application, to be mounted where a service has its pages.

        app = fastapi.FastAPI()
        app.mount("/metrics", dspy_prod.metrics.prometheus_app())

    A scrape gets the numbers of the process that answers it: with several workers behind one port use `prometheus` with
    `workers=`.

    Args:
        interface: `"asgi"`, which never holds up the event loop, or `"wsgi"`.
        attributes, most_values: see `enable`.

    Raises:
        ConfigError: as `prometheus`; an unknown interface.

    Example:
        ```python
        app = metrics.prometheus_app()  # mount it under /metrics of an ASGI service
        ```
    """
    if interface not in ("asgi", "wsgi"):
        raise ConfigError(f"prometheus_app(interface={interface!r}): use 'asgi' or 'wsgi'")
    collected = _collected(attributes, most_values)
    if interface == "wsgi":
        from prometheus_client import make_wsgi_app

        wsgi: WsgiApp = make_wsgi_app(_registry(collected))
        return wsgi
    registry = _registry(collected)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(f"/metrics takes HTTP requests, not {scope['type']!r}")
        if scope.get("method", "GET") not in ("GET", "HEAD"):
            await _answer(send, 405, b"GET only", [(b"allow", b"GET, HEAD")])
            return
        accept = ", ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept")
        text, kind = await asyncio.to_thread(_text, registry, accept)
        await _answer(send, 200, text, [(b"content-type", kind.encode())])

    return app


class Endpoint:
    """A server of `/metrics` that runs; a context manager that ends it.

    Attributes:
        host, port: where it listens.
        url: what Prometheus scrapes.

    Example:
        ```python
        endpoint = metrics.prometheus(port=0)
        print(endpoint.url)
        endpoint.close()
        ```
    """

    def __init__(self, collected: Collected, port: int, host: str) -> None:
        from prometheus_client import start_http_server

        self._collected = collected
        server, _ = start_http_server(port, host, _registry(collected))
        self._server: Any = server
        self.host, self.port = host, int(server.server_port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        self._closing = threading.Lock()
        _SERVING.add(self)
        reset_after_fork(self, Stage.FILES)

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and counting. Idempotent."""
        with self._closing:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            _SERVING.discard(self)
            self._collected.close()

    def _after_fork(self) -> None:
        """The child has no thread that would answer, and must not keep the port when its parent has left it."""
        self._closing = threading.Lock()
        server, self._server = self._server, None
        _SERVING.discard(self)
        if server is not None:
            server.socket.close()
            self._collected.instruments.stop()


def check_endpoint(
    port: int = PORT, workers: int = 1, attributes: Iterable[str] = (), most_values: int = MOST_VALUES, **_: Any
) -> None:
    """Look at the arguments of `prometheus`, of which nothing begins.

    Raises:
        ConfigError: see `prometheus`; the ports are not tried.
    """
    checked_ports(port, workers)
    _needed(attributes, most_values)


def _collected(attributes: Iterable[str], most_values: int) -> Collected:
    return Collected(*_needed(attributes, most_values))


def _needed(attributes: Iterable[str], most_values: int) -> tuple[tuple[str, ...], int]:
    for module, package in (
        ("opentelemetry.sdk.metrics", "opentelemetry-sdk"), ("prometheus_client", "prometheus-client"),
    ):  # fmt: skip
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(f"metrics for Prometheus need {package}: {REMEDY}") from error
    return checked(attributes, most_values)


def _registry(collected: Collected) -> Any:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(collected)
    return registry


def _text(registry: Any, accept: str) -> tuple[bytes, str]:
    from prometheus_client.exposition import choose_encoder

    encode, kind = choose_encoder(accept)
    return encode(registry), kind


async def _answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
