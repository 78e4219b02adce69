"""How what the registry writes into MLflow's alphabet and templates is read back; only tests need to."""

from __future__ import annotations

import re


def decoded(text: str) -> str:
    """The predictor's name that `names.encoded` made this of."""
    return re.sub(r"-([0-9a-f]+)-", lambda match: chr(int(match[1], 16)), text)


def unescaped(text: str) -> str:
    """The text that `rendering.escaped` made this of: each word joiner behind a brace of a pair was put there."""
    return re.sub(r"\{\u2060(?=\u2060*[{%])", "{", text)
