"""Messages for people, when something needs them: `dspy_prod.alerts.webhook(url)`.

An event is put into a queue where it happens (`sending`); on a thread of its own it is put into words (`notices`), held
back while the same was told a moment ago (`folding`), and posted (`posting`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.alerts.notices import Notice
    from dspy_prod.alerts.sending import Webhook, WebhookStatus
    from dspy_prod.alerts.setup import webhook

__getattr__, __dir__ = door(__name__, {"notices": "Notice", "sending": "Webhook WebhookStatus", "setup": "webhook"})

__all__ = ["Notice", "Webhook", "WebhookStatus", "webhook"]
