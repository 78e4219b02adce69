"""How commands print: tables (see `dspy_prod.views`) for people, JSON for programs.

Names wrap at the end of a terminal's line, and in a pipe not even these.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from dspy_prod.privacy.visible import HIDDEN
from dspy_prod.views.console import as_text


def print_json(value: Any) -> int:
    """Print a value as JSON, in whatever the output can take; returns the exit code 0."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not unicode)
    text = HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], text)
    print(text, flush=True)  # a closed pipe is met here, not at exit
    return 0


def show(*given: RenderableType) -> int:
    """Print lines, tables and reports; returns the exit code 0."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    for one in given:
        line = isinstance(one, (str, Text))
        console.print(as_text(one) if isinstance(one, str) else one, crop=False, soft_wrap=line)
    return 0
