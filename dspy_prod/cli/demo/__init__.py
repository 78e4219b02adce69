"""`dspy-prod demo`."""

from __future__ import annotations
