"""What one commit does in Redis: commands in order, all of them or none.

A commit is one call of one script (`commit.lua`), so that nothing of another worker comes in between. Besides Redis'
own commands it may name steps of ours, which are Lua functions of the same script (`STEPS`), for what depends on what
is there.
"""

from __future__ import annotations

from typing import Final

Value = bytes | str | int | float
"""What a command takes; floats are written so that they read back exactly."""

STEPS: Final[dict[str, str]] = {}
"""Lua functions by their names: each takes (key, arguments as a table) and returns what its command's reply is."""


class Batch:
    """The commands of a commit.

    Attributes:
        commands: (name, key, arguments); a name in lower case is one of `STEPS`.
    """

    def __init__(self) -> None:
        self.commands: list[tuple[str, str, tuple[Value, ...]]] = []

    def call(self, name: str, key: str, *arguments: Value) -> int:
        """Add a command on a key of the namespace; the place of its reply among those of the commit."""
        self.commands.append((name, key, arguments))
        return len(self.commands) - 1

    def clear(self) -> None:
        """Forget them all."""
        self.commands.clear()

    def __len__(self) -> int:
        return len(self.commands)
