"""What can be heard and seen of a call."""

from __future__ import annotations
