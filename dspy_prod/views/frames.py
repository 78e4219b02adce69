"""Rows as a pandas DataFrame. pandas is imported when it is asked for, and may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy_prod.errors import ConfigError

if TYPE_CHECKING:
    import pandas


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pandas.DataFrame:
    """A DataFrame with these rows.

    Args:
        rows: values by column.
        columns: the columns in order, which an empty frame has too; default: those of the rows.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise ConfigError("A DataFrame needs pandas: pip install 'dspy-prod[notebooks]'") from None
    return pd.DataFrame(list(rows), columns=None if columns is None else list(columns))
