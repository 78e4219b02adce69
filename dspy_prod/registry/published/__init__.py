"""Publishing and loading versions."""

from __future__ import annotations
