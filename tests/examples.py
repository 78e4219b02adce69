"""How many examples a property is tried on."""

from __future__ import annotations

import os
from math import ceil
from typing import Any, Final

from hypothesis import HealthCheck, settings

SHARE: Final = float(os.environ.get("DSPY_PROD_EXAMPLES", "1"))
"""Below 1 it is quick, and always the same: for mutants. With 50, what happens once in thousands of lives is found."""


def examples(number: int, **options: Any) -> settings:
    """Settings of a property that takes `number` examples by default."""
    return settings(max_examples=ceil(number * SHARE), **options)


def by_default() -> None:
    """Settings of every other property. A busy machine is no reason to fail."""
    quick: dict[str, Any] = {"derandomize": True, "database": None} if SHARE < 1 else {}
    patient = examples(100, deadline=None, suppress_health_check=[HealthCheck.too_slow], **quick)
    settings.register_profile("suite", patient)
    settings.load_profile("suite")
