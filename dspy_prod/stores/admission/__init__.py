"""The admission core: pure state transitions of limits and money."""

from __future__ import annotations
