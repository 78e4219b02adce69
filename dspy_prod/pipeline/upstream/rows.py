"""Vectors as bytes: what a provider or a function gave, read once; and the array that a caller gets."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dspy_prod.pipeline.upstream.vectors import WIDTH


def rows_of(found: Any, count: int) -> list[bytes]:
    """The rows of what was given for so many texts: lists of numbers, arrays, or OpenAI's base64 of float32.

    Raises:
        ValueError: they are not one vector of finite numbers for each text, all equally long.
    """
    rows = [_row(row) for row in found]
    if len(rows) != count:
        raise ValueError(f"{count} texts were asked about, and {len(rows)} vectors came")
    lengths = sorted({len(row) // WIDTH for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"the vectors of one batch have different lengths: {', '.join(map(str, lengths))}")
    return rows


def array_of(rows: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """The rows as a float32 array of the caller's own, a vector a row.

    Raises:
        ValueError: the vectors have different lengths, so that they are not of one model.
    """
    if not rows:
        return np.array([], dtype=np.float32)
    length = len(rows[0])
    if any(len(row) != length for row in rows):
        lengths = sorted({len(row) // WIDTH for row in rows})
        raise ValueError(f"the vectors have different lengths: {', '.join(map(str, lengths))}")
    flat = np.frombuffer(b"".join(rows), dtype="<f4").astype(np.float32)
    return flat.reshape(len(rows), length // WIDTH)


def _row(given: Any) -> bytes:
    if isinstance(given, str):
        given = np.frombuffer(base64.b64decode(given, validate=True), dtype="<f4")
    row = np.asarray(given, dtype="<f4")
    if row.ndim != 1 or not row.size:
        raise ValueError(f"a vector is a row of numbers, and what came has the shape {row.shape}")
    if not np.isfinite(row).all():
        raise ValueError("a vector came with a number that is not finite")
    return row.tobytes()
