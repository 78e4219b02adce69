"""The text of the script that commits: `commit.lua`, and the steps of the parts."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

from dspy_prod.stores.redis.batch import STEPS

_FILE: Final = Path(__file__).with_name("commit.lua")


def script() -> tuple[str, str]:
    """The text, and the name by which a server has it once it was loaded."""
    return _script(tuple(STEPS.items()))


@lru_cache(maxsize=4)
def _script(steps: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    parts = ["local STEPS = {}", *(f"STEPS['{name}'] = {text}" for name, text in steps), _FILE.read_text("utf-8")]
    text = "\n".join(parts)
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
