"""From a URL to a store."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.privacy.names import without_password
from dspy_prod.stores import opening
from dspy_prod.stores.addresses import DEFAULT_URL, default_store_url, with_password
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.opening import default_namespace, open_store
from dspy_prod.stores.redis.connection import check
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, FakeClock, ask, granted


def test_one_url_and_namespace_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.db").symlink_to(tmp_path / "state.db")
    first = open_store("sqlite:///state.db", "n")
    assert isinstance(first, SqliteStore)
    assert open_store(f"sqlite:///{tmp_path}/state.db", "n") is first
    assert open_store("sqlite:///./link.db", "n") is first
    assert open_store("sqlite:///state.db", "other") is not first
    assert first.url == f"sqlite:///{os.path.realpath(tmp_path)}/state.db"
    first.close()
    second = open_store("sqlite:///state.db", "n")
    assert second is not first
    granted(second, ask())
    second.close()


def test_memory_stores_are_shared_by_name() -> None:
    first = open_store("memory://", "n")
    assert isinstance(first, MemoryStore)
    assert open_store("memory://", "n") is first
    assert open_store("memory://a", "n") is not first
    assert open_store("memory://a", "n", clock=FakeClock()) is not open_store("memory://a", "n", clock=FakeClock())
    assert open_store("memory://", "m") is not first
    assert (first.url, first.namespace, first.durable) == ("memory://", "n", False)


def test_a_file_s_store_that_nobody_uses_is_let_go(tmp_path: Path) -> None:
    reference = weakref.ref(open_store(f"sqlite:///{tmp_path}/gone.db", "n"))
    gc.collect()
    assert reference() is None


def test_a_memory_store_is_kept_for_the_process() -> None:
    """An LM that was built for each request forgot budget, limit and ledger each time."""
    granted(open_store("memory://kept", "n"), ask(CENT))
    gc.collect()
    assert open_store("memory://kept", "n").account("day").held == CENT


def test_a_store_object_is_used_as_it_is() -> None:
    store = MemoryStore()
    assert open_store(store, "ignored") is store


def test_options_are_in_the_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db?synchronous=full&lease=10&max_records=500"
    store = open_store(url, "n")
    assert isinstance(store, SqliteStore)
    connection = store._writer.tables.connection
    assert connection is not None
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert (store._lease, store._max_records) == (10.0, 500)
    store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://host/state.db", "names no file"),
        ("sqlite:///x.db?lease=0", "lease"),
        ("sqlite:///x.db?lease=soon", "lease"),
        ("sqlite:///x.db?colour=red", "colour"),
        ("sqlite:///x.db?synchronous=OFF", "synchronous"),
        ("memory://a/b", "letters"),
        ("redis://:hunter2@host/0?lease=0", "lease"),
        ("redis://:hunter2@host/0?socket_timeout=hunter2", "redis-py"),
        ("redis://:hunter2@host:port/0", "redis-py"),
        ("redis://:hunter2@host/0?nosuch=hunter2", "'nosuch' is no option"),
        ("redis://:hunter2@host/0?leases=10", "'leases' is no option"),
        ("redis://:hunter2@host/0?ssl_ca_certs=/hunter2", "'ssl_ca_certs' is no option"),
        ("redis://:hunter2@host/0?retry=3", "'retry' is no option"),
        ("redis://:hunter2@host/0?protocol=9", "redis-py"),
        ("postgres://user:hunter2@host/db?password=hunter2", "sqlite:///"),
        ("state.db", "sqlite:///"),
        ("", "sqlite:///"),
    ],
)
def test_what_is_no_store_is_refused_with_the_remedy(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(url, "n")
    assert "hunter2" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    assert without_password("redis://u:p@h:1/0?password=x&db=1") == "redis://***@h:1/0?password=***&db=***"
    assert without_password("redis://u:p@ss@h/0") == "redis://***@h/0"


def test_a_file_that_cannot_be_opened_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="store="):
            open_store(f"sqlite:///{tmp_path}/file/state.db", "n")


def test_problems_are_told_to_everybody_who_asked(tmp_path: Path) -> None:
    told: list[str] = []
    url = f"sqlite:///{tmp_path}/state.db"
    first = open_store(url, "n", on_problem=lambda name, details: told.append("first"))
    second = open_store(url, "n", on_problem=lambda name, details: told.append("second"))
    assert first is second
    assert isinstance(first, SqliteStore)
    first._listeners("test", {})
    assert told == ["first", "second"]
    first.close()


def test_the_default_can_be_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPY_PROD_STORE", raising=False)
    monkeypatch.delenv("DSPY_PROD__STORE", raising=False)
    assert default_store_url() == DEFAULT_URL == "sqlite:///.dspy_prod/state.db"
    monkeypatch.setenv("DSPY_PROD_STORE", "memory://")
    assert default_store_url() == "memory://"


def test_what_wins_over_a_file_is_where_a_shell_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that `DSPY_PROD__STORE` moved is found by the commands beside it; the namespace likewise."""
    for key, default in (("STORE", default_store_url), ("NAMESPACE", default_namespace)):
        monkeypatch.setenv(f"DSPY_PROD_{key}", "memory://default")
        monkeypatch.setenv(f"DSPY_PROD__{key}", "memory://wins")
        assert default() == "memory://wins"
        monkeypatch.setenv(f"DSPY_PROD__{key}", "")
        assert default() == "memory://default"
    assert default_namespace("given") == "given"


