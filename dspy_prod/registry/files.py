"""Files that are there entirely or not at all, and values as the JSON in them and in MLflow's tags has it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import math
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic

from dspy_prod.registry.errors import RegistryError
from dspy_prod.runtime.private import make_directory

T = TypeVar("T")


def write(path: Path, text: str) -> None:
    """Write a file that only its owner reads, its folder too; after an OSError what was there before still is.

    Half a character, which UTF-8 cannot say, becomes an escape, as JSON has it.
    """
    make_directory(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)  # owner-only
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def plain(value: Any) -> Any:
    """A value for JSON: dataclasses are dicts, times text, and so are NaN and infinity, which JSON does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(kind: type[T], given: Any, where: object) -> T:
    """A value of a kind, from the JSON text that was made of it with `plain`, or from what such a text holds.

    Raises:
        RegistryError: it is no JSON, or not of that kind: somebody else has written it. The message names `where`, and
            the field, but not what stands there.
    """
    try:
        adapter = _adapter(cast("Any", kind))
        strictly = isinstance(given, str)
        found: T = adapter.validate_json(given, strict=True) if strictly else adapter.validate_python(given)
        return found
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RegistryError(
            f"{where} was changed in MLflow after dspy_prod wrote it, and cannot be used: "
            f"{place + ': ' if place else ''}{first['msg']}"
        ) from None


@lru_cache(maxsize=16)
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)
