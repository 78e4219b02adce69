"""What a webhook is sent: a notice as Slack takes it, or as plain JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from dspy_prod.alerts.notices import Notice

Format = Literal["slack", "json"] | Callable[[Notice], Any]

_MARKS: Final = {"info": ":information_source:", "warning": ":warning:", "error": ":rotating_light:"}


def _slack(notice: Notice) -> dict[str, Any]:
    more = f" _({notice.folded} more)_" if notice.folded else ""
    title = f"*{_escaped(notice.kind.replace('_', ' '))}* {_escaped(notice.subject)}".strip()
    return {"text": f"{_MARKS[notice.level]} {title}: {_escaped(notice.text)}{more}"}


def _escaped(text: str) -> str:
    """As Slack wants it; else a text could call everybody, or show a link as another."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json(notice: Notice) -> dict[str, Any]:
    return {
        "event": notice.kind, "subject": notice.subject, "level": notice.level, "text": notice.text,
        "at": notice.when, "folded": notice.folded, "process": os.getpid(),
    }  # fmt: skip


FORMATS: Final[Mapping[str, Callable[[Notice], Any]]] = {"slack": _slack, "json": _json}
