"""The file is ours alone: whoever else may write it sets every budget, whoever reads it reads every cached answer."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.sqlite.bell import Bell
from dspy_prod.stores.sqlite.cells import Cells, left_by
from dspy_prod.stores.sqlite.claims import ClaimsFile
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.logged import logged
from tests.stores.support import ask, granted

STRANGER = 54_321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store that was used, with what SQLite keeps beside it, as a killed process leaves it."""
    with contextlib.closing(SqliteStore(str(tmp_path / "used" / "state.db"))) as store:
        granted(store, ask())
        shutil.copytree(tmp_path / "used", tmp_path / "kept")
    return tmp_path / "kept" / "state.db"


@pytest.mark.parametrize("bits", [0, 0o022, 0o077, 0o377, 0o777])
def test_a_fresh_store_is_for_its_owner_only_whatever_the_umask(tmp_path: Path, bits: int) -> None:
    """A umask that takes away too much left a directory in which its owner could do nothing."""
    path = tmp_path / "a" / "b" / "state.db"
    with umask(bits), contextlib.closing(SqliteStore(str(path))) as store:
        granted(store, ask())
        assert [mode(each) for each in (tmp_path / "a", path.parent)] == [0o700, 0o700]
        assert {mode(each) for each in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("bits", [0o666, 0o660, 0o644, 0o606])
def test_what_others_could_read_or_write_is_made_ours_with_a_word(
    file: Path, suffix: str, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a file was used as it was: anybody could set what is spent to nothing."""
    which = Path(f"{file}{suffix}")
    which.chmod(bits)
    with caplog.at_level(logging.WARNING), contextlib.closing(SqliteStore(str(file))) as store:
        granted(store, ask())
        assert mode(which) == 0o600
    [said] = [each.message for each in caplog.records if str(which) in each.message]
    assert "can be no longer" in said


MAPPED: dict[str, Callable[[str], object]] = {
    "-board": lambda path: Bell(path).token,
    "-flights": lambda path: ClaimsFile(path, "n").claim(b"k" * 32, False),
    "-own.drawn": lambda path: Cells(path, "own").take(),
    "-dead.drawn": lambda path: left_by(path, "dead"),
}
"""What processes map into memory beside the store's file, and who opens it."""


@pytest.mark.parametrize("suffix", MAPPED)
@pytest.mark.parametrize("bits", [0o666, 0o640])
def test_what_is_mapped_beside_it_is_made_ours_when_the_store_is_opened(
    file: Path, suffix: str, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever made such a file shorter ended each process that looked at it."""
    which = Path(f"{file}{suffix}")
    which.write_bytes(bytes(64))
    which.chmod(bits)
    with caplog.at_level(logging.WARNING), contextlib.closing(SqliteStore(str(file))):
        assert mode(which) == 0o600
    [said] = [each.message for each in caplog.records if str(which) in each.message]
    assert "can be no longer" in said


@pytest.mark.parametrize("suffix", MAPPED)
def test_what_is_mapped_beside_it_is_made_ours_when_it_is_opened(file: Path, suffix: str) -> None:
    """It may be opened long after the store, and again when it was deleted."""
    which = Path(f"{file}{suffix}")
    which.write_bytes(bytes(64))
    which.chmod(0o666)
    MAPPED[suffix](str(file))
    assert mode(which) == 0o600


@pytest.mark.parametrize("suffix", MAPPED)
def test_where_a_link_in_its_place_leads_to_stays_as_it_is(file: Path, tmp_path: Path, suffix: str) -> None:
    """Somebody else may have laid it: what may be read elsewhere is not his to say."""
    shared = tmp_path / "shared"
    shared.write_text("shared")
    shared.chmod(0o644)
    Path(f"{file}{suffix}").symlink_to(shared)
    with contextlib.closing(SqliteStore(str(file))) as store:
        granted(store, ask())
        with contextlib.suppress(OSError):
            MAPPED[suffix](str(file))
    assert (mode(shared), shared.read_text()) == (0o644, "shared")


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
def test_a_directory_that_others_could_write_is_closed_to_them(
    file: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There they could put another file in the store's place. What they may read of the directory stays."""
    file.parent.chmod(bits)
    with caplog.at_level(logging.WARNING):
        SqliteStore(str(file)).close()
    assert mode(file.parent) == bits & ~0o022
    assert len([each for each in caplog.records if str(file.parent) in each.message]) == 1


def test_a_directory_where_nobody_removes_another_s_files_stays_as_it_is(tmp_path: Path) -> None:
    """`/tmp` is written to by all."""
    tmp_path.chmod(0o1777)
    SqliteStore(str(tmp_path / "state.db")).close()
    assert mode(tmp_path) == 0o777 | stat.S_ISVTX


def test_the_word_is_said_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            SqliteStore(str(file)).close()
    assert len(logged(caplog)) == 1


@as_root
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_somebody_else_s_file_is_refused(file: Path, suffix: str) -> None:
    """Whoever was first to make `/tmp/state.db`, or a log beside it, decided what was spent."""
    which = Path(f"{file}{suffix}")
    which.touch(mode=0o600)
    os.chown(which, STRANGER, -1)
    with pytest.raises(StoreUnavailableError, match=f"{which} belongs to user {STRANGER}.*chown root.*store="):
        SqliteStore(str(file))


@as_root
def test_somebody_else_s_directory_is_refused(file: Path) -> None:
    os.chown(file.parent, STRANGER, -1)
    with pytest.raises(StoreUnavailableError, match=rf"user {STRANGER} may write .*\.dspy_prod"):
        SqliteStore(str(file))


@as_root
def test_somebody_else_s_link_is_refused(file: Path, tmp_path: Path) -> None:
    """It would lead us to write where somebody else wants."""
    link = tmp_path / "link.db"
    link.symlink_to(file)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    with pytest.raises(StoreUnavailableError, match=f"{link} is a symbolic link to {file}"):
        open_store(f"sqlite:///{link}", "n")
    directory = tmp_path / "elsewhere"
    directory.symlink_to(file.parent)
    os.chown(directory, STRANGER, -1, follow_symlinks=False)
    with pytest.raises(StoreUnavailableError, match="symbolic link"):
        SqliteStore(str(directory / "state.db"))


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_in_the_place_of_what_sqlite_keeps_is_refused(file: Path, tmp_path: Path, suffix: str) -> None:
    which, target = Path(f"{file}{suffix}"), tmp_path / "precious"
    target.write_text("precious")
    which.unlink(missing_ok=True)
    which.symlink_to(target)
    with pytest.raises(StoreUnavailableError, match=f"{which} is a symbolic link"):
        SqliteStore(str(file))
    assert target.read_text() == "precious"


def test_a_store_given_by_its_own_path_is_no_link(file: Path, tmp_path: Path) -> None:
    """A link of our own is followed by `open_store`, so that one file is one store."""
    (tmp_path / "link.db").symlink_to(file)
    store = open_store(f"sqlite:///{tmp_path}/link.db", "n")
    assert store.url == f"sqlite:///{os.path.realpath(file)}"


def test_another_program_s_file_keeps_its_mode(tmp_path: Path) -> None:
    """It is refused, and whoever shares it goes on."""
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE experiments (id)")
    path.chmod(0o664)
    with pytest.raises(StoreUnavailableError, match="another program"):
        SqliteStore(str(path))
    assert mode(path) == 0o664


@pytest.mark.parametrize(
    ("version", "remedy"), [(0, "damaged"), (-1, "damaged"), ("1", "damaged"), (None, "damaged"), (2, "upgrade")]
)
def test_a_schema_that_never_was_is_refused(file: Path, version: object, remedy: str) -> None:
    """Versions 0 and -1 were used as if they were 1."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (version,))
    with pytest.raises(StoreUnavailableError, match=f"{file} has schema version.*{remedy}.*store="):
        SqliteStore(str(file))


def test_a_file_that_is_replaced_while_in_use_is_looked_at_too(file: Path) -> None:
    """As when a process starts: what is put there meanwhile is believed no more readily."""
    with contextlib.closing(SqliteStore(str(file))) as store:
        granted(store, ask())
        file.unlink()
        file.symlink_to(file.parent / "other.db")
        with pytest.raises(StoreUnavailableError, match="symbolic link"):
            store.records()
    assert not (file.parent / "other.db").exists()


def spoilt(spoil: Callable[[Path], object], path: Path) -> None:
    path.unlink()
    spoil(path)


@pytest.mark.parametrize("spoil", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_refused(file: Path, spoil: Callable[[Path], object]) -> None:
    """A pipe made the first caller wait for ever."""
    spoilt(spoil, file)
    with pytest.raises(StoreUnavailableError, match=f"{file} is a (directory|pipe)"):
        SqliteStore(str(file))
