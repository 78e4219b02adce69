"""The switch that turns every policy off."""

from __future__ import annotations

import os


def disabled() -> bool:
    """Whether `DSPY_PROD_DISABLED` switches every policy off (the ledger stays on)."""
    return os.environ.get("DSPY_PROD_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")
