"""What the registry's encodings are read back by; only tests need that, and MLflow's users see the plain text."""

from __future__ import annotations

import re


def decoded(text: str) -> str:
    """The predictor's name that `names.encoded` made this of."""
    return re.sub(r"-([0-9a-f]+)-", lambda match: chr(int(match[1], 16)), text)


def unescaped(text: str) -> str:
    """The text that `rendering.escaped` made this of."""
    return re.sub("\\{\u2060(?=\u2060*[{%])", "{", text)
