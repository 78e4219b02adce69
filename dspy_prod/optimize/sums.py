"""What the calls of a run came to, by role and model, by phase and by candidate, as events of the call path tell it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspy_prod.telemetry.events import Event

_COUNTED = frozenset({"call_finished", "attempt_failed"})


@dataclass
class Sum:
    """Sums over attempts.

    Attributes:
        usd: dollars. unconfirmed_usd: the part of them that is an upper bound. calls: upstream attempts.
        tokens: input and output. input_tokens, output_tokens: apart. answers: from upstream. cached, replayed: others.
        seconds: of upstream answers, together.
    """

    usd: float = 0.0
    unconfirmed_usd: float = 0.0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    answers: int = 0
    cached: int = 0
    replayed: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def add(self, data: Mapping[str, Any]) -> None:
        """Count one attempt."""
        outcome = data["outcome"]
        if outcome == "replayed":
            self.replayed += 1
            return
        if data["cached"]:
            self.cached += 1
            return
        cost = data["cost_usd"] or 0.0
        self.usd += cost
        self.unconfirmed_usd += cost if data["estimated"] else 0.0
        self.calls += 1
        self.input_tokens += data["input_tokens"] or 0
        self.output_tokens += data["output_tokens"] or 0
        if outcome == "ok":
            self.answers += 1
            self.seconds += data["latency"]


class Sums:
    """Listens to the events of one run.

    Args:
        run: its name. roles: what an LM is used for, by model.
    """

    def __init__(self, run: str, roles: Mapping[str, str]) -> None:
        self._run, self._roles = run, roles
        self._lock = threading.Lock()
        self.phase = "baseline"
        self.total = Sum()
        self.roles: dict[str, Sum] = defaultdict(Sum)
        self.phases: dict[str, Sum] = defaultdict(Sum)
        self.candidates: dict[str, Sum] = defaultdict(Sum)
        self.largest_usd = 0.0

    def __call__(self, event: Event) -> None:
        """Count what an event tells, if it is of this run."""
        if event.name not in _COUNTED or event.data.get("run") != self._run:
            return
        data = event.data
        tags = data.get("tags") or {}
        candidate = tags.get("candidate")
        model = data["model"]
        role = tags.get("role") or self._role(model, candidate)
        with self._lock:
            for found in (self.total, self.roles[f"{role}/{model}"], self.phases[self.phase]):
                found.add(data)
            if candidate is not None:
                self.candidates[candidate].add(data)
                if role == "task":
                    self.largest_usd = max(self.largest_usd, data["cost_usd"] or 0.0)

    def _role(self, model: str, candidate: str | None) -> str:
        known = self._roles.get(model, "task")
        if candidate is not None:
            return "task" if candidate != "aside" or known == "task" else "teacher"
        return "prompt" if known in ("task", "teacher") else known

    def of(self, candidate: int) -> Sum:
        """What one candidate came to."""
        with self._lock:
            return replace(self.candidates.get(str(candidate), Sum()))

    def snapshot(self) -> tuple[Sum, dict[str, Sum], dict[str, Sum]]:
        """(all, by role and model, by phase), as they are now."""
        with self._lock:
            return (
                replace(self.total),
                {name: replace(each) for name, each in self.roles.items()},
                {name: replace(each) for name, each in self.phases.items()},
            )
