"""What may be shown of an error: its class and a short text, without keys, prompts and answers.

Known secrets go first, by the door that every text leaves by, and then what looks like one.
"""

from __future__ import annotations

import re
from typing import Final

from dspy.utils.exceptions import AdapterParseError, LMError

from dspy_prod.privacy.forms import HIDDEN
from dspy_prod.privacy.outward import outward

_LENGTH: Final = 200

_TOKENS: Final = re.compile(
    r"(?P<keep>://)[^/?#\s@]*@"  # user and password in a URL
    r"|\bbearer\s+\S+"
    r"|\b(?:sk|pk|rk|gsk|xai|hf|ghp|pplx|nvapi|key)[-_][\w*-]{6,}"  # the shapes of well-known providers' keys
    r"|\bA(?:Iza|KIA)[\w-]{12,}"
    r"|\b(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{24,}\b",  # anything that looks random
    re.IGNORECASE,
)
_NAMED: Final = re.compile(
    r"(?P<name>\b(?:api[-_ ]?key|secret|password|authorization|access[-_ ]?token)\b[\"']?\s*(?:[:=]|provided:)\s*)"
    r"[\"']?[^\s\"',;&]+",
    re.IGNORECASE,
)


def error_text(error: BaseException) -> str:
    """`"LMServerError 500: the server had an error"`: one line of at most about 200 characters.

    A parse error's text contains the model's answer, so only the names of its fields are told. Texts of a provider may
    echo a key: known keys and whatever looks like one are replaced.
    """
    name = type(error).__name__
    if isinstance(error, AdapterParseError):
        expected = ", ".join(error.signature.output_fields) if error.signature is not None else ""
        return f"{name}: {error.adapter_name} did not find the fields [{expected}] in the answer"
    status = getattr(error, "status", None)
    head = name if status is None else f"{name} {status}"
    text = scrubbed(error.message if isinstance(error, LMError) else str(error))
    return f"{head}: {text}" if text else head


def scrubbed(text: str) -> str:
    """One line without known secrets, without what looks like one, and redacted while a redactor is in force."""
    text = outward(text)
    text = _TOKENS.sub(lambda match: f"{match['keep']}{HIDDEN}@" if match["keep"] else HIDDEN, text)
    text = _NAMED.sub(rf"\g<name>{HIDDEN}", text)
    line = " ".join(text.split())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 1] + "…"
