"""Under which conditions a call is made."""

from __future__ import annotations
