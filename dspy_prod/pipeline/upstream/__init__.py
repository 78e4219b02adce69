"""One route's way to the model."""

from __future__ import annotations
