"""The demo's state: its requests and what their callers saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dspy

import dspy_prod
from dspy_prod.cli.demo.providers import LocalProviders, RealProvider
from dspy_prod.cli.demo.triage import Message


@dataclass
class Outcome:
    """One request of the demo as its caller saw it."""

    act: str
    message: Message
    priority: str
    status: str
    reason: str | None
    route: str | None
    attempts: int
    latency: float
    category: str | None
    reply: str | None


@dataclass
class Run:
    """The demo's state."""

    providers: LocalProviders | RealProvider
    lm: dspy_prod.LM
    program: dspy_prod.Production
    progress: Any
    began: float = field(default_factory=time.time)
    outcomes: list[Outcome] = field(default_factory=list)
    transitions: list[str] = field(default_factory=list)

    def ask(self, act: str, message: Message, priority: str = "normal", lm: dspy_prod.LM | None = None) -> Outcome:
        """Send one message through the program."""
        began = time.monotonic()
        with (
            dspy.context(lm=lm or self.lm, adapter=dspy.JSONAdapter()),
            dspy_prod.call_context(
                user=message.user,
                tenant=message.tenant,
                session=f"{message.user}-{datetime.fromtimestamp(self.began):%Y%m%d-%H%M%S}",
                priority=priority,  # type: ignore[arg-type]
                tags={"act": act},
            ),
        ):
            answer = self.program(message=message.message)
        report = dspy_prod.call_report(answer)
        outcome = Outcome(
            act, message, priority, report.status, report.reason, report.route, report.attempts,
            time.monotonic() - began, getattr(answer, "category", None), getattr(answer, "reply", None),
        )  # fmt: skip
        self.outcomes.append(outcome)
        self.progress.set_postfix_str(act)
        self.progress.update()
        return outcome

    def ask_all(self, act: str, requests: Sequence[tuple[Message, str]], lm: dspy_prod.LM | None = None) -> None:
        """Send several messages at the same time."""
        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(lambda request: self.ask(act, request[0], request[1], lm), requests))
