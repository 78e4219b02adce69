"""Clocks, forks and work that a finaliser may not do."""

from __future__ import annotations
