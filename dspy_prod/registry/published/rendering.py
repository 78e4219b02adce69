"""What the model receives from a predictor, as an MLflow chat prompt with `{{field}}` for each input.

MLflow takes every `{{word}}` in a prompt for a variable and `{% ... %}` for Jinja. Braces that are part of the text
(an instruction about templates, say) are therefore parted by U+2060 WORD JOINER, which has no width: the text looks as
it is, MLflow sees the inputs only, and the text can be read back.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any, Final

import dspy

LARGEST: Final = 60_000
"""Characters of a prompt as MLflow stores it (it takes 100,000, and a MySQL column 65,535 bytes)."""

_JOINER: Final = "\u2060"
_OPEN: Final = re.compile(rf"\{{{_JOINER}*(?=[{{%])")

Messages = list[dict[str, Any]]


def escaped(text: str) -> str:
    """Text in which MLflow sees no variable."""
    return _OPEN.sub(lambda match: match[0] + _JOINER, text)


def current_adapter() -> Any:
    """The adapter that DSPy would use here."""
    return dspy.settings.adapter or dspy.ChatAdapter()


class Slots:
    """Stand-ins for the inputs of a signature: texts that occur nowhere else."""

    def __init__(self, signature: Any) -> None:
        token = secrets.token_hex(8)
        self.inputs: dict[str, str] = {}
        self.history: str | None = None
        for number, (name, info) in enumerate(signature.input_fields.items()):
            if info.annotation == dspy.History:
                self.history = name  # a conversation is messages of its own
            else:
                self.inputs[name] = f"slot{token}n{number}e"
        self._names = {stand_in: name for name, stand_in in self.inputs.items()}
        self._pattern = re.compile(f"(slot{token}n[0-9]+e)")

    def template(self, text: str) -> str:
        """The text with `{{field}}` for each stand-in, and everything else escaped."""
        parts = self._pattern.split(text)
        return "".join(f"{{{{{self._names[part]}}}}}" if part in self._names else escaped(part) for part in parts)


def messages(predictor: Any, adapter: Any, slots: Slots) -> Messages:
    """What the adapter sends for these stand-ins."""
    sent: Messages = adapter.format(predictor.signature, list(predictor.demos), dict(slots.inputs))
    return sent


def chat_prompt(predictor: Any, adapter: Any) -> Messages:
    """The messages as an MLflow chat prompt; shortened, with a note, when MLflow could not hold it."""
    slots = Slots(predictor.signature)
    chat = [
        {"role": str(message.get("role", "user")), "content": slots.template(_text(message.get("content")))}
        for message in messages(predictor, adapter, slots)
    ]
    if slots.history is not None:
        chat.insert(max(len(chat) - 1, 1), {"role": "user", "content": f"{{{{{slots.history}}}}}"})
    return _fitted(chat)


def _text(content: Any) -> str:
    """The content of a message as text; images and other parts by their kind and the begin of what they hold."""
    if content is None or isinstance(content, str):
        return content or ""
    shown = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            shown.append(str(part.get("text", "")))
        else:
            payload = json.dumps(part, ensure_ascii=False)
            shown.append(payload if len(payload) <= 300 else f"{payload[:300]}... ({len(payload)} characters)")
    return "".join(shown)


def _fitted(chat: Messages) -> Messages:
    if len(json.dumps(chat)) <= LARGEST:
        return chat
    dropped = len(chat) - 2
    if dropped > 0:
        note = f"({dropped} messages with demos are part of the published state but too long to be shown here)"
        chat = [chat[0], {"role": "user", "content": note}, chat[-1]]
    most = LARGEST // (8 * len(chat))
    return [{**message, "content": _cut(message["content"], most)} for message in chat]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
