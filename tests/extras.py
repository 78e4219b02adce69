"""Packages that not every environment has: what needs one is skipped, but where it has been promised to be there."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

import pytest

PROMISED: Final = "DSPY_PROD_TEST_EXTRAS"
"""Set where nothing may be skipped for want of a package, as `make extras` does."""


def needed(name: str) -> Any:
    """The package; without it the test is skipped, or fails where it has been promised."""
    return importlib.import_module(name) if os.environ.get(PROMISED) else pytest.importorskip(name)
