"""asyncio's own way to ask for the running loop without an exception where there is none."""

from __future__ import annotations

from asyncio import _get_running_loop as running_loop

__all__ = ["running_loop"]
