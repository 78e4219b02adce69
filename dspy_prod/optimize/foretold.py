"""A forecast as a table: what a run is expected to need, and how far off that may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dspy_prod.optimize.telling import span
from dspy_prod.views import Cell, Table


def table(forecast: Any) -> Table:
    """The whole of a `rehearsal.Forecast`."""
    return Table("Forecast", ("", ""), list(_rows(forecast)))


def _rows(given: Any) -> Iterator[tuple[str, Any]]:
    yield "cost", Cell(f"${given.usd:,.4f}", "strong", (f"${given.usd_low:,.4f} to ${given.usd_high:,.4f}",))
    if len(given.by) > 1:
        yield from ((f"  {name}", f"${usd:,.4f}") for name, usd in given.by.items())
    cached = f"{given.cached:,} more are answered by the cache" if given.cached else None
    yield "calls", Cell(f"{given.calls:,}", below=(f"{given.calls_low:,} to {given.calls_high:,}", cached))
    yield "tokens", f"{given.tokens:,}"
    yield "time", span(given.seconds)
    yield "paid to find out", f"${given.pilot_usd:,.4f}"
    yield from (("what to know", Cell(warning, "warn")) for warning in given.warnings)
