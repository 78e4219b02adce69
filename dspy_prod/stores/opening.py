"""From a store URL to the one store object this process has for it."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.privacy.names import without_password
from dspy_prod.privacy.unshown import Unshown, unshown
from dspy_prod.privacy.visible import carried
from dspy_prod.runtime import private
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.addresses import NAMESPACE_VARIABLE, SERVERS, said
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore

MOST_NAMED: Final = 20
"""Namespaces that a message names."""

OnProblem = Callable[[str, dict[str, Any]], None]
_FORMS: Final = "'sqlite:///relative.db', 'sqlite:////absolute.db', 'redis://host:6379/0', 'memory://'"
_STORES: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
_KEPT: Final[list[MemoryStore]] = []
"""Memory stores live as long as the process: an LM built for each request finds what the one before has spent."""

_LOCK: Final = RegistryLock()


def default_namespace(given: str | None = None) -> str:
    """`namespace=`, else `$DSPY_PROD__NAMESPACE` or `$DSPY_PROD_NAMESPACE`, else the project directory's name.

    Raises:
        ConfigError: it is no text.
    """
    if given is not None and not isinstance(given, str):
        raise ConfigError(f"namespace={given!r} must be text, such as namespace={str(given)!r}")
    return given or said("NAMESPACE", NAMESPACE_VARIABLE) or Path.cwd().name or "default"


def open_store(
    url: str | Store,
    namespace: str,
    *,
    clock: Clock = SYSTEM_CLOCK,
    on_problem: OnProblem | None = None,
) -> Store:
    """The store behind a URL. Equal URLs and namespaces give the same object for as long as anybody uses it.

    Args:
        url: `memory://` or `memory://name`, `sqlite:///relative.db`, `sqlite:////absolute.db` with the options
            `?synchronous=FULL`, `&lease=10` (seconds) and `&max_records=1000000`; `redis://user:password@host:6379/0`,
            `rediss://` (TLS), `valkey://`, `valkeys://` or `unix:///path/of/socket` with the options `?lease=10` and
            `&max_records=1000000`, and redis-py's own; or a store object, used as it is.
        namespace: keeps programs that share a store apart.
        clock: the time of a store that is made now.
        on_problem: told of problems in the store's background work.

    Raises:
        ConfigError: the URL cannot be understood.
        StoreUnavailableError: the file or the server cannot be used; the message names it and what to do.
    """
    if not isinstance(url, str):
        if not hasattr(url, "admit"):
            raise ConfigError(f"store={url!r} is neither a URL nor a store; use one of {_FORMS}")
        store: Store = url
    else:
        url = unshown(url)
        scheme = url.partition("://")[0] if "://" in url else ""
        if scheme == "memory":
            store = _memory(url, namespace, clock)
        elif scheme == "sqlite":
            store = _sqlite(url, namespace, clock, on_problem)
        elif scheme in SERVERS:
            store = _redis(url, scheme, namespace, clock, on_problem)
        else:
            raise ConfigError(f"store={without_password(url)!r} is no store URL; use one of {_FORMS}")
    if on_problem is not None and store.durable:
        from dspy_prod.stores.durable.store import DurableStore

        if isinstance(store, DurableStore):
            store.on_problem(on_problem)
    return store


def check_there(url: str, namespace: str) -> None:
    """See to it that a store and its namespace are there: to open them would make them.

    Of a memory store both always are, and of a URL that cannot be understood: `open_store` says why.

    Raises:
        ConfigError: they are not; the message names the namespaces that are.
        StoreUnavailableError: the server cannot be asked.
    """
    url = unshown(url)
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme == "sqlite":
        from dspy_prod.stores.sqlite.schema import namespaces as of_file

        path = file_of(url)
        if not path.exists():
            raise ConfigError(f"there is no store at {path}; run a program with dspy_prod.LM here, or pass --store")
        there = of_file(path)
        if there is not None and carried(namespace) not in there:
            raise ConfigError(_not_there(namespace, str(path), there))
    elif scheme in SERVERS:
        place, _ = _server(url, scheme)
        from dspy_prod.stores.redis.namespaces import has_namespace
        from dspy_prod.stores.redis.namespaces import namespaces as of_server

        if not has_namespace(place, namespace):
            raise ConfigError(_not_there(namespace, without_password(url), of_server(place)))


def _not_there(namespace: str, place: str, known: list[str]) -> str:
    names = "".join(f", {name!r}" for name in known[:MOST_NAMED]).replace(", ", ", only ", 1)
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return f"there is no namespace {namespace!r} in {place}{names}{more}; pass --namespace"


def _memory(url: str, namespace: str, clock: Clock) -> Store:
    if not re.fullmatch(r"memory://[\w.-]*", url):
        raise ConfigError(f"store={without_password(url)!r}: a name has letters, digits, '_', '-' and '.'")
    name = url.partition("://")[2]
    key = ("memory", name, namespace, clock)
    with _LOCK:
        store: MemoryStore | None = _STORES.get(key)
        if store is None:
            store = _STORES[key] = MemoryStore(namespace, clock=clock, url=f"memory://{name}")
            if clock is SYSTEM_CLOCK:
                _KEPT.append(store)
        return store


def forget(url: str) -> None:
    """Close the memory stores of this URL, of every namespace, and keep them alive no longer."""
    with _LOCK:
        found = [store for store in _KEPT if store.url == url]
        _KEPT[:] = [store for store in _KEPT if store.url != url]
        for key in [key for key, store in _STORES.items() if key[0] == "memory" and store.url == url]:
            del _STORES[key]
    for store in found:
        store.close()


def file_of(url: str) -> Path:
    """The file of a `sqlite:///` URL; a ConfigError when it names none."""
    place = Unshown(url.partition("://")[2].partition("?")[0])
    if not place.startswith("/") or place == "/":
        raise ConfigError(f"store={without_password(url)!r} names no file; use one of {_FORMS}")
    path = unquote(place[1:])
    if path.startswith(":memory:"):
        raise ConfigError("store='sqlite:///:memory:' cannot be shared by threads; use store='memory://'")
    return Path(path).expanduser()


@contextmanager
def _loading(url: str) -> Iterator[None]:
    """While a store's modules are read: a process that has no file to spare is told so, and tries again next time."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(
            f"The store {without_password(url)} cannot be used: its code cannot be read ({error.strerror}). "
            "Where too many files are open, raise the limit (ulimit -n), or find who keeps them open"
        ) from error


