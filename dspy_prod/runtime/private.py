"""Files that are ours alone: what others may change cannot be believed, what they may read gives prompts away.

Where a file or directory belongs to us, others' access is taken away, which one line of the log says. Where it is
somebody else's, or leads out of where only we can write, it is refused. A directory like `/tmp`, in which nobody may
remove another's files, will do. The superuser is always trusted: nothing can be kept from it.

Modes say nothing on Windows, where nothing is checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import Final

_CHECKED: Final = hasattr(os, "geteuid")
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger("dspy_prod")


class NotPrivateError(PermissionError):
    """Others may read or change a file or a directory; the text names it and the remedy."""


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for us alone, whatever the umask."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            path.chmod(0o700)  # an umask may have left less than we need


def make_file(path: Path) -> None:
    """Make an empty file for us alone, whatever the umask; one that exists is left as it is."""
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if _CHECKED:
                os.fchmod(handle, 0o600)
        finally:
            os.close(handle)


def own_file(path: Path) -> None:
    """Make a file, where there is none, and see to it that it is ours alone; raises as `check` and `restrict`."""
    make_file(path)
    check(path)
    restrict(path.parent, path)


def check(*files: Path) -> None:
    """See to it that files, where there are such, are our own.

    Raises:
        NotPrivateError: one is somebody else's, or is no file but leads elsewhere.
        OSError: one cannot be looked at.
    """
    for path in files:
        found = _status(path)
        if found is None or not _CHECKED:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivateError(f"{path} is {_kind(found.st_mode)} and no file; move it away")
        if found.st_uid != os.geteuid():
            raise NotPrivateError(
                f"{path} belongs to {_user(found.st_uid)}, who may change it; move it away, or, if what it says can "
                f"be trusted, make it ours: chown {_user(os.geteuid())} {path}"
            )


def check_directory(directory: Path) -> None:
    """See to it that nobody else can put a file in the place of ours, once `restrict` was called; raises as `check`."""
    check_link(directory)
    found = directory.stat()
    if not _CHECKED or found.st_mode & stat.S_ISVTX:
        return
    stranger = found.st_uid not in (0, os.geteuid())
    if stranger or (found.st_uid != os.geteuid() and found.st_mode & _OTHERS_WRITE):
        who = _user(found.st_uid) if stranger else "others"
        raise NotPrivateError(
            f"{who} may write to the directory {directory} and put another file in its place; give it a directory of "
            f"its own, such as {directory / '.dspy_prod'}"
        )


def check_link(path: Path) -> None:
    """See to it that a symbolic link, where there is one, was not laid by somebody else; raises as `check`."""
    found = _status(path)
    if found is None or not _CHECKED or not stat.S_ISLNK(found.st_mode):
        return
    if found.st_uid not in (0, os.geteuid()):
        raise NotPrivateError(
            f"{path} is a symbolic link to {os.readlink(path)}, made by {_user(found.st_uid)}; name the file itself"
        )


def restrict(directory: Path, *files: Path) -> None:
    """Let nobody else write to a directory, nor read or write files in it, as far as they are ours; tell of it once.

    Raises:
        NotPrivateError: the disk keeps no modes, so that nothing on it is ours alone.
        OSError: as `check`.
    """
    forbidden = {directory: _OTHERS_WRITE, **dict.fromkeys(files, _OTHERS)}
    changed = [str(path) for path, bits in forbidden.items() if _CHECKED and _restricted(path, bits)]
    if changed:
        _log.warning("%s could be used by others, and can be no longer", ", ".join(changed))


def _restricted(path: Path, forbidden: int) -> bool:
    """Whether others could do what is forbidden until now."""
    try:
        found = path.stat()
        if not found.st_mode & forbidden or found.st_mode & stat.S_ISVTX or found.st_uid != os.geteuid():
            return False
        with contextlib.suppress(PermissionError):
            path.chmod(stat.S_IMODE(found.st_mode) & ~forbidden)
        if not path.stat().st_mode & forbidden:
            return True
    except FileNotFoundError:  # it was never there, or SQLite has just removed it
        return False
    raise NotPrivateError(f"others may use {path}, whose disk keeps no modes that forbid it; give a place on another")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


def _user(number: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"
