"""The tables of a new MLflow SQLite file, made so that nobody sees them half-made.

MLflow makes and migrates them step by step, which takes seconds and fails when two processes do it at once: here the
program itself may use MLflow for the first time while the exporter process does. The exporter makes them in a file
beside and links it into place; a file that somebody else has begun is waited for.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dspy_prod.compat.mlflow import newest_schema
from dspy_prod.runtime.private import make_directory

PATIENCE: Final = 60.0
"""Seconds for which another process's migration is waited for."""

_STEP: Final = 0.1


def prepare(uri: str) -> None:
    """Make sure that a SQLite tracking store has its tables; nothing for any other URI."""
    path = uri.partition("sqlite:///")[2].partition("?")[0]
    if not uri.startswith("sqlite:///") or not path or path == ":memory:":
        return
    head = newest_schema()
    if head is None or revision(path) == head:
        return
    make_directory(Path(path).parent)
    with _alone(path):
        if not os.path.exists(path):
            _place(path)
        deadline = time.monotonic() + PATIENCE
        while (found := revision(path)) != head and _in_progress(path, found) and time.monotonic() < deadline:
            time.sleep(_STEP)


def revision(path: str) -> str | None:
    """The version of the tables in a file, None while there is none."""
    if not os.path.exists(path):
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


def _place(path: str) -> None:
    """Make the tables beside, and put them into place unless a file has appeared there."""
    from mlflow import MlflowClient

    beside = f"{path}.new-{os.getpid()}"
    try:
        MlflowClient(f"sqlite:///{beside}").search_experiments(max_results=1)
        os.chmod(beside, 0o600)
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # no links on this file system
            if not os.path.exists(path):
                os.rename(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)


def _in_progress(path: str, found: str | None) -> bool:
    """Whether somebody seems to be making the tables: an older, finished file is MLflow's to complain about."""
    age = time.time() - max(os.path.getmtime(path), _journal_time(path))
    return found is None or age < 2.0


def _journal_time(path: str) -> float:
    try:
        return os.path.getmtime(f"{path}-journal")
    except OSError:
        return 0.0


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """One exporter at a time."""
    if os.name == "nt":
        yield
        return
    import fcntl

    lock = f"{path}.dspy_prod-lock"
    with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                os.remove(lock)
