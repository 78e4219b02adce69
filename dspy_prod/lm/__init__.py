"""`dspy_prod.LM` and `wrap`."""

from __future__ import annotations

from dspy_prod.lm.lm import LM, wrap

__all__ = ["LM", "wrap"]
