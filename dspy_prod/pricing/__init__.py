"""What a call costs, and at most."""

from __future__ import annotations
