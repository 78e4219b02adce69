"""The circuit breaker."""

from __future__ import annotations