@pytest.mark.parametrize(
    "variable", ["DSPY_PROD_STORE", "DSPY_PROD__STORE", "DSPY_PROD__LM__BIG__STORE", "dspy_prod__embedder__docs__store"]
)
def test_any_variable_that_names_the_server_knows_its_password(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever else names another server; and nobody gives a password to a server that it is not of."""
    for name in ("DSPY_PROD_STORE", "DSPY_PROD__STORE"):
        monkeypatch.setenv(name, "redis://:other@elsewhere.example/0")
    monkeypatch.setenv(variable, "redis://:secret@db.example/0")
    assert with_password("redis://db.example/0") == "redis://:secret@db.example/0"
    assert with_password("redis://db.example/1") == "redis://db.example/1"


@pytest.mark.parametrize(
    ("here", "written", "found"),
    [
        ("redis://:pw@db/0", "redis://***@db/0", "redis://:pw@db/0"),  # as a pickle, or an evaluation, names it
        ("valkey://ann:pw@db/0?lease=7", "redis://***@db/0", "redis://ann:pw@db/0?lease=7"),
        ("rediss://:pw@db/0?ssl_ca_certs=/here", "rediss://***@db/0?ssl_ca_certs=***",
         "rediss://:pw@db/0?ssl_ca_certs=%2Fhere"),
        ("redis://:pw@db/0?lease=7", "redis://db/0?lease=9", "redis://:pw@db/0?lease=9"),
        ("redis://db/0?password=pw", "redis://db/0", "redis://db/0?password=pw"),
        ("unix://:pw@/run/valkey", "unix:///run/valkey", "unix://:pw@/run/valkey"),
        ("redis://:pw@db/0", "redis://:own@db/0", "redis://:own@db/0"),
        ("redis://:pw@other/0", "redis://***@db/0?lease=***", "redis://db/0"),
        ("redis://:pw@db/0", "sqlite:////db/0?lease=9", "sqlite:////db/0?lease=9"),
        ("", "memory://x", "memory://x"),
    ],
)  # fmt: skip
def test_a_server_is_known_again_however_it_was_written_down(
    here: str, written: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was hidden in a URL is not taken for a user or a value."""
    monkeypatch.delenv("DSPY_PROD_STORE", raising=False)
    monkeypatch.setenv("DSPY_PROD__STORE", here)
    assert str(with_password(written)) == found
    assert "pw" not in repr(with_password(written))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_forked_while_a_store_is_opened_can_open_one() -> None:
    """A worker forked while another thread opened its store hung at the first store that it opened itself."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with opening._LOCK:
            taken.set()
            over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)
        open_store("memory://forked", "n")
        os._exit(0)
    code = os.waitpid(pid, 0)[1]
    over.set()
    thread.join()
    assert code == 0


def test_the_options_of_redis_py_may_stand_in_a_url() -> None:
    """Its connections are made to look at them, and connect to nothing."""
    for url in (
        "rediss://h:1/0?ssl_ca_certs=/ca.pem&health_check_interval=5", "unix:///nowhere?db=1", "redis://h:1?protocol=3",
    ):  # fmt: skip
        check(url)


@pytest.mark.parametrize("url", ["sqlite:///{}/state.db", "redis://127.0.0.1:1/0"])
def test_code_that_cannot_be_read_is_told_as_a_store_that_cannot_be_used(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose files are all in use meets its first store: the next time it is there."""
    kind = url.partition(":")[0]
    module = f"dspy_prod.stores.{kind}.store"

    class Full:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == module:
                raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as full:
        full.delitem(sys.modules, module, raising=False)
        full.setattr(sys, "meta_path", [Full(), *sys.meta_path])
        with pytest.raises(StoreUnavailableError, match=r"Too many open files.*ulimit -n"):
            open_store(url.format(tmp_path), "full")
    if kind == "sqlite":
        open_store(url.format(tmp_path), "full").close()
