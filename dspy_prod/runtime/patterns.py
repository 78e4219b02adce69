"""Regular expressions that are compiled when they are first used: most of ours are for errors that may never come."""

from __future__ import annotations

import re


class Pattern:
    """A regular expression, as `re.compile` gives it, but compiled at its first use.

    Args:
        text: the expression. flags: as for `re.compile`.

    Example:
        ```python
        Pattern(r"rate.?limit", re.IGNORECASE).search("Rate limit reached")
        ```
    """

    __slots__ = ("_flags", "_made", "_text")

    def __init__(self, text: str, flags: int = 0) -> None:
        self._text, self._flags = text, flags
        self._made: re.Pattern[str] | None = None

    @property
    def compiled(self) -> re.Pattern[str]:
        """The expression itself."""
        if self._made is None:
            self._made = re.compile(self._text, self._flags)
        return self._made

    def search(self, text: str) -> re.Match[str] | None:
        """As `re.Pattern.search`."""
        return self.compiled.search(text)

    def match(self, text: str) -> re.Match[str] | None:
        """As `re.Pattern.match`."""
        return self.compiled.match(text)
