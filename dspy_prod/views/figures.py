"""Figures without pyplot: they belong to nobody's notebook until they are shown, and can be drawn in any thread."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from dspy_prod.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 110


def blank(size: tuple[float, float]) -> Figure:
    """A new figure.

    Args:
        size: width and height in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("A figure needs matplotlib: pip install 'dspy-prod[notebooks]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
