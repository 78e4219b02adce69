"""Aliases move by compare-and-set."""

from __future__ import annotations
