"""The guide's pages, and their code: what runs, and what is only shown."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
GUIDE: Final = ROOT / "docs" / "guide"
PAGES: Final = sorted(GUIDE.glob("*.md"))

SHOWN: Final = "<!-- shown, not run:"
"""In the line before a block that is not run, followed by why."""

_FENCE: Final = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


class Block(NamedTuple):
    """One block of code.

    Attributes:
        language: as the page says. code: without its indent. line: of the page, on which the code begins.
        why_not: why it is only shown; None for one that runs.
    """

    language: str
    code: str
    line: int
    why_not: str | None


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2].strip()
        why_not = before.removeprefix(SHOWN).removesuffix("-->").strip() if before.startswith(SHOWN) else None
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], textwrap.dedent(match["code"]), line, why_not))
    return found


def running(page: Path) -> list[Block]:
    """The Python of a page that runs."""
    return [block for block in blocks(page) if block.language == "python" and block.why_not is None]
