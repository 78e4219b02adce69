"""What of prompts and answers may leave the process: all, redacted, or nothing.

Runs on the courier's thread, never on a caller's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import orjson

from dspy_prod.privacy.known import known
from dspy_prod.privacy.names import Walk, is_secret, said_of
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.tracking.attributes import COST, MESSAGES, MODEL, PROVIDER, REQUEST_ID, TYPE, USAGE, dumped, valid

Mode = Literal["full", "redacted", "off"]

LONGEST: Final = 64_000
"""Characters of one text that are kept; a trace is for reading."""

_DEPTH: Final = 12
_DATA_URL: Final = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=\s]{64,}")
_HEADLINES: Final = ("mlflow.traceInputs", "mlflow.traceOutputs")
_STRUCTURAL: Final = frozenset(
    {REQUEST_ID, TYPE, MODEL, PROVIDER, COST, USAGE, MESSAGES, "mlflow.spanFunctionName", "mlflow.spanStartTimeNs"}
)

_ADDRESSES: Final = frozenset({"api_base", "base_url"})
"""Attributes that may hold a user name and a password."""


class Content:
    """How content is shown.

    Args:
        mode: `"full"`: as it is; `"redacted"`: without secrets and personal data; `"off"`: not at all.
        redactor: what redacts.
    """

    def __init__(self, mode: Mode, redactor: Redactor) -> None:
        self.mode = mode
        self._redactor = redactor

    def _let_out(self, text: str) -> str:
        return self._redactor.text(said_of("", text, known()))

    def shown(self, value: Any) -> Any:
        """A prompt, answer or input as JSON-like data fit to leave the process; None for nothing."""
        if self.mode == "off" or value is None:
            return None
        return self._clean(plain(value))

    def text(self, text: str | None) -> str | None:
        """A line that may quote content."""
        return text if text is None or self.mode == "full" else self._let_out(valid(text))

    def name(self, name: str) -> str:
        """What a span, a tag or an attribute is called."""
        return name if self.mode == "full" else self._let_out(valid(name))

    def error(self, kind: str, text: str) -> str:
        """An error, whose text may quote content: without content, its kind alone."""
        return kind if self.mode == "off" else self.text(text) or kind

    def attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes of one of our own spans: names, tags and the like."""
        if self.mode == "full":
            return dict(attributes)
        named = {key if key in _STRUCTURAL else self.name(key): value for key, value in attributes.items()}
        return {key: self.text(value) if isinstance(value, str) else value for key, value in named.items()}

    def foreign(self, span: dict[str, Any]) -> dict[str, Any]:
        """A span that somebody else made, such as MLflow's autologging; without content, its structure alone.

        MLflow writes an LM's `kwargs` as attributes: never those that hold a secret.
        """
        given = span.get("attributes", {})
        told = {key: value for key, value in given.items() if not is_secret(key) and key not in _ADDRESSES}
        if len(told) != len(given):
            span = {**span, "attributes": told}
        if self.mode == "full":
            return span
        attributes: dict[str, Any] = {}
        for key, coded in span.get("attributes", {}).items():
            if key in _STRUCTURAL:
                attributes[key] = coded
            elif self.mode == "redacted":
                attributes[self.name(key)] = self._recoded(coded)
        status = dict(span.get("status") or {})
        if status.get("message"):
            status["message"] = self.text(str(status["message"])) if self.mode == "redacted" else ""
        rest = {key: [] if self.mode == "off" else self._clean(span.get(key) or []) for key in ("events", "links")}
        return {
            **span,
            "name": self.name(str(span.get("name", ""))),
            "attributes": attributes,
            "status": status,
            **rest,
        }

    def foreign_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """The headline of a trace that somebody else made."""
        if self.mode == "full":
            return info
        kept = dict(info)
        for name in ("request_preview", "response_preview", "client_request_id"):
            kept[name] = None if self.mode == "off" else self.text(info.get(name))
        metadata = {self.name(key): self._recoded(value) for key, value in (info.get("trace_metadata") or {}).items()}
        kept["assessments"] = self._clean(info.get("assessments") or [])
        if self.mode == "off":
            kept["assessments"] = []
            metadata = {
                key: value for key, value in metadata.items() if key.startswith("mlflow.") and key not in _HEADLINES
            }
        kept["trace_metadata"] = metadata
        kept["tags"] = {self.name(key): self._recoded(value) for key, value in (info.get("tags") or {}).items()}
        return kept

    def _recoded(self, coded: Any) -> Any:
        """JSON text with its strings redacted one by one, so that it stays JSON."""
        if not isinstance(coded, str):
            return self._clean(coded)
        try:
            value = orjson.loads(coded)
        except ValueError:
            return self._let_out(coded)
        cleaned = self._clean(value)
        return coded if cleaned == value else dumped(cleaned)

    def _clean(self, value: Any) -> Any:
        return value if self.mode == "full" else Walk(self._let_out).value(value)


def plain(value: Any, depth: int = 0) -> Any:
    """Any value as JSON-like data: media by their kind alone, long texts cut, unknown objects as text."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, str):
        value = valid(value)
        text = _DATA_URL.sub("[media]", value) if "base64," in value else value
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}… [{len(text) - LONGEST} more characters]"
    if isinstance(value, (bytes, bytearray)):
        return f"[{len(value)} bytes]"
    if depth >= _DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in dict(value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth + 1) for item in value]
    for name in ("toDict", "model_dump"):
        dump = getattr(value, name, None)
        if callable(dump):
            try:
                return plain(dump(), depth + 1)
            except Exception:  # a user's own type: its text will do
                break
    parts = getattr(value, "parts", None)
    if parts is not None:
        return plain([getattr(part, "text", None) or f"[{getattr(part, 'type', 'part')}]" for part in parts], depth + 1)
    try:
        return plain(str(value), depth)
    except Exception:  # likewise
        return f"[{type(value).__name__}]"