def _sqlite(url: str, namespace: str, clock: Clock, on_problem: OnProblem | None) -> Store:
    with _loading(url):  # at the first use: importing the package stays light
        from dspy_prod.stores.sqlite.schema import unavailable
        from dspy_prod.stores.sqlite.store import SqliteStore

    named = file_of(url)
    try:
        private.check_link(named)
    except OSError as error:
        raise unavailable(str(named), error) from error
    real = os.path.realpath(named)
    options, _ = _options(url, ("synchronous", "lease", "max_records"))
    key = ("sqlite", real, namespace, clock)
    with _LOCK:
        store: SqliteStore | None = _STORES.get(key)
        if store is None or store.closed:
            store = _STORES[key] = SqliteStore(real, namespace, clock=clock, on_problem=on_problem, **options)
        return store


def _redis(url: str, scheme: str, namespace: str, clock: Clock, on_problem: OnProblem | None) -> Store:
    place, options = _server(url, scheme)
    with _loading(url):
        from dspy_prod.stores.redis.store import RedisStore

    key = ("redis", place, namespace, clock)
    with _LOCK:
        store: RedisStore | None = _STORES.get(key)
        if store is None or store.closed:
            store = _STORES[key] = RedisStore(place, namespace, clock=clock, on_problem=on_problem, **options)
        return store


def _server(url: str, scheme: str) -> tuple[str, dict[str, Any]]:
    """Where a server is, as redis-py reads it, and our options."""
    options, others = _options(url, ("lease", "max_records"), refuse=False)
    place = Unshown(f"{SERVERS[scheme]}://{url.partition('://')[2].partition('?')[0]}")
    if others:
        place = Unshown(f"{place}?{urlencode(others)}")
    try:
        from dspy_prod.stores.redis.connection import check

        check(place)
    except ImportError:
        raise ConfigError(
            f"store={without_password(url)!r} needs redis-py, which is not installed: pip install 'dspy_prod[redis]'"
        ) from None
    except ValueError as error:
        raise ConfigError(f"store={without_password(url)!r} is no URL of a Redis server: {error}") from None
    return place, options


def _options(url: str, known: tuple[str, ...], refuse: bool = True) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Our options in a URL, and the others, which may be refused."""
    options: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    given = [(name, Unshown(value)) for name, value in parse_qsl(url.partition("?")[2], keep_blank_values=True)]
    for name, value in given:
        try:
            if name not in known and not refuse:
                others.append((name, value))
            elif name == "synchronous" and name in known and value.upper() in ("NORMAL", "FULL"):
                options[name] = value.upper()
            elif name == "lease" and 0.1 <= float(value) <= 86_400:
                options[name] = float(value)
            elif name == "max_records" and int(value) > 0:
                options[name] = int(value)
            else:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"store={without_password(url)!r}: {name!r} is no option of it, or its value is not possible; "
                f"options are {', '.join(_MEANT[each] for each in known)}"
            ) from None
    return options, others


_MEANT: Final = {
    "synchronous": "synchronous=NORMAL|FULL",
    "lease": "lease=<seconds, at least 0.1>",
    "max_records": "max_records=<number>",
}
